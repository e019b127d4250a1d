"""Files are replaced as a whole, or left as they were."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mkf._files import UNFINISHED, replacing


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert [part.name for part in tmp_path.glob(UNFINISHED)] != []
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def write(path: Path, content: bytes, error: BaseException | None = None) -> None:
    with replacing(path) as file:
        file.write(content)
        if error:
            raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write(path, b"new", error())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_umask_decides_who_may_read_it(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    at_sync: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: at_sync.append((os.fstat(handle).st_size, path.exists())))
    write(path, b"new")
    assert at_sync == [(3, False)]


def test_two_that_write_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write_often(byte: int) -> None:
        for _ in range(50):
            with replacing(path) as file:
                file.write(bytes([byte]) * 10_000)
                file.write(bytes([byte]) * 10_000)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_often, (1, 2)))
    assert path.read_bytes() in (b"\1" * 20_000, b"\2" * 20_000)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "file", Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened(Path("/dev/full"), mode))
    for content in (b"small", b"large" * 10_000):
        with pytest.raises(OSError, match=f"^cannot write {path}: No space left"):
            write(path, content)
    with pytest.raises(OSError, match=f"^cannot write {path}: No space left"), replacing(path) as file:
        torch.save(torch.zeros(10_000), file)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "none" / "x", "No such file"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(OSError, match=f"^cannot write {path}: {reason}"):
            write(path, b"")


def test_errors_of_what_is_read_meanwhile_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for error in (OSError("the bank is damaged"), OSError(errno.EIO, "read error", "input"), RuntimeError("other")):
        with pytest.raises(type(error)) as caught:
            write(path, b"", error)
        assert caught.value is error
