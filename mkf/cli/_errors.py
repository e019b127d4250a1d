"""What goes wrong ends in one message, never in a traceback."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from safetensors import SafetensorError

from mkf.kernels.registry import BackendError


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors a user can cause into a red line on stderr and exit code 1, and warnings into yellow notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, BackendError, SafetensorError) as error:
            _print_notes(caught)
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            told = ["interrupted", *getattr(interrupt, "__notes__", [])]  # a note may say how to go on
            typer.secho("; ".join(told), fg=typer.colors.YELLOW, err=True)
            raise typer.Exit(130) from None  # as shells have it for Ctrl-C
        _print_notes(caught)


def _print_notes(caught: list[warnings.WarningMessage]) -> None:
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            typer.secho(f"note: {warning.message}", fg=typer.colors.YELLOW, err=True)
