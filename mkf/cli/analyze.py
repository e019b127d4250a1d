"""`mkf analyze`: which keys the filters of trained networks are, as tables, JSON and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stderr, stdout
from mkf.cli._errors import user_errors


def command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=_sources.METAVAR, help=f"{_sources.HELP} Without any, the embedded bank.", show_default=False
        ),
    ] = None,
    keys: Annotated[str, typer.Option(metavar=_sources.KEYS, help=_sources.KEYS_HELP)] = "paper8",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write analysis.json, CSV files and figures into this folder."),
    ] = None,
    layers: Annotated[bool, typer.Option(help="Print a table of each model's layers too.")] = True,
    pretrained: Annotated[bool, typer.Option(help="Fetch the trained weights of timm models.")] = True,
) -> None:
    """Tell, per model and layer, how many filters go to each key and how well they fit, beside random keys.

    A source is the first of these that it can be:
    - the word "embedded": the bank that comes with mkf,
    - a folder: a saved bank,
    - a file: a checkpoint,
    - anything that does not look like a path: a model of timm.
    """
    with user_errors():
        from mkf.analysis import analyze, report
        from mkf.keys import parse

        if out is not None:
            _outputs.folder(out, "--out")
        key_set = parse(keys)
        with _sources.bars(stderr()) as progress:
            bank = _sources.read(sources, pretrained, key_set.kernel_size, progress)
            fitting = progress.add_task("fitting filters", total=None)
            analysis = analyze(
                bank, key_set, progress=lambda done, total: progress.update(fitting, completed=done, total=total)
            )
        console = stdout()
        if layers:
            for table in report.layer_tables(analysis):
                print_table(console, table)
                console.print()
        print_table(console, report.model_table(analysis))
        console.print()
        for line in report.notes(analysis):
            console.print(line, soft_wrap=not console.is_terminal)
        if controls := len(analysis.models) - len(analysis.trained.models):
            console.print(
                f"Untrained networks, {controls} here, are part of all sums; mkf report leaves them out of its."
            )
        if out is not None:
            written = report.write(analysis, out)
            try:
                written += report.write_figures(analysis, out)
            except ImportError as error:
                typer.secho(f"no figures: {error}", fg=typer.colors.YELLOW, err=True)
            console.print(f"Written to {out}: " + ", ".join(path.name for path in written), soft_wrap=True)
