"""Checkpoint files as people publish them."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mkf
from mkf.bank import FilterBank
from mkf.bank.checkpoint import state_dict, write
from mkf.bank.compact import compact, expand


def weight(value: float = 1.0, channels: int = 4, k: int = 7) -> torch.Tensor:
    return torch.full((channels, 1, k, k), value)


def saved(path: Path, content: Any, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


@pytest.mark.parametrize(
    ("file", "filters", "layers"),
    [
        ("trained_k7.safetensors", 2157, 17),
        ("trained_k5.safetensors", 2413, 76),
        ("trained_k3.safetensors", 21811, 467),
        ("team38_rfdnext.pth", 200, 4),
    ],
)
def test_real_files(data_dir: Path, file: str, filters: int, layers: int) -> None:
    bank = FilterBank.from_checkpoint(data_dir / "filters" / file)
    assert (len(bank), bank.layers().num_rows) == (filters, layers)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_layers_written_as_keys_keep_their_depth(tmp_path: Path, suffix: str) -> None:
    state = {f"{name}.weight": torch.randn(4, 1, k, k) for name, k in {"a": 7, "b": 5, "c": 7, "d": 3}.items()}
    small, _ = compact(state, mkf.keys.paper8())
    path = tmp_path / f"net.{suffix}"
    save_file(small, path) if suffix == "safetensors" else torch.save(small, path)
    layers = FilterBank.from_checkpoint(path).layers().to_pylist()
    assert {row["layer"]: row["depth"] for row in layers} == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert list(expand(small)) == list(state)


def test_a_collection_is_split_into_its_models_and_sorted_naturally(data_dir: Path) -> None:
    bank = FilterBank.from_checkpoint(data_dir / "filters" / "trained_k7.safetensors")
    counts = {model: len(bank.select(model=model)) for model in bank.models}
    assert counts == {"mcunet-5fps": 448, "proxyless-w0.3": 1488, "team38_rfdnext": 200, "team44_msdn": 21}
    mcunet = bank.select(model="mcunet-5fps").layers().to_pylist()
    assert [row["layer"].split(".")[1] for row in mcunet] == ["3", "6", "10"]
    assert [row["normalised_depth"] for row in mcunet] == [0.0, 0.5, 1.0]
    assert {(row["licence"], row["stride"], row["source"]) for row in mcunet} == {
        ("MIT", None, "trained_k7.safetensors")
    }


def test_a_real_training_checkpoint(data_dir: Path) -> None:
    path = data_dir / "filters" / "team38_rfdnext.pth"
    bank = FilterBank.from_checkpoint(path)
    assert [row["layer"] for row in bank.layers().to_pylist()] == [f"B{i}.esa.conv.0" for i in (1, 2, 3, 4)]
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    assert torch.equal(bank.filters, torch.cat([state[f"B{i}.esa.conv.0.weight"][:, 0] for i in (1, 2, 3, 4)]))
    assert bank.models == ("team38_rfdnext",)
    assert bank.layers()["source"][0].as_py() == "team38_rfdnext.pth, entry model_state_dict"


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "params_ema", "model", "state_dict", "params"])
@pytest.mark.parametrize("zipped", [True, False])
def test_entries(tmp_path: Path, entry: str, zipped: bool) -> None:
    content = {"epoch": 3, entry: {"conv.weight": weight()}, "optimizer": {"state": {0: {"exp_avg": weight(9)}}}}
    path = saved(tmp_path / "net.pth.tar", content, _use_new_zipfile_serialization=zipped)
    bank = FilterBank.from_checkpoint(path)
    assert len(bank) == 4
    assert bank.filters.max() == 1
    assert bank.models == ("net",)
    assert bank.layers()["source"].to_pylist() == [f"net.pth.tar, entry {entry}"]


def test_averaged_weights_come_first_unless_there_are_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"model": {"c.weight": weight(1.0)}, "model_ema": {"c.weight": weight(2.0)}})
    assert FilterBank.from_checkpoint(path).filters.mean() == 2
    path = saved(tmp_path / "b.pt", {"model": {"c.weight": weight(1.0)}, "model_ema": None})
    assert FilterBank.from_checkpoint(path).filters.mean() == 1


def test_a_bare_state_dict_keeps_its_order_and_loses_its_wrappers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3))
    state = {f"module._orig_mod.{name}": value for name, value in reversed(net.state_dict().items())}
    state["module.x._orig_mod.weight"] = weight()
    bank = FilterBank.from_checkpoint(saved(tmp_path / "net.bin", state), "mine", source="s", licence="l")
    assert [(row["layer"], row["depth"], row["kernel_size"]) for row in bank.layers().to_pylist()] == [
        *(("1", 0, 3), ("0", 1, 5), ("x", 2, 7))
    ]
    assert torch.equal(bank.select(k=5).filters, net[0].weight[:, 0])
    assert {(row["model"], row["source"], row["licence"]) for row in bank.layers().to_pylist()} == {("mine", "s", "l")}


def test_a_model_and_its_checkpoint_give_the_same_filters(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 7, groups=8), nn.Sequential(nn.Conv2d(8, 16, 7, groups=8)))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    read, direct = FilterBank.from_checkpoint(tmp_path / "net.safetensors"), FilterBank.from_model(net, "net")
    assert torch.equal(read.filters, direct.filters)
    same = ["model", "layer", "depth", "normalised_depth", "channel", "kernel_size"]
    assert read.metadata.select(same).equals(direct.metadata.select(same))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_shared_weight_counts_once_per_model(tmp_path: Path, zipped: bool) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 7, groups=8), nn.Conv2d(8, 8, 7, groups=8), nn.Conv2d(8, 8, 7, groups=8))
    net[1].weight = net[0].weight
    path = saved(tmp_path / "net.pt", net.state_dict(), _use_new_zipfile_serialization=zipped)
    bank = FilterBank.from_checkpoint(path)
    assert bank.layers()["layer"].to_pylist() == ["0", "2"]
    assert torch.equal(bank.filters, FilterBank.from_model(net).filters)
    shared = weight()
    collection = saved(tmp_path / "two.pt", {"a/x.weight": shared, "b/x.weight": shared})
    assert len(FilterBank.from_checkpoint(collection)) == 8


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_layer_that_is_there_with_and_without_its_wrapper(tmp_path: Path, suffix: str) -> None:
    state = {"module.a.weight": weight(1.0), "a.weight": weight(2.0)}
    path = tmp_path / f"net.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    for read in (FilterBank.from_checkpoint, state_dict):
        with pytest.raises(ValueError, match=f"net.{suffix} holds a.* twice, with and without what DataParallel"):
            read(path)
    torch.save({"module.a.weight": (shared := weight()), "a.weight": shared}, tmp_path / "shared.pth")
    assert len(FilterBank.from_checkpoint(tmp_path / "shared.pth")) == 4
    assert list(state_dict(tmp_path / "shared.pth")) == ["a.weight"]


def test_only_weights_of_the_right_shape_count(tmp_path: Path) -> None:
    state = {
        "good.weight": weight(),
        "one_channel.weight": torch.ones(1, 1, 7, 7),
        "dense.weight": torch.ones(4, 2, 7, 7),
        "table": weight(),  # not a weight by its name
        "layer_scale.weight": torch.ones(4, 1, 1, 1),
        "vector.weight": torch.ones(4),
        "optimizer.state.good.weight": weight(),
        "exp_avg.good.weight": weight(),
        "state.good.exp_avg_sq.weight": weight(),
    }
    save_file(state, tmp_path / "net.safetensors")
    for path in (tmp_path / "net.safetensors", saved(tmp_path / "net.pt", state)):
        assert FilterBank.from_checkpoint(path).layers()["layer"].to_pylist() == ["good"]


def test_tensors_of_other_sizes_and_types_are_named_in_a_warning(tmp_path: Path) -> None:
    state = {"a.weight": weight(), "b.weight": torch.ones(4, 1, 1, 7), "c.weight": weight().to(torch.int8)}
    with pytest.warns(UserWarning, match=r"left out 2 .*b\.weight \(1x7\), c\.weight \(7x7 torch\.int8\)"):
        bank = FilterBank.from_checkpoint(saved(tmp_path / "net.pt", state))
    assert len(bank) == 4
    del state["a.weight"]
    with pytest.raises(ValueError, match=r"no depthwise filters in net\.pt: .* other sizes or types: b\.weight"):
        FilterBank.from_checkpoint(saved(tmp_path / "net.pt", state))


def test_the_arguments_that_timm_saves_are_harmless(tmp_path: Path) -> None:
    content = {"state_dict": {"c.weight": weight()}, "args": argparse.Namespace(lr=0.1)}
    assert len(FilterBank.from_checkpoint(saved(tmp_path / "best.pth.tar", content))) == 4


class NeedsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("should-not-exist",)


class Config:
    """An object of the author's own, as training scripts save them."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [NeedsCode(), Config(), nn.Conv2d(4, 4, 7, groups=4)])
