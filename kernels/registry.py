"""Which implementations of an operator exist, which can run here, and the reason why not.

To add one, write its file and add its line to `IMPLEMENTATIONS`. Its module has two functions: one named like the
operator, and `why_not(device) -> str | None`, the reason it cannot run on that device, None if it can. Neither may
import anything heavy before it is called. Operators whose implementations do not serve every call ask for a further
function, which their folder's docstring tells.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType

import torch


class BackendError(RuntimeError):
    """An implementation was asked for by name and cannot run; the message says why and what would."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operator.

    Args:
        operator: Name of the operator, which is also its folder and the name of the function.
        name: What a user calls it, `backend=name`.
        devices: Types of `torch.device` it is written for; empty for any.
        description: What it is, for `mkf env`.
    """

    operator: str
    name: str
    devices: tuple[str, ...]
    description: str

    def load(self) -> ModuleType:
        """The module that holds it."""
        return self._module

    @cached_property
    def _module(self) -> ModuleType:
        return import_module(f"mkf.kernels.{self.operator}.{self.name}")

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, or None if it can."""
        if self.devices and device.type not in self.devices:
            return f"written for {' and '.join(self.devices)}, not for {device.type}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        reason: str | None = self.load().why_not(device)
        return reason


IMPLEMENTATIONS = (  # for each operator in the order of preference
    Implementation("affine_fit", "native", ("cpu",), "C++: AVX-512, AVX2 or portable, chosen at run time"),
    Implementation("affine_fit", "numba", ("cpu",), "numba, for a CPU without the compiled extension"),
    Implementation("affine_fit", "cuda", ("cuda",), "CUDA C++, for NVIDIA GPUs"),
    Implementation(
        "affine_fit", "triton", ("cuda",), "Triton, for NVIDIA GPUs without the CUDA kernels and for AMD GPUs"
    ),
    Implementation("affine_fit", "reference", (), "PyTorch, the readable definition, on any device"),
    Implementation("key_conv2d", "native", ("cpu",), "C++: AVX-512, AVX2 or portable, chosen at run time"),
    Implementation("key_conv2d", "cuda", ("cuda",), "CUDA C++, for NVIDIA GPUs"),
    Implementation(
        "key_conv2d", "triton", ("cuda",), "Triton, for NVIDIA GPUs without the CUDA kernels and for AMD GPUs"
    ),
    Implementation("key_conv2d", "reference", (), "PyTorch's depthwise convolution with the filters written out"),
)

WhyNotCall = Callable[[ModuleType], str | None]
"""Asks the module of an implementation why it cannot serve one particular call; None if it can."""


def implementations(operator: str) -> tuple[Implementation, ...]:
    """All implementations of `operator`, the preferred one first."""
    return tuple(i for i in IMPLEMENTATIONS if i.operator == operator)


def operators() -> tuple[str, ...]:
    """The names of all operators."""
    return tuple(dict.fromkeys(i.operator for i in IMPLEMENTATIONS))


def named(operator: str, name: str, source: str = "backend=") -> Implementation:
    """The implementation of that name, whether or not it can run here; `source` is who named it.

    Raises:
        ValueError: There is none.
    """
    known = {i.name: i for i in implementations(operator)}
    if name not in known:
        raise ValueError(f"{source}{name!r}: {operator} has no such implementation; there are {', '.join(known)}")
    return known[name]


def choose(
    operator: str, device: torch.device, backend: str | None = None, why_not_call: WhyNotCall | None = None
) -> Implementation:
    """The implementation to run: the one asked for, else the first that can.

    Args:
        operator: Name of the operator.
        device: Where the tensors are.
        backend: Name of an implementation. Without one, the environment variable `MKF_BACKEND` counts, unless it names
            one that only another operator has.
        why_not_call: For an operator whose implementations do not serve every call.

    Raises:
        ValueError: There is no implementation of that name.
        BackendError: The one asked for cannot run on `device`, or cannot serve the call.
    """
    wanted = backend or os.environ.get("MKF_BACKEND")
    if not wanted or (not backend and _is_of_others(wanted, operator)):
        return next(i for i in IMPLEMENTATIONS if i.operator == operator and _why_not(i, device, why_not_call) is None)
    source = "backend=" if backend else "MKF_BACKEND="
    chosen = named(operator, wanted, source)
    reason = _why_not(chosen, device, why_not_call)
    if reason is not None:
        runs = ", ".join(i.name for i in implementations(operator) if _why_not(i, device, why_not_call) is None)
        raise BackendError(f"{source}{wanted!r} cannot run {operator} on {device}: {reason}. Here {runs} can.")
    return chosen


def _is_of_others(name: str, operator: str) -> bool:
    """Whether other operators have an implementation of that name, and this one has none."""
    having = {i.operator for i in IMPLEMENTATIONS if i.name == name}
    return bool(having) and operator not in having


def _written_for(operator: str, device_type: str) -> tuple[Implementation, ...]:
    """The implementations of `operator` that are written for such devices, the preferred one first."""
    table, found = _tables.get((operator, device_type), (None, ()))
    if table is not IMPLEMENTATIONS:
        found = tuple(i for i in implementations(operator) if not i.devices or device_type in i.devices)
        _tables[operator, device_type] = IMPLEMENTATIONS, found
    return found


_tables: dict[tuple[str, str], tuple[tuple[Implementation, ...], tuple[Implementation, ...]]] = {}


def passed_over(
    operator: str, device: torch.device, chosen: Implementation, why_not_call: WhyNotCall | None = None
) -> dict[str, str]:
    """Why the implementations that are written for `device` and preferred to `chosen` were not: reasons by name."""
    known = _written_for(operator, device.type)
    preferred = known[: known.index(chosen)]
    return {i.name: _why_not(i, device, why_not_call) or "another was asked for" for i in preferred}


def _why_not(implementation: Implementation, device: torch.device, why_not_call: WhyNotCall | None) -> str | None:
    reason = implementation.why_not(device)
    return why_not_call(implementation.load()) if reason is None and why_not_call is not None else reason
