"""Filters streamed from disk: speed beside that of reading alone, and memory beside that of a thousand filters.

    python -m mkf.benchmarks.stream --filters 20000000

Everything runs in processes of its own, each once, and the system's cache of the files is dropped before. To make the
filters takes longer than to measure: with `--folder` they stay, and `--make-only` makes them beforehand.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mkf.bank import FilterBank, Layer
from mkf.bank.fit import write_fit
from mkf.keys import paper8
from mkf.ops import affine_fit, stream
from mkf.ops.fit_statistics import fit_statistics

PART = 1_000_000
K = 7


@dataclass
class Run:
    """One pass over the filters: its time, and the memory it took beyond what it took for a thousand filters."""

    seconds: float
    processor_seconds: float
    extra_bytes: int


def make_bank(folder: Path, count: int) -> None:
    """Save banks of white noise, at most a million filters of one model each."""
    for part, rows in enumerate(_parts(count)):
        filters = torch.randn(rows, K, K, generator=torch.Generator().manual_seed(part))
        layers = [Layer(f"blocks.{i}.conv_dw", layer) for i, layer in enumerate(filters.chunk(10))]
        FilterBank.from_layers(layers, f"model_{part:04d}", "white noise").save(folder / f"{part:04d}")


def make_array(file: Path, count: int) -> None:
    """Save the same filters as one array."""
    array = np.lib.format.open_memmap(file, "w+", np.float32, (count, K, K))
    for part, rows in enumerate(_parts(count)):
        array[part * PART :][:rows] = torch.randn(rows, K, K, generator=torch.Generator().manual_seed(part)).numpy()
    array.flush()


def read_files(path: Path) -> None:
    """Read the files' bytes, as `cat` does."""
    buffer = bytearray(1 << 20)
    for name in _files(path):
        with name.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_filters(path: Path) -> None:
    """Read the filters, without a fit."""
    for piece in stream.pieces(_open(path)):
        getattr(piece, "filters", piece)


def fit_to_statistics(path: Path) -> None:
    """`mkf.fit_statistics`."""
    fit_statistics(_open(path), paper8())


def fit_to_file(path: Path) -> None:
    """`mkf fit`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write_fit(_open(path), paper8(), Path(folder, "fit.parquet"))


PASSES: dict[str, Callable[[Path], None]] = {
    "read the files": read_files,
    "read the filters": read_filters,
    "fit_statistics": fit_to_statistics,
    "write_fit": fit_to_file,
}


def measure(what: str, path: Path, small: Path) -> Run:
    """Run a pass once, after one over a thousand filters; for a process of its own."""
    affine_fit(torch.randn(1000, K, K), paper8())
    PASSES[what](small)
    before = _memory("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    PASSES[what](path)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor
    return Run(seconds, processor_seconds, _memory("VmHWM") - before)


def main(
    filters: Annotated[int, typer.Option(min=1000, help="Number of 7x7 filters.")] = 20_000_000,
    folder: Annotated[
        Path | None, typer.Option(help="Where to put them, some GB, and to find them the next time; else they go.")
    ] = None,
    make_only: Annotated[bool, typer.Option("--make-only", help="Put them there and measure nothing.")] = False,
) -> None:
    """Fit filters on disk, as a bank and as an array, beside reading them alone."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        for name, make in (("bank", make_bank), ("array.npy", make_array)):
            path, small = (_made(make, Path(place, f"{count}_{name}"), count) for count in (filters, 1000))
            if make_only:
                continue
            size = sum(file.stat().st_size for file in _files(path))
            table = Table(
                "", "s", "M filters/s", "GB/s of file", "of the read", "decoded", "CPU ns a filter", "extra MB",
                title=f"{name}: {filters:,} filters, {size / 1e9:.2f} GB", title_justify="left",
            )  # fmt: skip
            runs: dict[str, Run] = {}
            for what in PASSES:
                _forget(path)
                run = runs[what] = _apart(measure, what, path, small)
                fractions = [
                    runs[of].seconds / run.seconds for of in ("read the files", "read the filters") if of in runs
                ]
                table.add_row(
                    what, f"{run.seconds:.1f}", f"{filters / run.seconds / 1e6:.2f}", f"{size / run.seconds / 1e9:.2f}",
                    *[f"{fraction:.2f}" for fraction in fractions], *[""] * (2 - len(fractions)),
                    f"{run.processor_seconds / filters * 1e9:.0f}", f"{run.extra_bytes / 1e6:.0f}",
                )  # fmt: skip
            console.print(table)
    load = os.getloadavg()[0]
    console.print(f"{os.cpu_count()} cores, load {load:.1f}, {torch.get_num_threads()} threads", highlight=False)


def _made(make: Callable[[Path, int], None], path: Path, count: int) -> Path:
    """The filters at `path`, made now if they are not there."""
    if not path.exists():
        unfinished = path.with_name(f"unfinished_{path.name}")
        _apart(make, unfinished, count)
        unfinished.rename(path)
    return path


def _parts(count: int) -> list[int]:
    return [min(PART, count - start) for start in range(0, count, PART)]


def _open(path: Path) -> Any:
    if path.is_dir():
        return FilterBank.concat(FilterBank.open(part) for part in sorted(path.iterdir()))
    return np.load(path, mmap_mode="r")


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]


def _forget(path: Path) -> None:
    """Drop the files from the system's cache, so that they are read from the disk."""
    for file in _files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _memory(what: str) -> int:
    """Bytes of memory of this process now (VmRSS) or at most so far (VmHWM); on Linux.

    The resource module's peak would not do: in a new process it starts at what the parent had.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


if __name__ == "__main__":
    typer.run(main)
