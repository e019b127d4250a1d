"""Where commands write: refused before the work, not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path


def file(path: Path, option: str) -> None:
    """Check that a file can be written in its folder, by writing one that vanishes.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The path is a folder, or in a bank.
        OSError: The folder cannot be written.
    """
    _outside_banks(path, option)
    parent = path.absolute().parent
    _no_folder(path, option)
    if not parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {parent}")
    _probe(parent, f"{option} {path}")


def named(path: Path, option: str, suffix: str) -> None:
    """Refuse a file whose name tells of another format than the one that is written.

    Raises:
        ValueError: The name does not end in the suffix, or the path is a folder.
    """
    _no_folder(path, option)
    if path.suffix != suffix:
        raise ValueError(f"{option} {path}: the file is a {suffix} file, so call it {path.stem}{suffix}")


def not_an_input(out: Path, option: str, *inputs: str | Path) -> None:
    """Refuse to write over a file that is read: what is lost may be all that there is of it.

    Args:
        out: The file to write, which may not be there yet.
        option: The option that names it.
        inputs: Files, or words that stand for something else; by whatever path or link they are the same file.

    Raises:
        ValueError: One of the inputs is that file.
    """
    for given in inputs:
        path = Path(given).expanduser()
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{option} {out} is {given} itself, which would be lost: choose another name")


def folder(path: Path, option: str) -> None:
    """Make a folder, if it is not there, and check that files can be written in it.

    Raises:
        ValueError: The path is a file, a bank or in one.
        OSError: The folder cannot be made or written.
    """
    _outside_banks(path, option)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path}: this is a file; name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option} {path}: the folder cannot be made ({error.strerror})") from error
    _probe(path, f"{option} {path}")


def _no_folder(path: Path, option: str) -> None:
    if path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder; name a file")


def _probe(path: Path, what: str) -> None:
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"{what}: the folder {path} cannot be written ({error.strerror})") from error


def _outside_banks(path: Path, option: str) -> None:
    """Refuse to write into a saved bank, over its data or beside them: a bank with other files is not replaced."""
    from mkf.bank.storage import is_bank

    place = path.expanduser().resolve()
    for above in (place, *place.parents):
        if is_bank(above):
            raise ValueError(f"{option} {path}: {above} is a bank, which holds nothing else: choose a place outside it")
