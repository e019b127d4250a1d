"""Networks trained with keys: from scratch by `mkf train --keys`, after a conversion by `mkf convert --finetune`."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import mkf
from mkf.bank.checkpoint import state_dict
from mkf.cli import app
from mkf.train import TrainConfig, build_model, learned_filters, train
from tests.train.conftest import WriteImages

TINY = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4}


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, words)))
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def train_words(data: Path, out: Path, *more: object) -> list[object]:
    words: list[object] = ["train", "--model", "ConvMixer", "--data", data, "--out", out, "--image-size", 16]
    words += ["--epochs", 2, "--warmup-epochs", 0, "--batch-size", 8, "--lr", 0.02, "--device", "cpu"]
    words += [word for key, value in TINY.items() for word in ("--model-kwargs", f"{key}={value}")]
    return [*words, *more]


def test_finetune_trains_the_converted_network(colours: Path, tmp_path: Path) -> None:
    assert run(*train_words(colours, tmp_path / "run"))[0] == 0
    out = tmp_path / "keys.safetensors"
    options = ["--keys", "analytic:B:3", "--out", out, "--finetune", colours, "--epochs", 2, "--batch-size", 8]
    code, stdout, stderr = run("convert", tmp_path / "run" / "model.safetensors", *options)
    assert code == 0, stderr
    assert "before the training top-1" in stdout
    assert "epoch 2/2" in stdout
    with safe_open(tmp_path / "keys.finetuned" / "model.safetensors", "pt") as file:
        assert "--assign fit" in file.metadata()["command"]
    before, after = load_file(tmp_path / "run" / "model.safetensors"), load_file(out)
    assert before.keys() == after.keys()
    bank = mkf.FilterBank.from_checkpoint(out)
    assert mkf.affine_fit(bank, mkf.keys.analytic("B", 3)).residual.max() < 1e-3
    assert "free filters" not in stdout
    more = ["--keys", "analytic:A:3", "--out", tmp_path / "more.safetensors", "--finetune", colours, *options[6:]]
    code, _, stderr = run("convert", out, *more)  # the file tells which network it is
    assert code == 0, stderr
    assert mkf.train.load_weights(tmp_path / "more.safetensors")[1]["keys"] == "analytic:A:3"
    code, _, stderr = run("convert", tmp_path / "run" / "model.safetensors", *options)
    assert code == 1
    assert "holds the training of an earlier --finetune: delete it or choose another --out" in stderr


@pytest.mark.parametrize("compact", [False, True])
def test_what_was_trained_is_what_is_written(colours: Path, tmp_path: Path, compact: bool) -> None:
    """Also of layers that stay as they are, such as those of stride 2 that pad one side more."""
    name, out, source = "tf_mobilenetv3_small_minimal_100", tmp_path / "keys.safetensors", tmp_path / "net.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=2).state_dict(), source)
    options = ["--keys", "analytic:B:3", "--out", out, "--finetune", colours, "--epochs", 1, "--batch-size", 8]
    options += ["--image-size", 32, "--model", name, *(["--compact"] if compact else [])]
    code, stdout, stderr = run("convert", source, *options)
    assert code == 0, stderr
    assert "-" not in stdout.split("bytes,")[1].split("as index")[0]
    assert "Trained with free filters: blocks.0.0.conv_dw (a Conv2dSame of stride (2, 2) pads" in stdout
    trained = state_dict(tmp_path / "keys.finetuned" / "model.safetensors")
    written = state_dict(out)
    assert trained.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in trained.items())


def test_data_of_other_classes_are_told_before_the_conversion(
    colours: Path, tmp_path: Path, write_images: WriteImages
) -> None:
    assert run(*train_words(colours, tmp_path / "run"))[0] == 0
    images = [Image.new("RGB", (16, 16))] * 3
    for split in ("train", "val"):
        write_images(tmp_path / "three" / f"{split}-00000-of-00001.parquet", images, [0, 1, 2])
    out = tmp_path / "keys.safetensors"
    source = tmp_path / "run" / "model.safetensors"
    code, stdout, stderr = run(
        "convert", source, "--keys", "analytic:B:3", "--out", out, "--finetune", tmp_path / "three"
    )
    assert (code, stdout) == (1, "")
    assert "three has 3 classes, the network in" in stderr
    assert not out.exists()


def test_trained_from_scratch_with_keys(colours: Path, tmp_path: Path) -> None:
    code, _, stderr = run(*train_words(colours, tmp_path / "run", "--keys", "analytic:B:3"))
    assert code == 0, stderr
    initial, trained = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("initial", "model"))
    name = "blocks.0.0.fn.0"
    for part in ("keys", "index", "scale"):
        assert torch.equal(initial[f"{name}.{part}"], trained[f"{name}.{part}"]), part
    for part in ("shift", "bias"):
        assert not torch.equal(initial[f"{name}.{part}"], trained[f"{name}.{part}"]), part
    source, out = tmp_path / "run" / "model.safetensors", tmp_path / "again.safetensors"
    code, _, stderr = run("convert", source, "--out", out, "--finetune", colours)
    assert code == 1
    assert "name them with --keys" in stderr
    bank = learned_filters(tmp_path / "run")
    assert mkf.affine_fit(bank, mkf.keys.analytic("B", 3)).residual.max() < 1e-3


def test_weights_that_do_not_fit_the_model(colours: Path, tmp_path: Path) -> None:
    assert run(*train_words(colours, tmp_path / "run"))[0] == 0
    config = TrainConfig(
        model="ConvMixer",
        model_kwargs=TINY | {"dim": 16},
        data=str(colours),
        out=str(tmp_path / "other"),
        image_size=16,
        batch_size=8,
        device="cpu",
        weights=str(tmp_path / "run" / "model.safetensors"),
    )
    with pytest.raises(ValueError, match="does not fit the model"):
        train(config)
    with pytest.raises(ValueError, match="no keys called"):
        build_model(TrainConfig(model="ConvMixer", model_kwargs=TINY, data="", out="", keys="paper9"), 2)
