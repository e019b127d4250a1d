"""Fit more filters than memory holds, into a Parquet file beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mkf._files import replacing
from mkf.bank.schema import metadata_schema
from mkf.bank.shard import rechunk
from mkf.ops import stream
from mkf.ops.affine_fit import AffineFit, affine_fit
from mkf.ops.fit_statistics import FitStatistics, FitTally, refuse_mixed_sizes

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("model", "layer", "channel")
"""What tells filters of one kernel size apart, to join a fit with its bank by."""

FORMAT = "mkf.fit"
VERSION = 1
ROW_GROUP = 1 << 17
MEMORY = 256 << 20
MEMORY_FIXED = 128 << 20
"""What reading and writing Parquet takes, however small the pieces: row groups and Arrow's own, rounded up."""


def write_fit(
    filters: Any,
    keys: Any,
    out: str | os.PathLike[str],
    *,
    method: Literal["one", "combination"] = "one",
    sign: Literal["any", "positive"] = "any",
    topk: int | None = None,
    backend: str | None = None,
    memory: int = MEMORY,
    progress: stream.Progress | None = None,
) -> FitStatistics:
    """Fit filters as `affine_fit` does and write the fit to a Parquet file, a piece at a time.

    The file has a row a filter, in their order: index (int32), scale, shift, residual (float32), as in `AffineFit`,
    fixed-size lists of m where that has (N, m); for a bank also model, layer and channel, to join them by. Its schema's
    metadata hold, under `mkf.fit`, what was fitted to, as JSON: format, version, method, sign, topk, and the keys with
    names, kinds, provenance, licence and filters [K][k][k].

    A bank on disk or a memory-mapped file is read one piece ahead while the kernels run. The file appears under its
    name when it is complete, and one that was there is replaced then: a run that fails or is killed leaves the old one.
    A killed run can leave a hidden file `.NAME.writing-...` beside it, which may be deleted.

    Args:
        filters: What `mkf.fit_statistics` takes: a `FilterBank` of one kernel size, an array (also memory-mapped), or a
            tensor.
        keys: A `KeySet`, or an array (K, k, k).
        out: The file; its folder is made if it is missing.
        method: As `affine_fit` has it.
        sign: As `affine_fit` has it.
        topk: As `affine_fit` has it.
        backend: As `affine_fit` has it.
        memory: Bytes that this may take, besides `filters` themselves if they are in memory: pieces are made smaller to
            stay below.
        progress: Called as `progress(done, N)` after each piece.

    Returns:
        The statistics of the fits written (of the best key with `topk`), in a single group. Combinations are counted
        as fits by one key of positive scale.

    Raises:
        ValueError: What `affine_fit` refuses, a bank of several kernel sizes, or too little memory.
        BackendError: The implementation asked for cannot run there.
        OSError: The file cannot be written, or is a folder; the bank cannot be read.
    """
    import pyarrow.parquet as pq

    refuse_mixed_sizes(filters)
    lists = _lists(method, topk, len(keys))
    longest = max(lists.values(), default=1)
    rows = _rows(filters, memory, longest)
    row_group = max(1, ROW_GROUP // longest)
    total = len(filters)
    is_bank = hasattr(filters, "batches")
    device = filters.device if isinstance(filters, torch.Tensor) else None
    tally = FitTally(1 if method == "combination" else len(keys), device=device)

    def fits() -> Iterator[pa.RecordBatch]:
        done = 0
        for piece in pieces:
            fit = affine_fit(piece, keys, method=method, sign=sign, topk=topk, backend=backend)
            tally.add(_counted(fit, method))
            yield _batch(fit, piece.metadata if is_bank else None, schema)
            done += len(piece)
            if progress is not None:
                progress(done, total)

    schema = _schema(is_bank, lists).with_metadata({FORMAT: json.dumps(_description(keys, method, sign, topk))})
    leaves = {name: f"{name}.list.element" if name in lists else name for name in AffineFit._fields}
    strings = ["model", "layer"] if is_bank else []
    path = Path(out).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a fit is written to a file, nothing was written")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    with (
        closing(stream.pieces(filters, rows, COLUMNS)) as pieces,
        torch.no_grad(),
        replacing(path) as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=[leaves.pop("index"), *strings],
            column_encoding=dict.fromkeys(leaves.values(), "BYTE_STREAM_SPLIT"),
            write_page_checksum=True,
        ) as writer,
    ):
        for table in rechunk(fits(), row_group):
            writer.write_table(table, row_group_size=row_group)
    return tally.result()


def _lists(method: str, topk: int | None, keys: int) -> dict[str, int]:
    """The outputs that are lists, and their lengths."""
    if method == "combination":
        return dict.fromkeys(("index", "scale"), topk or keys)
    return {} if topk is None else dict.fromkeys(AffineFit._fields, topk)


def _rows(filters: Any, memory: int, longest: int) -> int:
    """Filters of a piece of which four (fitted, read ahead, being decoded, and what comes of it) stay in `memory`."""
    k = max(getattr(filters, "kernel_sizes", ()), default=11)
    # The widest numbers; a filter's row of metadata has less than 200 bytes, and of each key four numbers of 4 bytes.
    one = 4 * (k * k * 8 + 200 + 16 * longest)
    if memory < MEMORY_FIXED + one:
        raise ValueError(f"memory={memory}: a fit takes up to {(MEMORY_FIXED >> 20) + 1} MiB, whatever is fitted")
    return min(stream.ROWS_READ, (memory - MEMORY_FIXED) // one)


def _counted(fit: AffineFit, method: str) -> AffineFit:
    """What the statistics are of."""
    if method == "combination":
        index, scale, shift, residual = map(torch.as_tensor, fit)
        return AffineFit(index[:, 0].clamp(max=0), scale.abs().amax(1), shift, residual)
    return fit if fit.index.ndim == 1 else AffineFit(*(x[:, 0] for x in fit))


def _schema(is_bank: bool, lists: dict[str, int]) -> pa.Schema:
    import pyarrow as pa

    fit = []
    for name in AffineFit._fields:
        kind = pa.int32() if name == "index" else pa.float32()
        fit.append(pa.field(name, pa.list_(kind, lists[name]) if name in lists else kind, nullable=False))
    metadata = [field for field in metadata_schema() if field.name in COLUMNS] if is_bank else []
    return pa.schema([*fit, *metadata])


def _batch(fit: AffineFit, metadata: pa.Table | None, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns = []
    for values in (torch.as_tensor(x).numpy(force=True) for x in fit):
        flat = pa.array(values.reshape(-1))
        columns.append(flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    if metadata is not None:
        columns += [metadata[name].combine_chunks() for name in COLUMNS]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _description(keys: Any, method: str, sign: str, topk: int | None) -> dict[str, Any]:
    """What was fitted to: numbers as float32 holds them, names as far as the keys have any."""
    is_set = hasattr(keys, "filters")  # a tensor may have names too, those of its dimensions
    known = {name: getattr(keys, name) if is_set else None for name in ("names", "kinds", "provenance", "licence")}
    numbers = torch.as_tensor(getattr(keys, "filters", keys)).float()
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": method,
        "sign": sign,
        "topk": topk,
        "keys": {**known, "filters": numbers.tolist()},
    }
