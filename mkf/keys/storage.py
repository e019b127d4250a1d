"""Key files: safetensors with metadata, and the text that the published keys come in."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mkf._files import replacing

FORMAT = "mkf.keys"
VERSION = 1


class Contents(NamedTuple):
    """What a key file holds: the arguments of a KeySet."""

    filters: NDArray[np.floating]
    names: Sequence[str] | None = None
    kinds: Sequence[str] | None = None
    provenance: str = ""
    licence: str = ""


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a key file, whose format its first bytes tell; errors name the file, and the line of a text."""
    path = Path(path)
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # eight bytes of length, then JSON
    if is_safetensors or path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with path.open(encoding="utf-8-sig") as lines:
            return _parse(path, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither a safetensors file nor a text of keys") from error


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.numpy import save

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "names": json.dumps(contents.names),
        "kinds": json.dumps(contents.kinds),
        "provenance": contents.provenance,
        "licence": contents.licence,
    }
    data = save({"filters": contents.filters}, metadata=metadata)
    with replacing(path) as file:
        file.write(data)


def _read_safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: a safetensors file that no KeySet wrote; make keys of one of its tensors with "
                    "KeySet(safetensors.torch.load_file(path)[name])"
                )
            if metadata["version"] != str(VERSION):
                raise ValueError(f"{path}: version {metadata['version']} of the key format; this mkf reads {VERSION}")
            return Contents(
                file.get_tensor("filters"),
                json.loads(metadata["names"]),
                json.loads(metadata["kinds"]),
                metadata["provenance"],
                metadata["licence"],
            )
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged metadata ({error})") from error


def _parse(path: Path, lines: Iterable[str]) -> Contents:
    """Read blocks of a line `Filter NAME:` and k rows of k numbers, with blank lines anywhere."""
    keys: dict[str, list[list[float]]] = {}
    started: dict[str, int] = {}  # the line of the header of each key
    k = 0
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if header := re.fullmatch(r"\s*Filter\s+(.+?)\s*:\s*", line):
            name = header[1]
            if name in keys:
                raise ValueError(f"{where}: a second 'Filter {name}:', the first is in line {started[name]}")
            keys[name], started[name] = [], number
        elif line.strip():
            if not keys:
                raise ValueError(f"{where}: expected 'Filter 1:' before the first row, found {line.strip()[:40]!r}")
            row = _row(line, where)
            k = k or len(row)
            if len(row) != k:
                raise ValueError(f"{where}: {len(row)} numbers, where the rows before have {k}")
            if len(keys[name]) == k:
                raise ValueError(
                    f"{where}: row {k + 1} of filter {name}, which should have {k} as its rows have {k} numbers"
                )
            keys[name].append(row)
    if not keys:
        raise ValueError(f"{path}: no keys in it; a text of keys has a line 'Filter 1:' before the rows of each")
    for name, rows in keys.items():
        if not rows or len(rows) < k:
            raise ValueError(f"{path}, line {started[name]}: filter {name} is cut short, after {len(rows)} rows")
    return Contents(np.array(list(keys.values())), list(keys), provenance=path.name)


def _row(line: str, where: str) -> list[float]:
    """The numbers of one line."""
    row = []
    for word in line.split():
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{where}: {word[:40]!r} is not a finite number")
        row.append(value)
    return row
