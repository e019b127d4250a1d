"""Whether the machine is quiet: a small product of matrices as the yardstick, beside what is timed and none of it.

A shared machine changes by the second. A neighbour on a core's other thread takes part of its caches and of its time; a
host that puts two threads of a guest on one core halves what they do together. Either hurts arithmetic, and what lives
in the caches, more than what waits for memory, so ratios change too. The yardstick tells: on the machine of our results
it took 1.00 to 1.05 of its least time, 1.06 to 1.30 (a copy within the caches then took a fifth longer), or 1.8 to 1.9.
"""

import time

import torch

QUIET = 1.05  # times the yardstick's least time
_SIZE = 256  # of the matrices, which lie in the caches of one core
_SCALING = 0.75  # of n times the speed of one thread, by which a first measurement of n is known to be quiet
_PATIENCE = 3.0  # seconds to wait for that: where threads are many, or small tasks slow to start, it never comes

_least: dict[int, float] = {}  # the shortest time so far in this process, by the number of threads


def disturbance() -> float:
    """The time that the yardstick takes now / the least that it took in this process, with as many threads; >= 1."""
    threads = torch.get_num_threads()
    if threads not in _least:
        _least[threads] = _first(threads)
    seconds = _yardstick()
    _least[threads] = min(seconds, _least[threads])
    return seconds / _least[threads]


def _first(threads: int) -> float:
    """The least time of some, and not only of such as were taken while all threads had one core."""
    torch.set_num_threads(1)
    alone = min(_yardstick() for _ in range(20))
    torch.set_num_threads(threads)
    end, least = time.perf_counter() + _PATIENCE, min(_yardstick() for _ in range(20))
    while least * threads * _SCALING > alone and time.perf_counter() < end:
        time.sleep(0.005)
        least = min(least, _yardstick())
    return least


def wait(seconds: float) -> float:
    """Wait until the machine is quiet, but no longer than this; returns the `disturbance` at the end."""
    end = time.perf_counter() + seconds
    while (now := disturbance()) > QUIET and time.perf_counter() < end:
        time.sleep(0.005)
    return now


def _yardstick() -> float:
    """Seconds of a product, the least of three."""
    matrix, out = torch.ones(_SIZE, _SIZE), torch.empty(_SIZE, _SIZE)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=out)
        times.append(time.perf_counter() - start)
    return min(times)
