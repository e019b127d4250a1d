"""A finished run as a bank of trained and untrained filters."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mkf.train import learned_filters, load_weights, train
from tests.train.test_train import config


def test_trained_and_untrained_filters_with_their_provenance(colours: Path) -> None:
    settings = config(colours, "run")
    history = train(settings)
    bank = learned_filters(settings.out, licence="MIT")
    assert bank.models == ("run", "run-untrained")
    for model, file in (("run", "model"), ("run-untrained", "initial")):
        own = bank.select(model=model)
        weights = load_file(Path(settings.out) / f"{file}.safetensors")
        depthwise = [w[:, 0] for w in weights.values() if w.ndim == 4 and w.shape[1] == 1]
        assert torch.equal(own.filters, torch.cat(depthwise))
        (source,) = set(own.metadata["source"].to_pylist())
        assert source.startswith("colours, ")
        assert "seed 0: mkf train --model ConvMixer" in source
        assert ("test accuracy" in source) == (file == "model")
    assert f"2 epochs, test accuracy {history[-1].top1:.2f} %" in bank.select(model="run").metadata["source"][0].as_py()
    assert set(bank.metadata["licence"].to_pylist()) == {"MIT"}


def test_a_run_that_started_from_weights_has_no_control(colours: Path) -> None:
    first = config(colours, "run")
    train(first)
    second = replace(first, out=f"{first.out}-again", weights=f"{first.out}/model.safetensors")
    train(second)
    assert learned_filters(second.out).models == (Path(second.out).name,)


def test_pretrained_is_not_asked_for_again(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def offline(name: str, pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    kwargs = {"pretrained": True, "depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}
    settings = replace(config(colours, "run"), model="convnext_atto", model_kwargs=kwargs, image_size=32)
    train(settings)
    assert learned_filters(settings.out).models == ("run",)
    assert asked == [True, False]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished run"):
        learned_filters(tmp_path)


def test_load_weights(colours: Path, tmp_path: Path) -> None:
    settings = config(colours, "run")
    train(settings)
    path = Path(settings.out) / "model.safetensors"
    model, metadata = load_weights(path)
    assert not model.training
    assert metadata["data_set"] == "colours"
    weights = load_file(path)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not say how its network is built"):
        load_weights(tmp_path / "bare.safetensors")
