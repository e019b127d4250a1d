"""Lets code written for a GPU stand in the registry as an implementation for the CPU."""

import sys
from types import ModuleType

from mkf.kernels import registry


def enlist(monkeypatch, name, function):
    """Make `backend=name` call `function` on CPU tensors."""
    module = ModuleType(f"mkf.kernels.affine_fit.{name}")
    module.why_not = lambda device: None
    module.affine_fit = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    implementation = registry.Implementation("affine_fit", name, ("cpu",), "a GPU kernel on the CPU")
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (*registry.IMPLEMENTATIONS, implementation))
