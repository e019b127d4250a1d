"""Where commands print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 120


def stdout() -> Console:
    """A console on standard output, as wide as the terminal; into a file or pipe of a fixed width.

    What is printed is printed as it is: names of models and files may hold brackets, which are no markup.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)
