"""What is printed fits, or is printed whole."""

import io

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from mkf.cli import app
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


@pytest.mark.parametrize("command", ["analyze", "fit", "identify", "search", "report", "convert"])
def test_help_fits_80_columns(command: str, monkeypatch) -> None:
    """Words for arguments are whole."""
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    arguments = text.partition("Arguments")[2].partition("Options")[0]
    assert "NAME|FILE" in arguments
    assert "\N{HORIZONTAL ELLIPSIS}" not in arguments
    assert max(map(ord, text)) < 0x1F000  # rich makes an emoji of :B:


def test_paragraphs_of_help_fill_80_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "\n the filters of the keys' size are fitted." in CliRunner().invoke(app, ["fit", "--help"]).stdout


def test_help_keeps_asterisks(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "train-*.parquet, and test-*" in CliRunner().invoke(app, ["train", "--help"]).stdout
