"""What goes wrong ends in one message, never in a traceback."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from safetensors import SafetensorError

_NO_MEMORY = re.compile("out of memory|allocate|Storage size")
"""What torch says in a RuntimeError, which on a CPU is a plain one, where there is not the memory for a tensor."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors a user can cause into a red line on stderr and exit code 1, and warnings into yellow notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError, SafetensorError) as error:
            message = _message(error)
            if message is None:
                raise
            _print_notes(caught)
            typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            told = ["interrupted", *getattr(interrupt, "__notes__", [])]  # a note may say how to go on
            typer.secho("; ".join(told), fg=typer.colors.YELLOW, err=True)
            raise typer.Exit(130) from None  # as shells have it for Ctrl-C
        _print_notes(caught)


def _message(error: Exception) -> str | None:
    """What to tell of an error; None where the user cannot have caused it."""
    from mkf.kernels.registry import BackendError  # not before it is needed, as it brings torch

    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        return "there is not enough memory" + (f" for {wanted[1]}" if wanted else "")
    if isinstance(error, RuntimeError) and not isinstance(error, BackendError):
        return None
    return str(error)


def _print_notes(caught: list[warnings.WarningMessage]) -> None:
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            typer.secho(f"note: {warning.message}", fg=typer.colors.YELLOW, err=True)


def typed(context: typer.Context) -> set[str]:
    """The names of what was typed, not left at its default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
