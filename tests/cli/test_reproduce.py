"""`mkf reproduce` as it is typed."""

from pathlib import Path

import torch
from typer.testing import CliRunner

import mkf
from mkf.bank import FilterBank
from mkf.cli import app
from mkf.train import TrainConfig, train
from tests.search.conftest import one_thread  # noqa: F401
from tests.train.conftest import colours, write_images  # noqa: F401


def run(*words: object):
    return CliRunner().invoke(app, ["reproduce", *(str(word) for word in words)], env={"COLUMNS": "200"})


def test_matched_keys(tmp_path: Path) -> None:
    filters = torch.randn(60, 7, 7, generator=torch.Generator().manual_seed(0))
    FilterBank.from_layers([mkf.bank.Layer("l", filters)], "m").save(tmp_path / "bank")
    words = ("matched-keys", tmp_path / "bank", "--keys", 2, "--steps", 5)
    result = run(*words, "--out", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    assert "clusters and paper8: mean |cos|" in result.stdout
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["code_axis.png", "search_keys.png", "state"]
    again = run(*words, "--out", tmp_path / "new" / "folder")
    assert again.stdout == result.stdout
    assert "belongs to another" in run(*words, "--seed", 1, "--out", tmp_path / "new" / "folder").stderr
    (tmp_path / "file").touch()
    result = run(*words, "--out", tmp_path / "file")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "is a bank, which holds nothing else" in run(*words, "--out", tmp_path / "bank" / "new").stderr


def test_search_by_accuracy(tmp_path: Path, colours: Path) -> None:  # noqa: F811
    kwargs = {"dim": 6, "depth": 1, "kernel_size": 7, "patch_size": 2}
    train(
        TrainConfig(model="ConvMixer", model_kwargs=kwargs, data=str(colours), out=str(tmp_path / "run"),
                    image_size=16, epochs=1, warmup_epochs=0, batch_size=12, device="cpu")
    )  # fmt: skip
    words = (
        "search-by-accuracy",
        "embedded",
        "--model",
        tmp_path / "run",
        "--data",
        colours,
        "--out",
        tmp_path / "out",
    )
    result = run(*words, "--device", "nonsense")
    assert result.exit_code == 1
    assert "device 'nonsense' cannot be used" in result.stderr
    result = run(*words, "--keys", 2, "--per-class", 2, "--steps", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "| 2 keys, by accuracy |" in result.stdout
    assert "Top-1 of 8 test images, which no search has seen." in result.stdout
    assert len(mkf.KeySet.load(tmp_path / "out" / "keys.safetensors")) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "elimination.png",
        "keys.safetensors",
        "state",
    ]
