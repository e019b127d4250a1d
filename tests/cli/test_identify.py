"""`mkf identify` as it is typed."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from typer.testing import CliRunner

import mkf
from mkf.bank import FilterBank, Layer
from mkf.cli import app

RUNNER = CliRunner()


def identify(*arguments: object):
    return RUNNER.invoke(app, ["identify", *map(str, arguments)])


@pytest.fixture
def bank_dir(tmp_path: Path) -> Path:
    broken = mkf.keys.paper8().filters
    broken[3, 0, 0], broken[4] = torch.nan, 1
    layers = [Layer("a", broken), Layer("b", torch.eye(3)[None].repeat(2, 1, 1))]
    FilterBank.from_layers(layers, "net").save(tmp_path / "bank")
    return tmp_path / "bank"


def test_keys_are_listed(tmp_path: Path) -> None:
    result = identify("paper8", "analytic:B:5")
    assert result.exit_code == 0, result.output
    for kind in mkf.keys.paper8().kinds:
        assert result.stdout.count(kind) >= 2
    assert "analytic:B:5: 8 keys 5x5" in result.stdout
    mkf.keys.analytic("D1").save(tmp_path / "keys.safetensors")
    assert "8 keys 7x7" in identify(tmp_path / "keys.safetensors").stdout


def test_nothing_is_printed_while_a_bar_is_drawn(bank_dir: Path, monkeypatch) -> None:
    """Both are on one terminal, where a bar would be left standing before the first line."""
    drawn = []
    started, stopped = Progress.start, Progress.stop
    monkeypatch.setattr(Progress, "start", lambda self: (drawn.append(self), started(self)))
    monkeypatch.setattr(Progress, "stop", lambda self: (drawn.clear(), stopped(self)))
    printed = []
    monkeypatch.setattr("mkf.cli.identify.print_table", lambda *_: printed.append(bool(drawn)))
    assert identify("paper8", bank_dir).exit_code == 0
    assert printed == [False] * 3


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / f"names{suffix}"
    out.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    result = identify("paper8", "--out", out)
    assert result.exit_code == 1
    assert f"cannot write {out}: No space left" in result.stderr
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_scales_beyond_the_largest_are_marked(tmp_path: Path) -> None:
    x = torch.arange(7) - 3.0
    wide, narrow = (torch.exp(-(x**2) / (2 * s**2)) for s in (3.0, 1.0))
    mkf.KeySet(torch.stack([wide[:, None] * wide, narrow[:, None] * narrow])).save(tmp_path / "keys.safetensors")
    output = identify(tmp_path / "keys.safetensors").stdout
    assert output.count(">=2.000") == 2


def test_a_bank_is_summed_up(bank_dir: Path) -> None:
    result = identify(bank_dir)
    assert result.exit_code == 0, result.output
    assert "8 filters 7x7" in result.stdout
    assert "2 filters 3x3" in result.stdout
    assert "not finite" in result.stdout
    assert "constant" in result.stdout


def test_noise_is_the_control(bank_dir: Path) -> None:
    lines = [line.split() for line in identify(bank_dir).stdout.splitlines() if line.strip().startswith("white noise")]
    expected = mkf.analysis.identify(torch.randn(1000, 7, 7, generator=torch.Generator().manual_seed(0))).residual
    of_3x3, of_7x7 = (list(map(float, line[-3:])) for line in lines)
    assert of_7x7 == [pytest.approx(torch.tensor(expected).quantile(q).item(), abs=1e-3) for q in (0.25, 0.5, 0.75)]
    assert of_7x7[1] > 0.9 > of_3x3[1]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_rows(bank_dir: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows.{suffix}"
    assert identify("paper8", bank_dir, "--out", out).exit_code == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file)) if suffix == "csv" else json.load(file)
    assert len(rows) == 8 + 10
    kinds = list(mkf.keys.paper8().kinds)
    assert [row["name"] for row in rows[:8]] == kinds
    in_bank = [row for row in rows if row["model"] == "net" and int(row["kernel_size"]) == 7]
    assert [row["name"] for row in in_bank] == [*kinds[:3], "not finite", "constant", *kinds[5:]]
    assert [int(row["channel"]) for row in in_bank] == list(range(8))
    assert in_bank[3]["residual"] in ("", None)
    assert float(in_bank[7]["residual"]) < 0.1


def test_a_laplacian_in_json(tmp_path: Path) -> None:
    laplacian = torch.zeros(1, 7, 7)
    laplacian[0, 3, 2:5] += torch.tensor([-1, 2, -1])
    laplacian[0, 2:5, 3] += torch.tensor([-1, 2, -1])
    FilterBank.from_layers([Layer("0", laplacian)], "net").save(tmp_path / "bank")
    assert identify(tmp_path / "bank", "--out", tmp_path / "out.json").exit_code == 0
    [row] = json.loads((tmp_path / "out.json").read_text())
    assert (row["name"], row["alpha"]) == ("difference of Gaussians", "inf")


def test_refusals(bank_dir: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["no/such/thing"], "there is no file or folder"),
        (["analytic:Z"], "the methods are"),
        ([bank_dir, "--out", "x.txt"], "must end in .csv or .json"),
        ([bank_dir, "--out", tmp_path / "none" / "x.csv"], "there is no folder"),
        ([bank_dir, "--out", bank_dir / "x.csv"], "is a bank, which holds nothing else"),
    ):
        result = identify(*arguments)
        assert result.exit_code == 1
        assert said in " ".join(result.stderr.split())
        assert result.stderr.startswith("error: ")


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    keys = tmp_path / "keys.csv"
    rows = "\n".join(" ".join(str(i * j) for j in range(3)) for i in range(3))
    keys.write_text(f"Filter 1:\n{rows}\n")
    before = keys.read_text()
    result = identify(keys, "--out", keys)
    assert result.exit_code == 1
    assert "which would be lost" in result.stderr
    assert keys.read_text() == before


def test_names_are_no_markup(tmp_path: Path) -> None:
    keys = tmp_path / "keys[ema].safetensors"
    mkf.KeySet(mkf.keys.paper8().filters[:3], names=["a[ema]", "b[/x]", "c:smile:"]).save(keys)
    out = tmp_path / "[red]rows.csv"
    result = identify(keys, "--out", out)
    assert result.exit_code == 0, result.output
    for said in (f"{keys}: 3 keys", "a[ema]", "b[/x]", "c:smile:", f"Written to {out}"):
        assert said in result.stdout
