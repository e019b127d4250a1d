"""The command line: `mkf COMMAND`, one file per command.

Every command imports what it needs when it runs, so `mkf --help` stays quick.
"""

from typing import Annotated

import typer

from mkf.cli import analyze, bank, bench, convert, env, fit, identify, report, reproduce, search, train

app = typer.Typer(
    name="mkf",
    help="Master key filters: collect depthwise filters and fit them to the eight keys they are copies of.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs fill the width; otherwise they break where the source does
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import mkf

        typer.echo(f"mkf {mkf.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.command("env")(env.command)
app.add_typer(bank.app, name="bank")
app.command("analyze")(analyze.command)
app.command("fit")(fit.command)
app.command("identify")(identify.command)
app.command("search")(search.command)
app.command("convert")(convert.command)
app.command("report")(report.command)
app.command("train")(train.command)
app.add_typer(reproduce.app, name="reproduce")
app.add_typer(bench.app, name="bench")
