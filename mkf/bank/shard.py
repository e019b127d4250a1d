"""Shard: filters of one kernel size, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mkf.bank.schema import METADATA, schema

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

FILTERED = ("model", "layer", "stride")  # the columns that conditions are on
_BUFFER = 1 << 16  # bytes of a column that are read from the file at a time


@dataclass(frozen=True)
class Shard:
    """Rows of one kernel size: an Arrow table, or a Parquet data set of which nothing has been read yet.

    Attributes:
        kernel_size: k.
        data: The rows, with the columns of `mkf.bank.schema`.
        condition: What a data set's rows must satisfy; Arrow applies it while reading, and skips the files and row
            groups that cannot hold a match. None for a table, which is filtered at once.
    """

    kernel_size: int
    data: pa.Table | ds.Dataset
    condition: pc.Expression | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the rows are an Arrow table."""
        import pyarrow as pa

        return isinstance(self.data, pa.Table)

    @cached_property
    def rows(self) -> int:
        """The number of rows; of a data set it is read from the files' footers where no condition forbids it."""
        if self.in_memory:
            return int(self.data.num_rows)
        with self._named_errors():
            return int(self.data.count_rows(filter=self.condition))

    def where(self, conditions: Mapping[str, Sequence[str | int]]) -> Shard:
        """The rows whose columns hold one of the values given for them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        shard = self
        for column, values in conditions.items():
            allowed = pa.array(values, schema(self.kernel_size).field(column).type)
            if shard.in_memory:
                shard = replace(shard, data=shard.data.filter(pc.is_in(shard.data[column], value_set=allowed)))
            else:
                condition = pc.field(column).isin(allowed)
                shard = replace(shard, condition=condition if shard.condition is None else shard.condition & condition)
        return shard

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """The columns of metadata that the rows have."""
        return tuple(name for name in METADATA if name in self.data.schema.names)

    def read(self, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, at most `rows` at a time; of a data set only a few batches are held in memory."""
        if self.in_memory:
            yield from self.data.select(columns).to_batches(max_chunksize=rows)
            return
        with self._named_errors():
            fragments = self.data.get_fragments(filter=self.condition)
            yield from self._as_counted(
                batch for fragment in fragments for batch in self._read_file(fragment, columns, rows)
            )

    def _as_counted(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Pass the batches on if they have as many rows as `rows` told, where somebody asked and may rely on it."""
        counted, read = vars(self).get("rows"), 0
        for batch in batches:
            read += batch.num_rows
            if counted is not None and read > counted:
                break
            yield batch
        if counted is not None and read != counted:
            raise OSError(f"it had {counted} rows, now it has {'more' if read > counted else read}")

    def _read_file(
        self, fragment: ds.ParquetFileFragment, columns: Sequence[str], rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Read one file as a stream: Arrow's own scanner of data sets holds some row groups of every file, decoded."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        condition, needed = self.condition, list(columns)
        if condition is not None:
            fragment = fragment.subset(filter=condition, schema=self.data.schema)  # row groups that may hold a match
            needed = list(dict.fromkeys([*columns, *FILTERED]))
        wanted = pa.schema([self.data.schema.field(name) for name in needed])
        with pq.ParquetFile(
            fragment.path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
        ) as file:
            groups = [group.id for group in fragment.row_groups]
            for batch in file.iter_batches(rows, row_groups=groups, columns=needed, use_threads=False):
                batch = batch.select(needed).cast(wanted)  # mkf once wrote numbers that could have been null
                yield (batch if condition is None else batch.filter(condition)).select(list(columns))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            folder = Path(self.data.files[0]).parents[2]
            raise OSError(f"the bank {folder} is damaged, or was replaced after it was opened: {error}") from error


def rechunk(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Regroup batches into tables of exactly `rows` rows, the last one shorter, without copying."""
    import pyarrow as pa

    pending: list[pa.RecordBatch] = []
    missing = rows
    for batch in batches:
        while batch.num_rows >= missing:
            yield pa.Table.from_batches([*pending, batch.slice(0, missing)])
            batch, pending, missing = batch.slice(missing), [], rows
        if batch.num_rows:
            pending.append(batch)
            missing -= batch.num_rows
    if pending:
        yield pa.Table.from_batches(pending)
