"""Filters a piece at a time, so that memory does not grow with their number."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Progress = Callable[[int, int], None]

ROWS = 1 << 16
"""Filters of a piece in memory: its fit stays in cache, and what a call costs is little beside it."""

ROWS_READ = 1 << 13
"""Filters of a piece that is read from disk, of which a few are in memory at a time."""

ROWS_ACCELERATOR = 1 << 20
"""Filters of a piece on a GPU, which takes that many to be busy."""


def pieces(filters: Any, rows: int | None = None, metadata: Sequence[str] = ()) -> Generator[Any]:
    """Yield filters in order and in pieces, as `affine_fit` takes them.

    A tensor or an array in memory gives views. A bank gives banks in memory, and a memory-mapped file copies: both are
    read `ahead`, and pages of a file that were copied leave the process again. No filters at all are one empty piece,
    so that a fit can say what it thinks of it.

    Args:
        filters: A tensor or numpy array whose first dimension counts filters, or an object with
            `batches(rows, metadata)` that yields such objects, as a `FilterBank` has.
        rows: Filters of a piece at most; if None, as many as suit where the filters are.
        metadata: The columns of metadata that a bank's pieces shall have.
    """
    if len(filters) == 0:
        yield filters
    elif hasattr(filters, "batches"):
        yield from ahead(filters.batches(rows or ROWS_READ, metadata))
    elif isinstance(filters, np.memmap):
        yield from ahead(map(_read, _views(filters, rows or ROWS_READ)))
    else:
        on_cpu = not isinstance(filters, Tensor) or filters.device.type == "cpu"
        yield from _views(filters, rows or (ROWS if on_cpu else ROWS_ACCELERATOR))


def ahead(items: Iterable[T]) -> Generator[T]:
    """Yield the items in order while a thread gets the next one; what goes wrong there is raised here.

    Until the end (or until it is closed: use `contextlib.closing`) torch has one thread less in the thread that
    iterates. Reading takes longer than fitting, and waiting threads of OpenMP would spin on the reader's core.
    """
    iterator, end = iter(items), object()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(next, iterator, end)
            while (item := upcoming.result()) is not end:
                upcoming = reader.submit(next, iterator, end)
                yield item  # type: ignore[misc]  # mypy does not see that it is no longer `end`
    finally:
        torch.set_num_threads(threads)


def _views(filters: Any, rows: int) -> Iterator[Any]:
    return (filters[start : start + rows] for start in range(0, len(filters), rows))


def _read(view: np.memmap[Any, Any]) -> np.ndarray[Any, Any]:
    """Copy a part of a mapped file, then let its pages go: they would count as memory of this process until the end."""
    piece = np.array(view, order="C")
    mapping = view._mmap  # type: ignore[attr-defined]
    if view.mode == "r" and view.size and hasattr(mapping, "madvise"):  # changes in memory ("c") would be lost
        from mmap import MADV_DONTNEED, PAGESIZE

        start, stop = np.lib.array_utils.byte_bounds(view)
        origin = np.frombuffer(mapping, np.uint8).ctypes.data
        first = (start - origin) // PAGESIZE * PAGESIZE
        mapping.madvise(MADV_DONTNEED, first, stop - origin - first)
    return piece
