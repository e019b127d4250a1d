"""Run as a script: a search that is killed ten times at random moments, against the same search left alone.

Its children are forks of one process, which has imported torch and never used its threads.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import mkf
from mkf.search import Accuracy, Residual, autoencoder, eliminate
from tests.search.networks import learnable, network
from tests.search.planted import plant

KILLS = 10


def candidates():
    return mkf.keys.random(7, 12, seed=1)


def by_residual(state, slowly):
    filters, _ = plant(mkf.keys.paper8(), 500)
    return eliminate(candidates(), 4, Residual(filters), state=state, progress=slowly).keys


def by_accuracy(state, slowly):
    model = network()
    return eliminate(
        candidates(), 4, Accuracy(model, learnable(model, 8), split="train"), state=state, progress=slowly
    ).keys


def by_autoencoder(state, slowly):
    filters, _ = plant(mkf.keys.paper8(), 200)
    return autoencoder(filters, steps=200, batch_size=16, state=state, progress=slowly).candidates(5)


def slowly(*_):
    time.sleep(0.002)


def kill_and_resume(search, folder):
    """How often it was killed, and whether the last run, that was left alone, found the same keys."""
    alone = search(folder / "alone", slowly)
    begun = time.monotonic()
    search(folder / "timed", slowly)
    seconds = time.monotonic() - begun
    rng = random.Random(search.__name__)
    state = folder / "killed"
    kills = 0
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            search(state, slowly)
            os._exit(0)
        time.sleep(rng.uniform(0, seconds / 2))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == signal.SIGKILL:
            kills += 1
        else:
            state.unlink()  # it was done already: once more from the beginning
    return kills, search(state, slowly) == alone


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["mkf.search.eliminate"].SAVE_EVERY = 0  # a state is being written most of the time
    sys.modules["mkf.search.autoencoder"].ROUND = 10
    for search in (by_residual, by_accuracy, by_autoencoder):
        folder = Path(sys.argv[1]) / search.__name__
        folder.mkdir()
        print(search.__name__, *kill_and_resume(search, folder))
