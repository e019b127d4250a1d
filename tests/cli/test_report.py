"""`mkf report` as it is typed."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mkf.bank import FilterBank
from mkf.cli import app

RUNNER = CliRunner()


def report(*arguments: object):
    return RUNNER.invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def bank_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    FilterBank.from_model(nn.Sequential(nn.Conv2d(20, 20, 7, groups=20))).save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    Image.effect_noise((40, 30), 60).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_page_and_figures(bank_dir: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = report(bank_dir, "--out", out, "--image", picture, "--pdf", tmp_path / "f", "--title", "Mine")
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert "<h1>Mine</h1>" in text
    assert "picture.png" in text
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        "keys.pdf", "atlas.pdf", "depth.pdf", "residuals.pdf",
    }  # fmt: skip


def test_a_full_disk_leaves_the_old_page(bank_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 50_000:  # the page; the files within it are smaller
            raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "page.html"
    out.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    result = report(bank_dir, "--out", out)
    assert result.exit_code == 1
    assert f"error: cannot write {out}: No space left on device" in result.stderr
    assert out.read_text() == "old"


def test_without_extras(bank_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page needs neither matplotlib nor scikit-image."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mkf.analysis.natural.default_image", missing)
    result = report(bank_dir, "--out", tmp_path / "page.html", "--keys", "analytic:B")
    assert result.exit_code == 0, result.output
    assert "no natural image" in result.stderr
    assert 'id="natural"' not in (tmp_path / "page.html").read_text()


def missing() -> Path:
    raise ImportError("not here")


def test_refusals(bank_dir: Path, picture: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ([bank_dir, "--out", tmp_path], "ends in .html"),
        ([bank_dir, "--out", tmp_path / "none" / "page.html"], "there is no folder"),
        (
            [bank_dir, "--out", tmp_path / "page.html", "--keys", "analytic:B:5", "--image", picture],
            "choose keys of that size, as analytic:B:7",
        ),
        ([bank_dir, "--out", tmp_path / "page.html", "--png", picture], "this is a file; name a folder"),
        ([bank_dir, "--out", bank_dir / "page.html"], "is a bank, which holds nothing else"),
        ([bank_dir, "--out", tmp_path / "page.html", "--pdf", bank_dir / "new"], "is a bank, which holds nothing else"),
        (["no/such/bank", "--out", tmp_path / "page.html", "--image", picture], "there is no file or folder"),
        ([bank_dir, "--out", tmp_path / "page.html", "--image", tmp_path / "none.png"], "there is no such file"),
    ):
        result = report(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert said in " ".join(result.stderr.split())
        assert not (tmp_path / "page.html").exists()


def test_what_is_read_is_not_written_over(bank_dir: Path, picture: Path, tmp_path: Path) -> None:
    picture = picture.rename(tmp_path / "picture.html")
    result = report(bank_dir, "--image", picture, "--out", picture)
    assert result.exit_code == 1
    assert "which would be lost" in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_place_is_printed_as_it_is(bank_dir: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "[x]"
    out.mkdir()
    result = report(bank_dir, "--image", picture, "--out", out / "page.html", "--pdf", out)
    assert result.exit_code == 0, result.output
    assert f"Written to {out}/page.html: " in result.stdout
    assert f"Written to {out}: keys.pdf" in result.stdout
