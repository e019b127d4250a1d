"""Banks on disk: a Parquet data set that other tools read without us, written atomically.

    BANK/_bank.json    the parts in the bank's order, each with its kernel size, model and size in bytes
    BANK/kernel_size=7/model=convnextv2_tiny/part-00000.parquet
    BANK/kernel_size=7/model=mcunet/part-00001.parquet

Each `kernel_size=` folder is one data set with one schema, since a fixed-size list column has one size. The partition
columns are in the files too, so that a reader that knows nothing of partitions sees them; a model's name is
percent-encoded in its folder's name. `_bank.json` is written last: a bank without it, or with a part that is missing or
has another size than written there, is incomplete. (Readers skip names that begin with an underscore.)
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mkf.bank.schema import COLUMNS, METADATA, schema
from mkf.bank.shard import Shard, rechunk

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "_bank.json"
FORMAT = "mkf filter bank"
VERSION = 1
ROW_GROUP = 32_768  # 6.4 MB of 7x7 filters: small enough to stream, large enough to read at full speed
MAX_FOLDER_NAME = 255  # bytes, on the common file systems
CONTENTS = (MANIFEST, "kernel_size=*", "kernel_size=*/model=*", "kernel_size=*/model=*/part-*.parquet")


def is_bank(path: Path) -> bool:
    """Whether the folder holds a bank's manifest."""
    return (path / MANIFEST).is_file()


def open_shards(path: str | os.PathLike[str]) -> tuple[Shard, ...]:
    """Open a bank without reading its filters: only `_bank.json` and the sizes of the parts are looked at."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    from pyarrow.fs import LocalFileSystem

    root = settle(path)
    parts = _read_manifest(root)
    filesystem = LocalFileSystem()
    # Arrow's pre-buffering holds a whole file in memory, and a model of any size is one file.
    parquet = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True, pre_buffer=False)
    )
    fragments: dict[int, list[ds.ParquetFileFragment]] = {}
    for part in parts:
        k, model = part["kernel_size"], part["model"]
        fragment = parquet.make_fragment(
            str(root / part["path"]),
            filesystem=filesystem,
            partition_expression=(pc.field("kernel_size") == k) & (pc.field("model") == model),
        )
        fragments.setdefault(k, []).append(fragment)
    return tuple(
        Shard(k, ds.FileSystemDataset(fragments[k], schema=schema(k), format=parquet, filesystem=filesystem))
        for k in sorted(fragments)
    )


def save(shards: Iterable[Shard], path: str | os.PathLike[str]) -> None:
    """Write a bank: into a hidden folder beside `path`, synchronised to the disk, then renamed.

    A bank that is there already is moved aside just before and deleted after. Should the process die between those two
    renames, the next `open_shards` or `save` moves it back.
    """
    root = settle(path)
    refuse_other_things(root)
    staging = root.with_name(f".{root.name}.saving-{uuid.uuid4().hex[:8]}")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        parts = [_write_part(staging, i, *part) for i, part in enumerate(_parts(shards))]
        _write_manifest(staging, parts)
        for folder in (*staging.rglob("*/"), staging):
            _synchronise(folder)
        _replace(root, staging)
    except OSError as error:
        raise OSError(f"cannot write the bank {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already where all went well


def settle(path: str | os.PathLike[str]) -> Path:
    """The bank's folder, resolved.

    The old bank is moved back if a process died while it was replaced, before the new one was in its place.
    """
    root = Path(path).expanduser().resolve()
    if not root.exists() and is_bank(_previous(root)):
        _previous(root).rename(root)
    return root


def _previous(root: Path) -> Path:
    return root.with_name(f".{root.name}.previous")


def _replace(root: Path, staging: Path) -> None:
    previous = _previous(root)
    shutil.rmtree(previous, ignore_errors=True)
    if root.exists():
        root.rename(previous)
    try:
        staging.rename(root)
    except BaseException:
        if previous.exists():
            previous.rename(root)
        raise
    _synchronise(root.parent)
    shutil.rmtree(previous, ignore_errors=True)


def refuse_other_things(root: Path) -> None:
    """Raise FileExistsError for a path where a bank must not be written, because something else is there."""
    if root.is_dir() and not is_bank(root) and any(root.iterdir()):
        raise FileExistsError(f"{root} holds other files and no bank; choose a new folder, nothing was written")
    if root.is_dir() and (strangers := _strangers(root)):
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise FileExistsError(
            f"{root} is a bank, but holds {strangers[0]}{more} too, which replacing it would delete: move that "
            "elsewhere or choose another folder, nothing was written"
        )
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"{root} is a file; a bank is a folder, nothing was written")


def _strangers(root: Path) -> list[Path]:
    """What is in a bank's folder and no part of a bank, relative to it; of a folder its contents are left out."""
    own = {path for pattern in CONTENTS for path in root.glob(pattern)}
    strangers = {path for path in root.rglob("*") if path not in own}
    return sorted(path.relative_to(root) for path in strangers if path.parent not in strangers)


