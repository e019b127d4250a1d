"""Errors a user can cause end in one message, never in a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the library's ValueError, OSError and ImportError into a red line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