def test_a_pickle_that_needs_code_is_refused(
    tmp_path: Path, content: Any, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pth"
    torch.save({"model": {"c.weight": weight()}, "x": content}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"net\.pth is a pickle that needs code to run \(\S+\); .*never runs code.*save"
    ):
        FilterBank.from_checkpoint(path)
    assert os.listdir(tmp_path) == ["net.pth"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pth", {"c.weight": weight()}).read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>", "noise": bytes(range(256))}
    contents["archive"] = b"PK\x03\x04" + bytes(40) + b"PK\x05\x06" + b"\xff" * 18
    contents["plain"] = pickle.dumps({"c.weight": [1.0]})
    large = saved(tmp_path / "large.pth", {"c.weight": torch.zeros(200, 1, 7, 7)}).read_bytes()
    contents |= {f"cut{size}": large[:size] for size in range(1000, len(large), 3000)}  # to torch some are OSErrors
    for name, content in contents.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.pth is truncated, damaged, or no PyTorch checkpoint") as caught:
            FilterBank.from_checkpoint(tmp_path / f"{name}.pth")
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"c.weight": weight(channels=1000)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"net\.safetensors is not a complete safetensors file; it may be truncated"):
        FilterBank.from_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.torch.jit", "error:.*looks like a TorchScript")
