"""Packages that import what they offer when it is first asked for, so that `mkf --help` need not wait for torch."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def importer(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: Its name.
        homes: The names that it offers, by the module in it that has them.
        modules: The modules in it that are offered themselves.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(import_module(package), name, value)  # for the next time, as importing a module does it by itself
        return value

    def names() -> list[str]:
        return sorted({*vars(import_module(package)), *home, *modules})

    return get, names
