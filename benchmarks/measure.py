"""Timing that survives a noisy machine: candidates take turns, and ratios are taken turn by turn."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One candidate on one problem.

    Attributes:
        name: The candidate.
        seconds: Median time of a call.
        ratio: Median over turns of its time / the baseline's time in the same turn.
        low, high: 10th and 90th percentile of that ratio.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass
class Result:
    """All rows of one problem, with what is needed to read them later."""

    problem: dict[str, Any]
    baseline: str
    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def row(self, name: str) -> Row:
        """The row of a candidate."""
        return next(row for row in self.rows if row.name == name)


def take_turns(
    candidates: Mapping[str, Callable[[], object]], baseline: str, problem: dict[str, Any], rounds: int = 15
) -> Result:
    """Time every candidate once a round, for `rounds` rounds, after one call each to warm up.

    Args:
        candidates: Functions without arguments, by name.
        baseline: The one whose time the ratios divide by.
        problem: What the result should say about the problem.
        rounds: Turns. The median is over them.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds[baseline], strict=True))
        rows.append(
            Row(
                name, statistics.median(own), statistics.median(ratios), ratios[rounds // 10], ratios[-1 - rounds // 10]
            )
        )
    return Result(problem, baseline, rows)


def environment() -> dict[str, Any]:
    """Machine, versions and commit, as they belong into every result."""
    packages = ("mkf", "torch", "triton", "numpy", "numba", "faiss-cpu", "scikit-learn")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    folder = Path(__file__).resolve().parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "commit": git.stdout.strip() or None,
    }


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
