"""`mkf analyze` as it is typed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mkf import KeySet
from mkf.bank import FilterBank, Layer
from mkf.cli import app

RUNNER = CliRunner()


def analyze(*arguments: object):
    return RUNNER.invoke(app, ["analyze", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The message of a run that must end with one clear line and exit code 1."""
    result = analyze(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return " ".join(message.split())


def depthwise(k: int, channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, channels, k, groups=channels), nn.Conv2d(channels, channels, 1))


@pytest.fixture
def bank_dir(tmp_path: Path) -> Path:
    path = tmp_path / "bank"
    FilterBank.from_model(depthwise(7)).save(path)
    return path


def test_the_embedded_bank_is_the_default() -> None:
    result = analyze("--no-layers")
    assert result.exit_code == 0, result.output
    assert result.stdout == analyze("embedded", "--no-layers").stdout
    for model in FilterBank.embedded().models:
        assert model in result.stdout
    assert "Untrained networks, 2 here, are part of all sums" in result.stdout


def test_names_are_whole_where_the_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mkf.cli._console._PIPED_WIDTH", 40)
    result = analyze("embedded")
    assert "…" not in result.stdout
    for name in (*FilterBank.embedded().models, "stages.2.blocks.0.conv_dw"):
        assert f"\n{name} " in result.stdout


def test_a_saved_bank(bank_dir: Path) -> None:
    result = analyze(bank_dir)
    assert result.exit_code == 0, result.output
    assert "8 filters of 7x7 in 1 layer of 1 model." in result.stdout
    assert "Untrained" not in result.stdout
    assert "filters of each key" in result.stdout
    assert "filters of each key" not in analyze(bank_dir, "--no-layers").stdout


def test_piped_output_is_plain(bank_dir: Path) -> None:
    result = analyze(bank_dir)
    assert "\x1b" not in result.output


def test_sources_mix(bank_dir: Path, tmp_path: Path, data_dir: Path) -> None:
    out = tmp_path / "out"
    checkpoint = data_dir / "filters" / "team38_rfdnext.pth"
    result = analyze(bank_dir, checkpoint, "convnextv2_pico", "--no-pretrained", "--no-layers", "--out", out)
    assert result.exit_code == 0, result.output
    document = json.loads((out / "analysis.json").read_text())
    assert [model["filters"] for model in document["models"]] == [8, 200, 2944]
    assert document["total"]["filters"] == 3152
    # Untrained filters are noise to the keys, trained ones are not.
    _, trained, untrained = (model["mean_correlation"] for model in document["models"])
    assert untrained == pytest.approx(0.24, abs=0.01)
    assert trained > 0.6
    assert {path.name for path in out.iterdir()} == {
        "analysis.json", "models.csv", "layers.csv", "families.csv", "keys.csv",
        "keys.png", "atlas.png", "depth.png", "residuals.png",
    }  # fmt: skip


def test_a_source_given_twice_is_read_once(bank_dir: Path) -> None:
    assert "8 filters of 7x7" in analyze(bank_dir, bank_dir).stdout


def test_two_models_of_one_name_are_not_added_up(bank_dir: Path, tmp_path: Path) -> None:
    FilterBank.from_model(depthwise(7)).save(tmp_path / "other")
    message = refused(bank_dir, tmp_path / "other")
    assert "both hold a model called 'Sequential'" in message
    # Where only one of them has filters of the keys' size there is nothing to add up.
    FilterBank.from_model(depthwise(5)).save(tmp_path / "other")
    assert "Left out: 8 filters of 5x5" in analyze(bank_dir, tmp_path / "other").stdout


def test_keys_of_choice(bank_dir: Path, tmp_path: Path) -> None:
    KeySet(torch.eye(7)[None], names=["mine"]).save(tmp_path / "mine.safetensors")
    for keys, said in (
        ("paper8", "Figure 9"),
        ("analytic:B", "method B"),
        (tmp_path / "mine.safetensors", "1 mine."),
    ):
        result = analyze(bank_dir, "--keys", keys)
        assert result.exit_code == 0, result.output
        assert said in result.stdout


def test_without_matplotlib_the_numbers_are_still_written(
    bank_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    result = analyze(bank_dir, "--out", out)
    assert result.exit_code == 0, result.output
    assert "pip install 'mkf[report]'" in result.stderr
    assert {path.name for path in out.iterdir()} == {
        "analysis.json", "models.csv", "layers.csv", "families.csv", "keys.csv",
    }  # fmt: skip


def test_bad_sources(tmp_path: Path) -> None:
    assert "there is no file or folder no/such/folder" in refused("no/such/folder")
    assert "missing.safetensors" in refused(tmp_path / "missing.safetensors")
    assert "missing.pth" in refused("missing.pth")
    assert "convnextv2_pico" in refused("convnextv2_pic")
    refused(tmp_path)


def test_bad_options(bank_dir: Path, tmp_path: Path) -> None:
    refused(bank_dir, "--keys", "paper9")
    refused(bank_dir, "--keys", "analytic:Z")
    file = tmp_path / "file"
    file.write_text("")
    assert "this is a file; name a folder" in refused(bank_dir, "--out", file)
    assert "file" in refused(bank_dir, "--out", file / "below")
    assert "is a bank, which holds nothing else" in refused("embedded", "--out", bank_dir)


def test_keys_and_filters_of_different_size(tmp_path: Path) -> None:
    FilterBank.from_model(depthwise(5)).save(tmp_path / "five")
    assert "the keys are 7x7 but the bank holds only other sizes (8 of 5x5)" in refused(tmp_path / "five")


def test_non_finite_filters_are_named(tmp_path: Path) -> None:
    model = depthwise(7)
    model[0].weight.data[3] = torch.nan
    FilterBank.from_model(model).save(tmp_path / "broken")
    result = analyze(tmp_path / "broken")
    assert result.exit_code == 0, result.output
    assert "1 filters" not in result.stdout
    assert "channel 3" in result.stdout


def test_an_empty_word_is_no_source() -> None:
    assert "a source of filters is empty" in refused("")


@pytest.mark.parametrize("name", ["net[ema]", "net[/x]", "net:smile:", "cost$_$"])
def test_names_are_printed_and_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    filters = torch.randn(8, 7, 7, generator=torch.Generator().manual_seed(0))
    filters[3] = torch.nan
    FilterBank.from_layers([Layer(f"{name}.0", filters)], name).save(tmp_path / "bank")
    out = tmp_path / "out[red]"
    result = analyze(tmp_path / "bank", "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert f"{name}: filters of each key" in lines[0]
    assert [line.split()[0] for line in lines if "  " in line.strip()].count(name) == 1
    assert f"({name} {name}.0 channel 3)" in result.stdout
    assert f"{name}.0" in [line.split()[0] for line in lines if line.strip()]
    assert f"Written to {out}: analysis.json" in result.stdout
    assert (out / "depth.png").exists()
