"""Depthwise layers of torch models."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

import mkf
from mkf.bank import FilterBank


def depthwise(channels: int = 4, k: int = 7, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(channels, kwargs.pop("out", channels), k, groups=channels, **kwargs)


def test_the_filters_are_the_weights_in_module_order() -> None:
    model = nn.Sequential(depthwise(4, 7, stride=2), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 6, 1), depthwise(6, 3)))
    bank = FilterBank.from_model(model, "net", source="a test", licence="MIT")
    rows = bank.metadata.to_pylist()
    assert [row["layer"] for row in rows] == ["2.1"] * 6 + ["0"] * 4
    assert [row["depth"] for row in rows] == [1] * 6 + [0] * 4
    assert [row["normalised_depth"] for row in rows] == [1.0] * 6 + [0.0] * 4
    assert [row["stride"] for row in rows] == [1] * 6 + [2] * 4
    assert {(row["model"], row["source"], row["licence"]) for row in rows} == {("net", "a test", "MIT")}
    assert torch.equal(bank.select(k=7).filters, model[0].weight[:, 0])
    assert torch.equal(bank.select(k=3).filters, model[2][1].weight[:, 0])


def test_a_channel_multiplier_gives_more_filters_than_channels() -> None:
    conv = depthwise(4, 5, out=12)
    bank = FilterBank.from_model(conv)
    assert torch.equal(bank.filters, conv.weight[:, 0])
    assert bank.metadata["channel"].to_pylist() == list(range(12))


def test_what_is_not_depthwise_is_left_out() -> None:
    model = nn.Sequential(
        depthwise(4, 7),
        nn.Conv2d(4, 4, 7),  # groups 1
        nn.Conv2d(4, 4, 7, groups=2),
        nn.Conv2d(1, 4, 7),  # shaped like a depthwise weight, but groups 1
        nn.ConvTranspose2d(4, 4, 7, groups=4),
        nn.Conv1d(4, 4, 7, groups=4),
        nn.Conv3d(4, 4, 7, groups=4),
    )
    bank = FilterBank.from_model(model)
    assert bank.layers()["layer"].to_pylist() == ["0"]
    assert bank.models == ("Sequential",)


@pytest.mark.parametrize("conv", [Conv2dSame(4, 4, 3, stride=2, groups=4), depthwise(4, 3, dilation=2, padding=2)])
def test_subclasses_and_dilation(conv: nn.Module) -> None:
    assert len(FilterBank.from_model(conv)) == 4


def test_unequal_strides_are_unknown() -> None:
    assert FilterBank.from_model(depthwise(stride=(1, 2))).metadata["stride"].null_count == 4


def test_a_module_used_twice_counts_once() -> None:
    conv = depthwise()
    assert len(FilterBank.from_model(nn.Sequential(conv, nn.ReLU(), conv))) == 4


def test_a_weight_that_layers_share_counts_once_under_the_first_name() -> None:
    first, second, third = depthwise(stride=2), depthwise(), depthwise()
    second.weight = first.weight
    third.weight.data = first.weight.data.clone()  # equal, but its own
    rows = FilterBank.from_model(nn.Sequential(first, second, third)).layers().to_pylist()
    assert [(row["layer"], row["depth"], row["stride"], row["filters"]) for row in rows] == [
        ("0", 0, 2, 4), ("2", 1, 1, 4),
    ]  # fmt: skip


def wrapped_in_data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def compiled_inside(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        setattr(model, name, torch.compile(child))
    return nn.DataParallel(torch.compile(model))


@pytest.mark.parametrize("wrap", [wrapped_in_data_parallel, compiled, compiled_inside])
def test_wrappers_are_looked_through(wrap) -> None:
    model = nn.ModuleDict({"module": depthwise(), "x": nn.Sequential(depthwise(3, 5))})
    plain = FilterBank.from_model(model)
    assert plain.layers()["layer"].to_pylist() == ["x.0", "module"]
    assert FilterBank.from_model(wrap(model)).metadata.equals(plain.metadata)


def test_distributed_data_parallel(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        bank = FilterBank.from_model(nn.parallel.DistributedDataParallel(nn.Sequential(depthwise())))
    finally:
        torch.distributed.destroy_process_group()
    assert bank.layers()["layer"].to_pylist() == ["0"]
    assert bank.models == ("Sequential",)


def test_half_precision_weights_become_float32() -> None:
    model = depthwise().to(torch.bfloat16)
    filters = FilterBank.from_model(model).filters
    assert filters.dtype == torch.float32
    assert torch.equal(filters, model.weight[:, 0].float())


def test_parametrised_weights_are_those_in_force() -> None:
    conv = nn.utils.parametrizations.weight_norm(depthwise())
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(3)
    assert torch.equal(FilterBank.from_model(conv).filters, conv.weight[:, 0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_of_old_style_normalisation_are_those_of_the_next_forward(normalise) -> None:
    conv, trained = normalise(depthwise(k=3)), normalise(depthwise(k=3)).eval()
    conv.load_state_dict(trained.state_dict())
    before = conv.eval().weight.detach().clone()
    filters = FilterBank.from_model(conv).filters
    conv(torch.zeros(1, 4, 9, 9))
    assert not torch.equal(conv.weight, before)
    assert torch.equal(filters, conv.weight[:, 0])


def test_other_kernel_sizes_are_named_in_a_warning() -> None:
    model = nn.Sequential(depthwise(), depthwise(k=(1, 7)), depthwise(k=4), depthwise(k=13), depthwise(k=1))
    with pytest.warns(UserWarning, match=r"net: left out 4 depthwise .*: 1 \(1x7\), 2 \(4x4\), 3 \(13x13\), 4 \(1x1\)"):
        bank = FilterBank.from_model(model, "net")
    assert bank.layers()["normalised_depth"].to_pylist() == [0.0]


def test_a_layer_of_shared_keys_is_read_by_its_materialised_weight() -> None:
    class Shared(nn.Module):
        """What a key convolution offers, without being a Conv2d."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.randn(2, 5, 5))
            self.register_buffer("index", torch.tensor([0, 1, 1]))
            self.kernel_size, self.stride = (5, 5), (2, 2)

        @property
        def weight(self) -> torch.Tensor:
            return self.keys[self.index][:, None]

    shared = Shared()
    bank = FilterBank.from_model(nn.Sequential(nn.ModuleDict({"a": shared}), nn.ParameterDict()))
    assert torch.equal(bank.filters, shared.weight[:, 0])
    assert bank.layers()["stride"].to_pylist() == [2]


def test_a_compiled_layer_of_shared_keys_counts_once() -> None:
    layer = mkf.nn.KeyConv2d(4, 7, mkf.keys.paper8())
    bank = FilterBank.from_model(nn.Sequential(torch.compile(layer), depthwise(3)))
    rows = [(row["layer"], row["depth"], row["filters"]) for row in bank.layers().to_pylist()]
    assert rows == [("0", 0, 4), ("1", 1, 3)]
    assert torch.equal(bank.select(layer="0").filters, layer.weight[:, 0])


def test_a_model_without_depthwise_filters_says_what_it_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, (3, 5), groups=4))
    with pytest.raises(ValueError, match=r"no depthwise filters in this Sequential: of its 2 Conv2d .* 1 \(3x5\)"):
        FilterBank.from_model(model)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="layer '0': its weights are on the meta device"):
        FilterBank.from_model(nn.Sequential(depthwise(device="meta")))


def test_what_is_no_module_is_sent_elsewhere() -> None:
    with pytest.raises(TypeError, match="from_timm"):
        FilterBank.from_model("convnext_tiny")  # type: ignore[arg-type]
