"""Where commands print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPED_WIDTH = 120
_ANY_WIDTH = 1 << 16


def stdout() -> Console:
    """A console on standard output, as wide as the terminal; into a file or pipe of a fixed width.

    What is printed is printed as it is: names of models and files may hold brackets, which are no markup.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def stderr() -> Console:
    """The same on standard error, for notes and progress bars."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_table(console: Console, table: Table) -> None:
    """Print a table uncut: as wide as the console, or wider where words, and columns that do not wrap, need that."""
    from rich.measure import measure_renderables

    unlimited = console.options.update(width=_ANY_WIDTH)
    for column in table.columns:
        needed = measure_renderables(console, unlimited, [column.header, *column.cells])
        column.no_wrap |= needed.minimum == needed.maximum  # else rich takes width from those that cannot give any
        least = needed.maximum if column.no_wrap else needed.minimum
        column.min_width = max(least, column.min_width or 0)
    least = console.measure(table, options=unlimited).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)