def _parts(shards: Iterable[Shard]) -> Iterator[tuple[int, str, Iterator[pa.Table]]]:
    """Cut the rows where the model changes: kernel size, model, and tables of one row group each."""

    def runs() -> Iterator[tuple[tuple[int, str], pa.RecordBatch]]:
        import pyarrow.compute as pc

        for shard in shards:
            for batch in shard.read(COLUMNS, ROW_GROUP):
                encoded = pc.run_end_encode(batch["model"])
                start = 0
                for model, stop in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
                    yield (shard.kernel_size, model), batch.slice(start, stop - start)
                    start = stop

    for (k, model), run in groupby(runs(), key=lambda item: item[0]):
        yield k, model, rechunk((batch for _, batch in run), ROW_GROUP)


def _write_part(root: Path, index: int, k: int, model: str, tables: Iterator[pa.Table]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = f"model={quote(model, safe=' ')}"
    if len(folder) > MAX_FOLDER_NAME:
        raise ValueError(f"the model's name is too long for a folder ({len(folder)} bytes encoded): {model[:60]!r}...")
    path = Path(f"kernel_size={k}", folder, f"part-{index:05d}.parquet")
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    with (root / path).open("wb") as file:
        with pq.ParquetWriter(
            file,
            schema(k),
            compression="lz4",  # a tenth larger than with zstd, and read in five sixths of the time
            use_dictionary=[name for name in METADATA if schema(k).field(name).type == pa.string()],
            column_encoding={"filter.list.element": "BYTE_STREAM_SPLIT"},
            write_statistics=list(METADATA),
            write_page_checksum=True,
        ) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=ROW_GROUP)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"path": path.as_posix(), "kernel_size": k, "model": model, "bytes": size}


def _write_manifest(root: Path, parts: list[dict[str, Any]]) -> None:
    with (root / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "version": VERSION, "parts": parts}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(root: Path) -> list[dict[str, Any]]:
    if not root.exists():
        raise FileNotFoundError(f"there is no bank at {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, not a bank; a checkpoint is read by FilterBank.from_checkpoint")
    if not is_bank(root):
        checkpoint = next(iter(sorted(root.glob("*.safetensors"))), None)
        hint = f"; {checkpoint} is a checkpoint" if checkpoint else ""
        raise ValueError(f"{root} is not a complete bank: it has no {MANIFEST}, which is written last{hint}")
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        version = manifest["version"]
        parts = [
            {name: kind(part[name]) for name, kind in _PART_FIELDS.items()}
            for part in (manifest["parts"] if version == VERSION else [])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / MANIFEST} is damaged or not a bank's: {error}") from error
    if version != VERSION:
        raise ValueError(f"{root} has bank format {version}, this mkf reads {VERSION}; update mkf")
    for part in parts:
        file = root / part["path"]
        size = file.stat().st_size if file.is_file() else None
        if size != part["bytes"]:
            found = "is missing" if size is None else f"has {size} of {part['bytes']} bytes"
            raise ValueError(f"{root} is incomplete or damaged: {part['path']} {found}")
    return parts


_PART_FIELDS = {"path": str, "kernel_size": int, "model": str, "bytes": int}


def _synchronise(folder: Path) -> None:
    """Make the folder's entries durable, where the system can (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
