"""The compiled extension `mkf._native`, if this installation has it."""

import importlib.util
import os
from functools import cache
from typing import Any

import torch

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # the best first

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as csrc/common/scalar.hpp counts

num_threads = torch.get_num_threads


def _after_fork() -> None:
    """In a forked process, where GNU OpenMP would wait for ever for threads that are none of it, count one."""
    global num_threads
    num_threads = _one


def _one() -> int:
    return 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def missing() -> str | None:
    """Why there is no extension, or None if there is."""
    if importlib.util.find_spec("mkf._native") is None:
        return "the C++ extension is missing: this copy was installed without a working C++ compiler"
    try:
        native()
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


@cache
def native() -> Any:
    """The module `mkf._native`."""
    return importlib.import_module("mkf._native")


def isa() -> str:
    """The instruction set the C++ kernels use: the best this processor has, or the one that `MKF_ISA` names.

    Raises:
        ValueError: `MKF_ISA` names no instruction set, or one that this processor or this build lacks.
    """
    name: str = native().isa().name
    return name
