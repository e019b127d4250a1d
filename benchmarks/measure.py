"""Timing that survives a noisy machine: candidates take turns in quiet moments, and ratios are taken turn by turn."""

import ctypes
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mkf.benchmarks import quiet


@dataclass
class Row:
    """One candidate on one problem.

    Attributes:
        name: The candidate.
        seconds: Median time of a call.
        ratio: Median over turns of its time / the baseline's time in the same turn.
        low, high: 10th and 90th percentile of that ratio.
        turns: Its time in every turn; not written to files.
        first_calls: That of the first call of every turn, when the caches hold what another left; not written either.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    turns: list[float] = field(default_factory=list, repr=False)
    first_calls: list[float] = field(default_factory=list, repr=False)


@dataclass
class Result:
    """All rows of one problem, with what is needed to read them later.

    Attributes:
        derived: What a suite works out of the turns, which are not written.
        quiet: Share of the turns in which the machine was quiet; see `mkf.benchmarks.quiet`.
    """

    problem: dict[str, Any]
    baseline: str
    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    derived: dict[str, Any] = field(default_factory=dict)
    quiet: float | None = None

    def row(self, name: str) -> Row:
        """The row of a candidate."""
        return next(row for row in self.rows if row.name == name)

    def times_faster(self, name: str, peer: str, first_call: bool = False) -> float:
        """Median over turns of the time of `peer` / the time of `name`, of all calls or of the first one."""
        own, theirs = ((row.first_calls if first_call else row.turns) for row in (self.row(name), self.row(peer)))
        return statistics.median(t / o for t, o in zip(theirs, own, strict=True))


TRIES = 3  # at a turn, until one was quiet


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    baseline: str,
    problem: dict[str, Any],
    rounds: int = 15,
    seconds_a_turn: float = 0.0,
    patience: float | None = None,
) -> Result:
    """Time every candidate once a round, for `rounds` rounds, after two calls each to warm up.

    Each round has an order of its own, always the same ones: what one leaves in caches and memory, the next one finds.
    A turn waits until the machine is quiet, and is taken again, after the others, if it was not so to its end: the
    quietest of `TRIES` counts. What a candidate took chooses nothing.

    Args:
        candidates: Functions without arguments, by name.
        baseline: The one whose time the ratios divide by.
        problem: What the result should say about the problem.
        rounds: Turns. The median is over them.
        seconds_a_turn: A candidate is called for as long without counting, and then until it has lasted as long again;
            its time is the mean of the latter. If 0, a turn is one call.
        patience: Seconds to wait in all; as long as the turns take if None.
    """
    for run in candidates.values():
        run()
        run()
    turns = []  # for each round: by name, how much the machine was disturbed, and seconds: of a call, of the first one
    orders = random.Random(0)
    left = 1.0 if patience is None else patience  # seconds to wait
    for _ in range(rounds):
        tries: dict[str, list[tuple[float, float, float]]] = {name: [] for name in candidates}
        waiting = orders.sample(list(candidates), len(candidates))
        while waiting:
            name = waiting.pop(0)
            start = time.perf_counter()
            before = quiet.wait(left)
            begin = time.perf_counter()
            seconds, first_call = _turn(candidates[name], seconds_a_turn)
            left -= begin - start
            if patience is None:
                left += time.perf_counter() - begin
            tries[name].append((max(before, quiet.disturbance()), seconds, first_call))
            if tries[name][-1][0] > quiet.QUIET and len(tries[name]) < TRIES:
                waiting.append(name)
        turns.append({name: min(of_name, key=lambda tried: tried[0]) for name, of_name in tries.items()})
    rows = []
    for name in candidates:
        own = [turn[name][1] for turn in turns]
        ratios = sorted(turn[name][1] / turn[baseline][1] for turn in turns)
        low, high = ratios[rounds // 10], ratios[-1 - rounds // 10]
        first_calls = [turn[name][2] for turn in turns]
        rows.append(Row(name, statistics.median(own), statistics.median(ratios), low, high, own, first_calls))
    were_quiet = [disturbed <= quiet.QUIET for turn in turns for disturbed, *_ in turn.values()]
    return Result(problem, baseline, rows, quiet=statistics.fmean(were_quiet))


def _turn(run: Callable[[], object], at_least: float) -> tuple[float, float]:
    """Mean seconds of a call, of as many as take `at_least` seconds after others that took as long; those of the first.

    The first calls after another candidate's turn wait while what that one left in the caches is written to memory: how
    long depends on who it was, and it takes milliseconds to end.
    """
    first_call = _mean(run, 0.0)
    if at_least == 0.0:
        return first_call, first_call
    if first_call < at_least:
        _mean(run, at_least - first_call)
    return _mean(run, at_least), first_call


def _mean(run: Callable[[], object], at_least: float) -> float:
    """Mean seconds of a call, of as many as take `at_least` seconds."""
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        seconds = time.perf_counter() - start
        if seconds >= at_least:
            return seconds / calls


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends; whether the C library can (glibc).

    Otherwise it gives large blocks back, and who asks next waits for fresh pages: of a step of a network that can be a
    tenth, and whose turn it falls into is chance.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios that does not depend on which side is the denominator."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def environment() -> dict[str, Any]:
    """Machine, versions and commit, as they belong into every result."""
    packages = ("mkf", "torch", "triton", "numpy", "numba", "faiss-cpu", "scikit-learn")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout that this is run from, if it is one and there is git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # else git would tell of any repository that mkf is installed in
        return None
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def write(results: list[Result], path: Path) -> None:
    """Write results as JSON."""
    records = [asdict(result) for result in results]
    for record in records:
        for row in record["rows"]:
            del row["turns"], row["first_calls"]
    path.write_text(json.dumps(records, indent=1) + "\n")
