"""`mkf bank` on the command line."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mkf.bank import FilterBank, Layer
from mkf.cli import _sources
from mkf.cli.bank import app


def mkf_bank(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def checkpoint(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)
    return path


def test_build_puts_sources_together_and_info_lists_them(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "old")
    net = checkpoint(tmp_path / "net[1].pth", conv_weight=torch.ones(9, 1, 7, 7), long_weight=torch.ones(2, 1, 1, 7))
    code, out, err = mkf_bank("build", net, tmp_path / "old", "--out", tmp_path / "new")
    assert code == 0, err
    assert all(line.startswith("note: ") for line in err.splitlines())
    assert "note: net[1].pth: left out 1 depthwise layers" in err
    assert FilterBank.open(tmp_path / "new").models == ("zeta", "net[1]", "alpha")
    assert mkf_bank("info", tmp_path / "new") == (0, out, "")
    assert "27 filters" in out
    row = next(line for line in out.splitlines() if "net[1]" in line)
    assert row.split()[1::2][:4] == ["net[1]", "7x7", "1", "9"]


def test_build_refuses_two_models_of_one_name(tmp_path: Path) -> None:
    for run in ("run1", "run2"):
        (tmp_path / run).mkdir()
        checkpoint(tmp_path / run / "model.pth", conv_weight=torch.ones(9, 1, 7, 7))
    first, second = tmp_path / "run1" / "model.pth", tmp_path / "run2" / "model.pth"
    code, _, err = mkf_bank("build", first, second, "--out", tmp_path / "bank")
    assert (code, f"{first} and {second} both hold a model called 'model'" in err) == (1, True)
    assert not (tmp_path / "bank").exists()
    code, out, err = mkf_bank("build", first, first, "--out", tmp_path / "bank")
    assert code == 0, err
    assert "9 filters" in out


def test_build_takes_up_a_bank_that_a_killed_run_had_moved_aside(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / ".bank.previous")
    net = checkpoint(tmp_path / "net.pth", conv_weight=torch.ones(9, 1, 7, 7))
    code, _, err = mkf_bank("build", tmp_path / "bank", net, "--out", tmp_path / "bank")
    assert code == 0, err
    assert FilterBank.open(tmp_path / "bank").models == ("zeta", "alpha", "net")


def test_build_tells_before_it_collects_that_the_place_cannot_be_written(
    small_bank: FilterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkf.bank.load", None)
    (tmp_path / "file").touch()
    small_bank.save(tmp_path / "old")
    for words in (("convnextv2_atto",), ("paper54", "--files", tmp_path)):
        for out, message in (("file/bank", "this is a file; name a folder"), ("old/sub", "old is a bank, which holds")):
            code, _, err = mkf_bank("build", *words, "--out", tmp_path / out)
            assert (code, err[:6], message in err) == (1, "error:", True), err


def test_build_untrained(tmp_path: Path) -> None:
    code, out, err = mkf_bank("build", "convnextv2_atto", "--no-pretrained", "--out", tmp_path / "bank")
    assert code == 0, err
    assert "untrained" in out
    bank = FilterBank.open(tmp_path / "bank")
    assert (len(bank), bank.models) == (1840, ("convnextv2_atto-untrained",))
    with pytest.raises(ValueError, match="no trained model"):
        _sources.trained([str(tmp_path / "bank")], 7, True)


def test_build_paper54_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(cls: type[FilterBank], name: str) -> FilterBank:
        raise OSError(f"cannot fetch {name}")

    monkeypatch.setattr(FilterBank, "from_timm", classmethod(no_network))
    (tmp_path / "files").mkdir()
    checkpoint(tmp_path / "files" / "hornet_tiny_7x7.pth", conv_weight=torch.ones(9, 1, 7, 7))
    command = ("build", "paper54", "--files", tmp_path / "files", "--out", tmp_path / "bank")
    code, out, err = mkf_bank(*command)
    assert code == 0, err
    assert err.count("missing: ") == len(err.splitlines()) - 1 == 52
    assert "missing: moganet_tiny_sz256: not in timm; bring the file as moganet_tiny_sz256.pth" in err
    assert "1 of the list's 53 checkpoints are in the bank." in err
    assert "hornet_tiny_7x7" in out


def test_names_are_no_markup_and_are_not_cut(tmp_path: Path) -> None:
    name, folder = "a_network_of_a_rather_long_name:smile:[b].and_its_tag_1k-untrained", tmp_path / "b[/x]" / "bank"
    FilterBank.from_layers([Layer("l", torch.ones(9, 7, 7))], name, "a source " * 30).save(folder)
    code, out, err = mkf_bank("info", folder)
    assert code == 0, err
    assert name in out
    assert f"{name}: {'a source ' * 30}" in out
    assert "9 filters in" in out
    assert "b[/x]/bank" in "".join(out.split())
    assert mkf_bank("build", folder, "--out", tmp_path / "[red]" / "bank")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "nothing.pth"), "there is no file or folder nothing.pth"),
        (("build", "convnextv2_pcio"), "did you mean convnextv2_pico"),
        (("build", "bnak"), "there is no file or folder bnak, and timm has no model 'bnak'"),
        (("build", "convnextv2_pico", "--files", "."), "--files goes with paper54"),
        (("build", "paper54", "convnextv2_pico"), "paper54 is a list of its own"),
        (("build", "paper54", "--no-pretrained"), "paper54 is a list of its own"),
        (("build", "paper54", "--files", "nowhere"), "there is no folder nowhere"),
        (("info",), "there is no bank at"),
    ],
)
def test_errors_are_one_message(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = ("--out", tmp_path / "bank") if words[0] == "build" else (tmp_path / "bank",)
    code, out, err = mkf_bank(*words, *folder)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "bank").exists()
