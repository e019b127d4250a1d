"""`mkf bench`: our operators against one read of memory and against their peers, as ratios in one run."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Time mkf against its peers; ratios in one run on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `bench` a group of commands."""


@app.command("fit")
def fit(
    filters: Annotated[int, typer.Option(min=1, help="Number of filters.")] = 1_000_000,
    keys: Annotated[list[int] | None, typer.Option(min=1, max=256, help="Number of keys; repeatable.")] = None,
    k: Annotated[int, typer.Option(help="Kernel size: 3, 5, 7, 9 or 11.")] = 7,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every candidate takes.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as torch has them if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Candidates whose name starts so; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time `affine_fit` relative to one read of the filters (`filters.sum()`), and the peers beside it."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from mkf.benchmarks import affine_fit, measure
    from mkf.cli._errors import user_errors

    console = Console()
    with user_errors():
        if dtype not in affine_fit.DTYPES:
            raise ValueError(f"--dtype {dtype}: use one of {', '.join(affine_fit.DTYPES)}")
        if k not in (3, 5, 7, 9, 11):
            raise ValueError(f"--k {k}: kernel sizes are 3, 5, 7, 9 and 11")
        if threads:
            torch.set_num_threads(threads)
        results = []
        for count in keys or [8, 50]:
            result = affine_fit.run(filters, count, k, dtype, rounds, only)
            table = Table(
                "", "ms", "times the read", "10 % to 90 %", "GB/s", title_justify="left",
                title=f"{filters:,} filters {k}x{k} {dtype}, {count} keys, {torch.get_num_threads()} threads",
            )  # fmt: skip
            size = filters * k * k * affine_fit.DTYPES[dtype].itemsize
            for row in result.rows:
                table.add_row(
                    row.name, f"{row.seconds * 1e3:.2f}", f"{row.ratio:.2f}", f"{row.low:.2f} to {row.high:.2f}",
                    f"{size / row.seconds / 1e9:.1f}",
                )  # fmt: skip
            console.print(table)
            results.append(result)
        if json is not None:
            measure.write(results, json)
        if figure is not None:
            from mkf.analysis import figures

            panels = {
                f"{filters:,} filters, {result.problem['keys']} keys": {row.name: row.ratio for row in result.rows}
                for result in results
            }
            figures.save(figures.bars(panels, "times one read of the filters"), figure)
