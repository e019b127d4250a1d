"""The search by accuracy and its test, on a network that tells two colours apart."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import mkf
from mkf.bank import FilterBank
from mkf.experiments.search_by_accuracy import search_by_accuracy
from mkf.search import Accuracy, clusters
from mkf.train import ParquetImages, TrainConfig, evaluation_loader, load_weights, train
from tests.search.conftest import one_thread  # noqa: F401
from tests.train.conftest import colours, write_images  # noqa: F401


@pytest.fixture
def run(tmp_path, colours):  # noqa: F811
    kwargs = {"dim": 6, "depth": 2, "kernel_size": 7, "patch_size": 2}
    train(
        TrainConfig(model="ConvMixer", model_kwargs=kwargs, data=str(colours), out=str(tmp_path / "run"),
                    image_size=16, epochs=2, warmup_epochs=0, batch_size=12, device="cpu")
    )  # fmt: skip
    return tmp_path / "run"


def test_searched_on_training_images_and_tested_on_the_others(run, colours, tmp_path):  # noqa: F811
    [test_file] = colours.glob("val-*")
    table = pq.read_table(test_file)
    pq.write_table(
        table.set_column(1, "label", pa.array([1] * len(table), pa.int64())), test_file
    )  # the others' labels
    network, _ = load_weights(run / "model.safetensors")
    bank = FilterBank.from_model(network, "m")
    options = {"per_class": 4, "steps": 20, "state": tmp_path / "state", "device": "cpu"}
    found = search_by_accuracy(bank, run, colours, 3, **options)
    assert found.second.objective == "top-1 error on images of the train split"
    assert len(found.second.keys) == 3
    assert found.images == 8
    names = ["original", "50 uniform codes", "25 uniform codes", "10 uniform codes", "3 keys, by accuracy", "paper8"]
    names += ["3 keys, by clusters of the bank", *(f"3 random, seed {seed}" for seed in range(3))]
    assert list(found.accuracy) == names

    test = ParquetImages(colours, ("val",))
    independent = evaluation_loader(test, ParquetImages(colours), 16)
    judge = Accuracy(network, independent, split="test")
    sets = {"original": None, "paper8": mkf.keys.paper8(), "3 keys, by accuracy": found.second.keys}
    sets |= {"3 random, seed 2": mkf.keys.random(7, 3, 2), names[6]: clusters(bank, 3).keys}
    for name, keys in sets.items():
        assert found.accuracy[name] == judge.top1(keys)

    judged = ParquetImages(colours)
    trained = Accuracy(network, evaluation_loader(judged, judged, 16, 4), split="train")
    assert found.accuracy["original"] != trained.top1(), "a test that could tell them apart"
    assert found.second.curve[0].loss == pytest.approx(1 - trained.top1(found.second.candidates))
    assert found.markdown().splitlines()[2] == f"| original | {100 * found.accuracy['original']:.1f} |"
    assert found.draw(tmp_path).name == "elimination.png"
    first, second = (
        (tmp_path / "state" / f"{name}.json").stat().st_mtime_ns for name in ("first-round", "elimination")
    )
    again = search_by_accuracy(bank, run, colours, 3, **options)
    assert again.second.keys == found.second.keys
    assert (tmp_path / "state" / "first-round.json").stat().st_mtime_ns == first, "nothing is searched twice"
    assert (tmp_path / "state" / "elimination.json").stat().st_mtime_ns == second


def test_autoencoder_and_network_run_on_the_device(run, colours, monkeypatch):  # noqa: F811
    def judge(network, *_, **__):
        return next(network.parameters()).device.type

    def train_coder(*_, device, **__):
        return device.type

    def search(coder, k, judge, **_):
        raise RuntimeError(f"{judge} judges what comes from {coder}")

    for name, fake in (("Accuracy", judge), ("autoencoder", train_coder), ("two_rounds", search)):
        monkeypatch.setattr(f"mkf.experiments.search_by_accuracy.{name}", fake)
    with pytest.raises(RuntimeError, match="meta judges what comes from meta"):
        search_by_accuracy(mkf.bank.load("embedded"), run, colours, 2, per_class=4, device="meta")


def test_images_that_are_many_are_not_kept(run, colours, monkeypatch):  # noqa: F811
    options = {"per_class": 4, "steps": 1, "device": "cpu"}
    bank, given = mkf.bank.load("embedded"), []
    kept = search_by_accuracy(bank, run, colours, 2, **options)

    def judge(network, images, **split):
        given.append(images)
        return Accuracy(network, images, **split)

    monkeypatch.setattr("mkf.experiments.search_by_accuracy.Accuracy", judge)
    monkeypatch.setattr("mkf.train.data.KEPT", 0)
    assert search_by_accuracy(bank, run, colours, 2, **options).accuracy == kept.accuracy
    assert len(given) == 2
    assert not any(isinstance(images, list) for images in given)


def test_a_network_without_filters_of_the_banks_size(run, colours):  # noqa: F811
    bank = mkf.FilterBank.from_layers([mkf.bank.Layer("l", torch.randn(40, 5, 5))], "m")
    with pytest.raises(ValueError, match=r"no depthwise nn\.Conv2d of 5x5"):
        search_by_accuracy(bank, run, colours, 2, per_class=4, steps=1)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        search_by_accuracy(bank, run.parent, colours, 2)
