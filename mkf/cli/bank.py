"""`mkf bank`: build filter banks and look at them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stderr, stdout
from mkf.cli._errors import user_errors

app = typer.Typer(help="Build filter banks and look at them.", no_args_is_help=True)


@app.command("build")
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="timm names, checkpoint files and saved banks, put together in this order; or the word paper54: the "
            "paper's own list of checkpoints.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bank; a bank that is there is replaced.")],
    pretrained: Annotated[
        bool, typer.Option(help="Fetch timm's trained weights, or only initialise its models.")
    ] = True,
    files: Annotated[
        Path | None, typer.Option(help="With paper54: folder of the checkpoints that you bring as files.")
    ] = None,
) -> None:
    """Collect depthwise filters and save them as a bank, a Parquet data set.

    `paper54` adds to the bank at --out what it does not hold yet, so that it can be run again.
    """
    from mkf.bank.storage import refuse_other_things, settle

    console = stderr()
    with user_errors():
        folder = settle(out)  # what is wrong with it is told now, and not after all the work
        refuse_other_things(folder)
        _outputs.folder(folder.parent, "--out")
        if "paper54" in sources:
            _build_paper54(sources, out, pretrained, files, console)
        elif files is not None:
            raise ValueError("--files goes with paper54; name other checkpoint files themselves")
        else:
            _build(sources, out, pretrained, console)
        _print_models(out)


@app.command("info")
def info(
    folder: Annotated[
        Path, typer.Argument(metavar="BANK", help="Folder of a saved bank, or embedded: the one that comes with mkf.")
    ],
) -> None:
    """Print which models a bank holds, with how many layers and filters, and where they come from."""
    from mkf.bank.filter_bank import EMBEDDED

    with user_errors():
        _print_models(EMBEDDED if str(folder) == "embedded" else folder)


def _build(sources: list[str], out: Path, pretrained: bool, console: Any) -> None:
    from mkf.bank import FilterBank, load

    words = list(dict.fromkeys(sources))  # each is read once, as by the other commands
    with _sources.bars(console) as progress:
        banks = {word: load(word, pretrained) for word in progress.track(words, description="collecting filters")}
    _sources.refuse_twins(banks)
    FilterBank.concat(banks.values()).save(out)


def _build_paper54(sources: list[str], out: Path, pretrained: bool, files: Path | None, console: Any) -> None:
    from mkf.bank import paper54

    if len(sources) > 1 or not pretrained:
        raise ValueError("paper54 is a list of its own: it goes with no other source and with trained weights only")
    with _sources.bars(console) as bar:
        task = bar.add_task("paper54", total=len(paper54.ENTRIES))
        done = iter(range(len(paper54.ENTRIES)))
        result = paper54.build(
            out, files, lambda entry: bar.update(task, description=entry.name, completed=next(done), refresh=True)
        )
    for name, reason in result.missing.items():
        console.print(f"missing: {name}: {reason}", style="yellow", soft_wrap=True)
    built = len(paper54.ENTRIES) - len(result.missing)
    console.print(f"{built} of the list's {len(paper54.ENTRIES)} checkpoints are in the bank.")


def _print_models(folder: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from mkf.bank import FilterBank

    bank = FilterBank.open(folder)
    keys = ["model", "kernel_size", "licence"]
    models = bank.layers().group_by(keys, use_threads=False).aggregate([("layer", "count"), ("filters", "sum")])
    table = Table(title=Text(f"{len(bank)} filters in {folder}"))
    for heading in ("model", "kernel", "layers", "filters", "licence"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "licence")
    for row in models.to_pylist():
        k = row["kernel_size"]
        counts = str(row["layer_count"]), str(row["filters_sum"])
        table.add_row(*map(Text, (row["model"], f"{k}x{k}", *counts, row["licence"])))
    console = stdout()
    print_table(console, table)
    sources = bank.layers().group_by(["model", "source"], use_threads=False).aggregate([])
    for row in sources.to_pylist():  # a line each, uncut, as commands in them are there to be copied
        if row["source"]:
            console.print(f"{row['model']}: {row['source']}", soft_wrap=True)
