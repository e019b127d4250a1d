"""`mkf fit`: the scale, shift and residual of every filter of a bank, as a Parquet file."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stderr, stdout
from mkf.cli._errors import user_errors

if TYPE_CHECKING:
    from mkf.keys import KeySet
    from mkf.ops.fit_statistics import FitStatistics

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar=_sources.METAVAR,
            help=f"Filters: {_sources.WORDS}; or an array (N, k, k), FILE.npy, which is read as it is fitted.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The Parquet file to write; it is replaced once the new one is complete.")],
    keys: Annotated[str, typer.Option(metavar=_sources.KEYS, help=_sources.KEYS_HELP)] = "paper8",
    method: Annotated[
        str, typer.Option(help="one key a filter, or a combination: least squares on several keys at once.")
    ] = "one",
    topk: Annotated[
        int | None,
        typer.Option(min=1, help="Write so many keys of each filter, best first, as lists; combine so many, not all."),
    ] = None,
    sign: Annotated[str, typer.Option(help="any, or positive for scales of at least 0.")] = "any",
    backend: Annotated[str | None, typer.Option(help="Implementation, as `mkf env` lists them.")] = None,
    memory: Annotated[str, typer.Option(help="What a fit may take, as 2GiB or 500MB.")] = "256MiB",
    pretrained: Annotated[bool, typer.Option(help="Fetch the trained weights of timm models.")] = True,
) -> None:
    """Fit every filter to the keys: write index, scale, shift and residual, print how well each key does.

    The index written counts the keys from 0, the table printed numbers them from 1.

    Banks and arrays may be larger than memory. Of a bank of several kernel sizes the filters of the keys' size are
    fitted.
    """
    with user_errors():
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from mkf.bank.fit import write_fit
        from mkf.keys import parse

        _outputs.named(out, "--out", ".parquet")
        _outputs.folder(out.expanduser().parent, "--out")
        err = stderr()
        bound = _bytes(memory)
        key_set = parse(keys)
        filters = _of_size(_open(source, pretrained), key_set.kernel_size, source)
        columns = TextColumn("fitting"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("fitting", total=None, speed="")
            start = time.perf_counter()

            def show(done: int, total: int) -> None:
                speed = f"{done / (time.perf_counter() - start) / 1e6:.2f} M filters/s"
                progress.update(task, completed=done, total=total, speed=speed)

            statistics = write_fit(
                filters, key_set, out,
                method=method, sign=sign, topk=topk,  # type: ignore[arg-type]
                backend=backend, memory=bound, progress=show,
            )  # fmt: skip
            seconds = time.perf_counter() - start
        console = stdout()
        if method == "combination":
            mean, std, median = (x.item() for x in (statistics.mean, statistics.std, statistics.quantile(0.5)))
            console.print(
                f"combinations of {topk or len(key_set)} keys: residual {mean:.3f}, std {std:.3f}, median {median:.3f}"
            )
        else:
            print_table(console, _table(statistics, key_set))
        count, k = int(statistics.filters.sum()), key_set.kernel_size
        apart = f"{statistics.dead[0]} constant and {statistics.not_finite[0]} not finite, counted apart"
        itemsize = getattr(filters, "itemsize", 4)  # of an array; a bank's are float32
        gigabytes = count * k * k * itemsize / 1e9
        console.print(f"{count:,} filters {k}x{k} ({apart})", soft_wrap=True)
        speed = f"{count / seconds / 1e6:.2f} M filters/s, {gigabytes / seconds:.2f} GB/s"
        console.print(f"{seconds:.2f} s: {speed}. Written to {out}", soft_wrap=True)


def _open(source: str, pretrained: bool) -> Any:
    """The filters that a command-line word names; `mkf.bank.load` has the rule, arrays apart."""
    import numpy as np

    from mkf.bank import load

    if not source.endswith(".npy"):
        return load(source, pretrained)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no complete array of numbers: {error}") from error


def _of_size(filters: Any, k: int, source: str) -> Any:
    """A bank's filters of k x k, telling how many are left out; an array as it is."""
    sizes = getattr(filters, "kernel_sizes", ())
    others = [size for size in sizes if size != k]
    if not others:
        return filters
    if k not in sizes:
        found = ", ".join(f"{size}x{size}" for size in others)
        raise ValueError(
            f"the keys are {k}x{k} but {source} holds only filters of {found}: choose keys of that size, "
            "as analytic:B:5 are 5x5"
        )
    left_out = ", ".join(f"{len(filters.select(k=size)):,} of {size}x{size}" for size in others)
    warnings.warn(f"left out {left_out}: the keys are {k}x{k}", stacklevel=2)
    return filters.select(k=k)


def _bytes(text: str) -> int:
    """A number of bytes as people write it: 2GiB, 500 MB, 1048576."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|k|M|G|T|Ki|Mi|Gi|Ti)B?\s*", text)
    if not match:
        raise ValueError(f"--memory {text}: give a number of bytes, such as 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _table(statistics: FitStatistics, keys: KeySet) -> Any:
    from rich.table import Table

    from mkf.analysis.statistics import key_labels

    table = Table("key", "", "filters", "share", "scale > 0", "mean", "std", "median", title="residual by best key")
    for column in table.columns[2:]:
        column.justify = "right"
    median = statistics.quantile(0.5)[0]
    for j, label in enumerate(key_labels(keys)):
        count = statistics.count[0, j]
        shares = (statistics.share[0, j], statistics.positive_share[0, j])
        residuals = (statistics.mean[0, j], statistics.std[0, j], median[j])
        cells = [f"{x:.1%}" for x in shares] + [f"{x:.3f}" for x in residuals] if count else ["-"] * 5
        table.add_row(str(j + 1), label, f"{count:,}", *cells)
    return table