@pytest.mark.parametrize("read", [FilterBank.from_checkpoint, state_dict])
def test_whole_files_of_other_kinds_are_called_what_they_are(data_dir: Path, tmp_path: Path, read: Any) -> None:
    np.save(tmp_path / "filters.npy", weight()[:, 0].numpy())
    with pytest.raises(ValueError, match="is an array of numpy and no checkpoint: give it to mkf fit"):
        read(tmp_path / "filters.npy")
    mkf.keys.paper8().save(tmp_path / "keys.safetensors")
    for keys in (tmp_path / "keys.safetensors", data_dir / "keys" / "paper8.txt"):
        with pytest.raises(ValueError, match="is a key file and no network: give it to --keys"):
            read(keys)
    torch.jit.trace(nn.Conv2d(4, 4, 7, groups=4), weight().view(1, 4, 7, 7)).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match="is a TorchScript program and no checkpoint: save its state_dict"):
        read(tmp_path / "net.pt")


def test_what_holds_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        FilterBank.from_checkpoint(saved(tmp_path / "a.pt", [1, 2]))
    with pytest.raises(ValueError, match=r"no weights in b\.pt: looked for model_ema, .*, found net, epoch"):
        FilterBank.from_checkpoint(saved(tmp_path / "b.pt", {"net": {"c.weight": weight()}, "epoch": 1}))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        FilterBank.from_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(IsADirectoryError, match=r"is a folder.*FilterBank\.open"):
        FilterBank.from_checkpoint(tmp_path)


def test_what_is_written_can_be_read_by_others(tmp_path: Path) -> None:
    path, shared = tmp_path / "net.safetensors", weight()
    old = os.umask(0o022)
    try:
        write(path, {"a.weight": shared, "b.weight": shared}, {"licence": "MIT"})
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
    assert FilterBank.from_checkpoint(path).layers()["licence"].to_pylist() == ["MIT", "MIT"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write(tmp_path / "folder", {"a.weight": weight()}, {})
    assert os.listdir(tmp_path) == ["folder"]
