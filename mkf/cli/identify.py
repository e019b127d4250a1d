"""`mkf identify`: what filters are, as members of the discrete Gaussian family."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stderr, stdout
from mkf.cli._errors import user_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from mkf.analysis import Identification
    from mkf.bank import FilterBank
    from mkf.keys import KeySet

_SUFFIXES = (".csv", ".json")
_NOISE = 1000  # filters of white noise, always the same ones, as the control
_COLUMNS = (
    "kind", "name", "sign", "scale_x", "scale_y", "alpha", "amplitude", "offset", "residual", "moment_scale_x",
    "moment_scale_y",
)  # fmt: skip


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar=f"{_sources.KEYS}|{_sources.METAVAR}...",
            help=f"Keys (paper8, analytic:B, a key file), or filters: {_sources.WORDS}.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.csv|FILE.json", help="Also write one row per filter to this file.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Fetch the trained weights of timm models.")] = True,
) -> None:
    """Name every filter: Gaussian, one-sided or central difference, second difference, difference of Gaussians.

    Keys are listed one by one with their scales in pixels; of a bank the share of each kind is told, with the medians
    of its filters' scales and residuals, and below them what white noise of that size gets, which has names too: near
    its residuals a name means nothing. In 3x3 a Gaussian, a second difference and a difference of Gaussians can be
    the same filter, and is then called by the first of these names; a central difference has no scale along its axis.
    A scale that is marked >= is the largest that is looked for.
    """
    with user_errors():
        import pyarrow as pa

        from mkf.analysis import identify
        from mkf.keys import KeySet

        if out is not None and out.suffix not in _SUFFIXES:
            raise ValueError(f"--out {out}: the name must end in {' or '.join(_SUFFIXES)}")
        if out is not None:
            _outputs.file(out, "--out")
            _outputs.not_an_input(out, "--out", *sources)
        console, err = stdout(), stderr()
        rows: list[pa.Table] = []
        for source in dict.fromkeys(sources):
            tables: list[Table] = []  # printed once the bars are gone, which stand on the same terminal
            with _sources.bars(err) as progress:
                task = progress.add_task(f"reading {source}", total=None)

                def show(done: int, total: int, progress: Progress = progress, task: TaskID = task) -> None:
                    progress.update(task, completed=done, total=total)

                filters = _open(source, pretrained)
                if isinstance(filters, KeySet):
                    found = identify(filters)
                    tables.append(_key_table(source, filters, found))
                    rows.append(_rows(found, {"source": [source] * len(filters), "key": filters.names}))
                elif not len(filters):
                    raise ValueError(f"{source} holds no filters")
                else:
                    for k in filters.kernel_sizes:
                        of_size = filters.select(k=k)
                        progress.update(task, description=f"{source} {k}x{k}")
                        found = identify(of_size, progress=show)
                        tables.append(_bank_table(f"{source}: {len(of_size):,} filters {k}x{k}", found, k))
                        if out is not None:
                            metadata = of_size.metadata
                            where = {name: metadata[name] for name in ("model", "layer", "channel", "kernel_size")}
                            rows.append(_rows(found, {"source": pa.repeat(source, len(found)), **where}))
            for one in tables:
                print_table(console, one)
                console.print()
        if out is not None:
            table = pa.concat_tables(rows, promote_options="default")
            _write(out, table)
            console.print(f"Written to {out}: {len(table):,} rows", soft_wrap=True)


def _open(source: str, pretrained: bool) -> KeySet | FilterBank:
    """Keys where the word or the file's content is keys, else a bank; `mkf.bank.load` has the rule for that."""
    from mkf.bank import load
    from mkf.keys import parse

    if source == "paper8" or source.startswith("analytic:"):
        return parse(source)
    if Path(source).expanduser().is_file():
        try:
            return parse(str(Path(source).expanduser()))
        except ValueError:
            pass  # no keys: a checkpoint, or nothing, and then that error says more
    return load(source, pretrained)


def _key_table(source: str, keys: KeySet, found: Identification) -> Table:
    table = _table(f"{source}: {len(keys)} keys {keys.kernel_size}x{keys.kernel_size}")
    table.add_column("key")
    table.add_column("kind")
    for heading in ("s_x", "s_y", "alpha", "resid", "s_x by moments", "s_y"):
        table.add_column(heading, justify="right")
    scales = found.scale_x, found.scale_y, found.alpha, found.residual, found.moment_scale_x, found.moment_scale_y
    for name, kind, s_x, s_y, *numbers in zip(keys.names, found.name, *scales, strict=True):
        table.add_row(name, kind, *(_scale(s, keys.kernel_size) for s in (s_x, s_y)), *map(_number, numbers))
    return table


def _bank_table(title: str, found: Identification, k: int) -> Table:
    """One row per kind that occurs, the most frequent first, and one of noise; quartiles are of the row's filters."""
    import numpy as np

    table = _table(title)
    table.add_column("kind")
    for heading in ("filters", "%", "+ %", "s_x", "s_y", "resid 25%", "50%", "75%"):
        table.add_column(heading, justify="right")
    kinds, counts = np.unique(found.kind, return_counts=True)
    for kind, count in sorted(zip(kinds, counts, strict=True), key=lambda pair: -pair[1]):
        of_kind = found.kind == kind
        quartiles = np.quantile(found.residual[of_kind], [0.25, 0.5, 0.75])
        medians = (np.median(x[of_kind]) for x in (found.scale_x, found.scale_y))
        positive = f"{(found.sign[of_kind] > 0).mean():.0%}"
        table.add_row(
            kind, f"{count:,}", f"{100 * count / len(found):.1f}", positive.rstrip("%"),
            *(_scale(s, k) for s in medians), *map(_number, quartiles),
        )  # fmt: skip
    table.add_section()
    table.add_row("white noise", f"{_NOISE:,}", "", "", "", "", *map(_number, _quartiles_of_noise(k)))
    return table


@cache
def _quartiles_of_noise(k: int) -> Any:
    import numpy as np
    import torch

    from mkf.analysis import identify

    noise = torch.randn(_NOISE, k, k, generator=torch.Generator().manual_seed(0))
    return np.quantile(identify(noise).residual, [0.25, 0.5, 0.75])


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = Text(title, style="bold")  # as it is: no markup in a file's name
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)


def _scale(value: float, k: int) -> str:
    """A scale, marked where it is the largest that is looked for: the filter's own may be larger."""
    from mkf.keys.family import max_scale

    return f">={max_scale(k):.3f}" if value >= max_scale(k) - 1e-6 else _number(value)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _rows(found: Identification, where: dict[str, Any]) -> pa.Table:
    """One row per filter: where it is from and what it is, null for what does not exist."""
    import pyarrow as pa

    return pa.table(where | {name: pa.array(getattr(found, name), from_pandas=True) for name in _COLUMNS})


def _write(path: Path, rows: pa.Table) -> None:
    from pyarrow import csv

    from mkf._files import replacing

    if path.suffix == ".csv":
        with replacing(path) as file:
            csv.write_csv(rows, file)
        return
    records = rows.to_pylist()
    for record in records:
        if record["alpha"] == math.inf:  # the one number that JSON lacks
            record["alpha"] = "inf"
    text = json.dumps(records, indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())
