"""What can run on this machine, for the tests of every operator."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mkf.kernels import extension, registry

ROOT = Path(__file__).parents[2]


def cpu_runs(isa: str) -> bool:
    """Whether the extension is there and this processor has one of its instruction sets."""
    if extension.missing() is not None:
        return False
    native = extension.native()
    return bool(native.cpu_runs(getattr(native.Isa, isa)))


def runnable(operator: str) -> Iterator[tuple[str, str | None]]:
    """(backend, instruction set) of every implementation of an operator that can run on the CPU here."""
    for implementation in registry.implementations(operator):
        if implementation.why_not(torch.device("cpu")) is not None:
            continue
        if implementation.name == "native":
            yield from (("native", isa) for isa in extension.ISAS if cpu_runs(isa))
        else:
            yield implementation.name, None


def triton_version() -> tuple[int, ...]:
    triton = pytest.importorskip("triton")
    return tuple(map(int, triton.__version__.split(".")[:2]))


def run_interpreted(name: str) -> None:
    """Run tests of a file beside this one in a process of its own: to import triton chooses the interpreter or not."""
    if triton_version() < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("this Triton's interpreter does not run loops with this numpy")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            Path(__file__).with_name(name),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
