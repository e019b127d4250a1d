"""Tables that fit a terminal, and files that other programs can read."""

import csv
import errno
import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mkf
from mkf.analysis import Analysis, analyze, report
from mkf.bank import FilterBank, Layer

from .banks import bank_of, noise, shifted

KEYS = mkf.keys.paper8()


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    broken = torch.cat([shifted(KEYS, [0, 1, 1, 7]), noise(12, 7, 7), torch.zeros(1, 7, 7)])
    broken[5:13, 0, 0] = math.inf
    return analyze(bank_of(noise(30, 7, 7, seed=1), broken, noise(4, 3, 3)), KEYS)


def printed(table: object, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_the_layer_table_holds_the_counts(analysis: Analysis) -> None:
    [table] = report.layer_tables(analysis)
    rows = [line.split() for line in printed(table) if line.strip()]
    second = analysis.models[0].layers[1].tally
    assert rows[1][:3] == ["layer", "filters", "dead"]
    assert rows[-1][:3] == ["1", "17", "1"]
    assert rows[-1][3:11] == [str(count) for count in second.counts]
    assert float(rows[-1][12]) == pytest.approx(second.residual_quantiles[2], abs=0.0051)
    assert float(rows[-1][14]) == pytest.approx(second.control_quantiles[2], abs=0.0051)


def test_the_model_table_holds_the_shares(analysis: Analysis) -> None:
    row = printed(report.model_table(analysis))[-1].split()
    assert row[1:4] == ["47", "2", "1"]
    assert [int(cell) for cell in row[4:12]] == [round(100 * share) for share in analysis.tally.shares]
    assert float(row[12]) == pytest.approx(analysis.tally.mean_correlation, abs=0.0051)


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal_and_cut_nothing(analysis: Analysis, width: int) -> None:
    for table in (report.model_table(analysis), *report.layer_tables(analysis)):
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)


def test_many_keys_are_named_not_listed() -> None:
    keys = mkf.keys.random(7, 40, seed=2)
    analysis = analyze(bank_of(shifted(keys, [30] * 6 + [4] * 3 + [12])), keys)
    assert "31:60 5:30 13:10" in printed(report.model_table(analysis))[-1]
    assert "31:6 5:3 13:1" in printed(report.layer_tables(analysis)[0])[-1]


def test_an_empty_cell_where_nothing_is_live() -> None:
    analysis = analyze(bank_of(torch.zeros(2, 7, 7)), KEYS)
    assert printed(report.model_table(analysis))[-1].split()[4:] == ["-"] * 11


def test_a_full_disk_leaves_the_old_files(analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "analysis.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*analysis\.json: No space left"):
        report.write(analysis, tmp_path)
    assert (tmp_path / "analysis.json").read_text() == "old"


def test_notes_name_what_is_wrong(analysis: Analysis) -> None:
    text = "\n".join(report.notes(analysis))
    model = analysis.models[0].model
    assert "Left out: 4 filters of 3x3" in text
    assert f"Not finite, counted under no key: 8 filters ({model} 1 channel 5; {model} 1 channel 6;" in text
    assert "and 3 more)" in text
    assert "8 Gaussian" in text
    assert "random keys" in text


def test_keys_that_are_only_numbered_have_no_labels(analysis: Analysis) -> None:
    alike = report.notes(analyze(bank_of(noise(5, 7, 7)), mkf.KeySet(KEYS.filters)))
    assert not any(line.startswith("1 ") for line in alike)
    named = mkf.KeySet(KEYS.filters[:3], names=["1", "mine", "3"])
    assert "2 mine." in report.notes(analyze(bank_of(noise(5, 7, 7)), named))


def test_the_files(analysis: Analysis, tmp_path: Path) -> None:
    written = report.write(analysis, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["analysis.json", "models.csv", "layers.csv", "families.csv", "keys.csv"]
    assert json.loads(written[0].read_text()) == analysis.to_dict()
    with written[2].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1"]
    for row, layer in zip(rows, analysis.models[0].layers, strict=True):
        assert [int(row[f"key_{number}"]) for number in range(1, 9)] == layer.tally.counts.tolist()
        assert float(row["residual_q50"]) == layer.tally.residual_quantiles[2]
        assert float(row["control_residual_q95"]) == layer.tally.control_quantiles[4]
    with written[1].open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["filters"], row["dead"], row["non_finite"]) == ("47", "1", "8")
    with written[4].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [*"12345678", "random"]
    assert sum(int(row["filters"]) for row in rows[:8]) == int(rows[8]["filters"]) == analysis.tally.live
    assert float(rows[8]["residual_q50"]) == analysis.tally.control_quantiles[2]


def test_the_figures(analysis: Analysis, tmp_path: Path) -> None:
    written = report.write_figures(analysis, tmp_path)
    assert [path.name for path in written] == ["keys.png", "atlas.png", "depth.png", "residuals.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_no_figure_of_filters_where_nothing_is_live(tmp_path: Path) -> None:
    analysis = analyze(bank_of(torch.zeros(2, 7, 7)), KEYS)
    assert [path.name for path in report.write_figures(analysis, tmp_path, ".svg")] == ["keys.svg"]


def test_without_matplotlib(analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mkf\[report\]'"):
        report.write_figures(analysis, tmp_path)


def test_names_are_no_markup_on_any_console() -> None:
    bank = FilterBank.concat(
        FilterBank.from_layers([Layer(f"{name}.l", noise(5, 7, 7))], name) for name in ("net[ema]", "net[/x]", ":a:")
    )
    analysis = analyze(bank, KEYS)
    rows = printed(report.model_table(analysis), 200)
    first, second, third = report.layer_tables(analysis)
    for name, table in (("net[ema]", first), ("net[/x]", second), (":a:", third)):
        assert name in [row.split()[0] for row in rows if row.strip()]
        assert printed(table)[0].rstrip() == f"{name}: filters of each key"
        assert printed(table)[-1].split()[0] == f"{name}.l"
