"""What is printed fits, or is printed whole."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from mkf.cli._console import print_table


@pytest.mark.parametrize("width", [20, 60, 100])
def test_no_table_is_cut(width: int) -> None:
    table = Table()
    table.add_column("model", overflow="fold")
    table.add_column("of it", no_wrap=True)
    table.add_column("what it is")
    table.add_row("a-network-of-a-rather-long-name", "10 to 20", "words that may well stand below each other")
    console = Console(file=io.StringIO(), width=width)
    print_table(console, table)
    printed = console.file.getvalue()
    for whole in ("a-network-of-a-rather-long-name", "10 to 20", "words", "below"):
        assert whole in printed
    widths = {len(line) for line in printed.splitlines()}
    assert len(widths) == 1
    assert widths.pop() <= max(width, 60)
