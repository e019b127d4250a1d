"""Networks that get keys and give them back."""

import copy
import importlib
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mkf
from mkf.nn import conversion_report, convert, restore

convert_module = importlib.import_module("mkf.nn.convert")  # mkf.nn.convert is the function

TINY = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5}


def tiny() -> nn.Module:
    """A small ConvNeXt with filters of ordinary size: timm's are initialised near zero."""
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", **TINY)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            nn.init.normal_(layer.weight)
        if hasattr(layer, "gamma"):
            nn.init.ones_(layer.gamma)
    return model.eval()


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def own_keys(model: nn.Module) -> tuple[nn.Module, mkf.KeySet]:
    """A model whose filters are scaled and shifted copies of eight, and those eight."""
    generator = torch.Generator().manual_seed(2)
    keys = mkf.KeySet(torch.randn(8, 7, 7, generator=generator))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            index = torch.randint(8, (layer.groups,), generator=generator)
            scale, shift = torch.randn(2, layer.groups, 1, 1, generator=generator)
            layer.weight.data = (scale * keys.filters[index] + shift)[:, None]
    return model, keys


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images())


def test_a_network_whose_filters_are_the_keys_computes_what_it_did() -> None:
    model, keys = own_keys(tiny())
    exact = logits(model)
    converted = convert(copy.deepcopy(model), keys)
    assert sum(isinstance(layer, mkf.KeyConv2d) for layer in converted.modules()) == 5
    torch.testing.assert_close(logits(converted), exact, rtol=1e-4, atol=1e-5)
    assert conversion_report(converted).layers[0].residual < 1e-5


def test_restored_is_an_ordinary_network_with_the_same_output_and_state() -> None:
    model = tiny()
    names = list(model.state_dict())
    converted = convert(model, mkf.keys.paper8())
    assert converted is model
    before = logits(converted)
    restored = restore(converted)
    assert restored is model
    assert not any(isinstance(layer, mkf.KeyConv2d) for layer in restored.modules())
    assert list(restored.state_dict()) == names
    torch.testing.assert_close(logits(restored), before, rtol=1e-4, atol=1e-5)
    timm.create_model("convnext_atto", **TINY).load_state_dict(restored.state_dict())
    with pytest.raises(ValueError, match="no report"):
        conversion_report(restored)


def test_filters_are_those_of_the_affine_fit() -> None:
    model, keys = tiny(), mkf.keys.paper8()
    conv = model.stages[2].blocks[1].conv_dw
    fit = mkf.affine_fit(conv.weight.detach()[:, 0], keys)
    layer = convert(model, keys).stages[2].blocks[1].conv_dw
    expected = fit.scale[:, None, None] * keys.filters[fit.index.long()] + fit.shift[:, None, None]
    torch.testing.assert_close(layer.weight[:, 0], expected)
    report = next(r for r in conversion_report(model).layers if r.name == "stages.2.blocks.1.conv_dw")
    assert report.filters == 24
    assert report.residual == pytest.approx(fit.residual.mean().item(), rel=1e-5)
    assert report.worst_residual == pytest.approx(fit.residual.max().item(), rel=1e-5)
    assert report.keys_used == len(fit.index.unique())


def test_the_report_of_parameters_that_were_loaded_or_replaced_since() -> None:
    model, keys = own_keys(tiny())
    saved = convert(copy.deepcopy(model), keys).state_dict()
    loaded = convert(tiny(), keys)
    before = conversion_report(loaded).layers[0]
    assert before.residual > 0.1
    loaded.load_state_dict(saved)
    report = conversion_report(loaded).layers[0]
    assert (report.residual, report.worst_residual) == (None, None)
    assert report.keys_used == len(saved[f"{report.name}.index"].unique())
    restore(loaded.stages[0])
    assert len(conversion_report(loaded).replaced) == 4
    assert "restored" in conversion_report(loaded).skipped[0].reason


def test_report_of_a_batch() -> None:
    model = tiny().train()
    model.stages[0].blocks[0].conv_dw.eval()
    reference = copy.deepcopy(model).eval()
    seen = {}
    name = "stages.1.blocks.0.conv_dw"
    layer = reference.get_submodule(name)
    layer.register_forward_hook(lambda _, x, y: seen.update(x=x[0].double(), y=y.double()))
    reference(images())
    convert(model, mkf.keys.paper8(), batch=images())
    report = conversion_report(model)
    keyed = model.get_submodule(name)
    weight = keyed.weight.double()
    y = nn.functional.conv2d(seen["x"], weight, keyed.bias.double(), padding=3, groups=keyed.groups)
    error = ((y - seen["y"]).norm() / seen["y"].norm()).item()
    row = next(r for r in report.layers if r.name == name)
    assert row.output_error == pytest.approx(error, rel=1e-3)
    assert report.share > 0
    saved = sum(r.seconds - r.seconds_with_keys for r in report.layers)
    expected = report.seconds / (report.seconds - saved) if report.share < 1 else None  # on a machine that is busy
    assert report.expected_speed_up == pytest.approx(expected)
    assert model.training
    assert not model.stages[0].blocks[0].conv_dw.training
    assert not any(module._forward_hooks for module in model.modules())
    text = str(report)
    assert name in text
    assert "5 of 5 depthwise layers" in text
    assert ("too busy" if expected is None else "times as fast") in text


def test_a_batch_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="channels"):
        convert(model, mkf.keys.paper8(), batch=torch.zeros(1, 5, 32, 32))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="no report"):
        conversion_report(model)


class Odd(nn.Module):
    """One layer of every kind that is left alone, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.fits = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.again = self.fits
        self.small = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.twice = nn.Conv2d(4, 8, 7, padding=3, groups=4)
        self.reflects = nn.Conv2d(4, 4, 7, padding=3, groups=4, padding_mode="reflect")
        self.normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 7, padding=3, groups=4))
        self.hooked = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.hooked.register_forward_hook(lambda *_: None)
        self.stored = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.stored.register_state_dict_pre_hook(lambda *_: None)
        self.weighed = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.weighed.weight.register_hook(lambda g: g)
        self.replaced = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.replaced.forward = lambda x: x
        self.masked = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.masked.register_buffer("mask", torch.ones(4))
        self.own = type("Own", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 4, 7, groups=4)
        self.same = timm.layers.Conv2dSame(4, 4, 7, groups=4)
        self.uneven = timm.layers.Conv2dSame(4, 4, 7, stride=2, groups=4)
        self.kept = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.dense = nn.Conv2d(4, 4, 7)


def test_what_is_left_alone_and_why() -> None:
    model = Odd()
    x = torch.randn(1, 4, 9, 9)
    convert(model, mkf.keys.paper8(), lambda _, name: name != "kept")
    reasons = {report.name: report.reason for report in conversion_report(model).layers}
    assert {name for name, reason in reasons.items() if reason is None} == {"fits", "same"}
    assert model.again is model.fits
    for name, word in {
        "small": "5x5",
        "twice": "channel multiplier of 2",
        "reflects": "reflect",
        "normed": "parametrised",
        "hooked": "hooks",
        "stored": "hooks",
        "weighed": "hooks",
        "replaced": "forward was replaced",
        "masked": "more than weight and bias",
        "own": "Own",
        "uneven": "one side",
        "kept": "filter_fn",
    }.items():
        assert word in reasons[name], name
    assert "dense" not in reasons
    assert model.same(x).shape == (1, 4, 9, 9)
    assert len(conversion_report(model).skipped) == 12
    assert "left alone" in str(conversion_report(model))


def test_layers_that_share_their_filters_are_left_alone() -> None:
    model = nn.Sequential(*(nn.Conv2d(6, 6, 7, padding=3, groups=6) for _ in range(3)))
    model[2].weight = model[0].weight
    converted = mkf.convert(model, mkf.keys.paper8())
    assert [type(layer) for layer in converted] == [nn.Conv2d, mkf.KeyConv2d, nn.Conv2d]
    assert converted[2].weight is converted[0].weight
    assert "shares parameters" in str(mkf.conversion_report(converted))


def test_a_dilated_conv2d_same_keeps_its_dilation() -> None:
    conv, keys = own_keys(nn.Sequential(timm.layers.Conv2dSame(8, 8, 7, dilation=2, groups=8)))
    x = torch.randn(2, 8, 15, 14)
    expected = conv(x)
    torch.testing.assert_close(convert(conv, keys)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_report_leaves_statistics_of_batches_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 7, padding=3, groups=8)).train()
    convert(model, mkf.keys.paper8(), batch=torch.randn(2, 8, 9, 9) + 3)
    assert model.training
    assert model[1].training
    assert not model[0].running_mean.any()
    assert model[0].num_batches_tracked == 0


def test_dead_filters_do_not_count_in_the_residual() -> None:
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    with torch.no_grad():
        conv.weight[3:] = 0.5
    report = conversion_report(convert(nn.Sequential(conv), mkf.keys.paper8())).layers[0]
    fit = mkf.affine_fit(conv.weight.detach()[:3, 0], mkf.keys.paper8())
    assert report.residual == pytest.approx(fit.residual.mean().item())


def test_a_module_that_is_used_twice_has_one_replacement() -> None:
    layer = nn.Conv2d(6, 6, 7, padding=3, groups=6)
    converted = mkf.convert(nn.Sequential(layer, nn.ReLU(), layer), mkf.keys.paper8())
    assert isinstance(converted[0], mkf.KeyConv2d)
    assert converted[0] is converted[2]


def test_layers_with_hooks_are_not_restored() -> None:
    model = mkf.convert(nn.Sequential(nn.Conv2d(6, 6, 7, padding=3, groups=6)), mkf.keys.paper8())
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="have hooks, which would be lost: remove them from 0"):
        mkf.restore(model)
    assert isinstance(model[0], mkf.KeyConv2d)
    handle.remove()
    assert isinstance(mkf.restore(model)[0], nn.Conv2d)


def test_conv2d_same_computes_the_same() -> None:
    conv, keys = own_keys(nn.Sequential(timm.layers.Conv2dSame(8, 8, 7, groups=8)))
    x = torch.randn(2, 8, 11, 6)
    expected = conv(x)
    torch.testing.assert_close(convert(conv, keys)(x), expected, rtol=1e-4, atol=1e-4)


def test_two_sizes_in_two_calls() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    convert(model, mkf.keys.paper8())
    convert(model, mkf.keys.analytic("B", 3))
    report = conversion_report(model)
    assert [layer.reason for layer in report.layers] == [None, None]
    assert [layer.kernel_size for layer in report.layers] == [(7, 7), (3, 3)]


def test_two_calls_report_the_whole_network(monkeypatch) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 7, padding=3, groups=8)).eval()
    times = iter([[6.0, 1.0], [20.0], [4.0, 1.0], [15.0]])  # 7x7, its keys; all; 3x3, its keys; all with keys in 7x7
    monkeypatch.setattr(convert_module, "_seconds", lambda *_: next(times))
    x = torch.randn(1, 8, 9, 9)
    convert(model, mkf.keys.paper8(), batch=x)
    assert conversion_report(model).expected_speed_up == 20 / 15
    convert(model, mkf.keys.analytic("B", 3), batch=x)
    report = conversion_report(model)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert report.seconds == 20
    assert report.share == 10 / 20
    assert report.expected_speed_up == 20 / 12


class Often(nn.Module):
    """A layer that runs three times, once on nothing but zeros, and is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.conv(input=x)
        return x


def test_a_layer_that_runs_often_is_timed_each_time(monkeypatch) -> None:
    times = iter([[2.0, 1.0]] * 3 + [[8.0]])
    monkeypatch.setattr(convert_module, "_seconds", lambda *_: next(times))
    model = convert(Often().eval(), mkf.keys.paper8(), batch=torch.randn(1, 8, 9, 9))
    report = conversion_report(model)
    assert report.share == 6 / 8
    assert report.expected_speed_up == 8 / 5
    assert report.layers[0].output_error > 0


def test_layers_that_took_longer_than_their_network_give_no_forecast(monkeypatch) -> None:
    times = iter([[9.0, 1.0], [8.0]])
    monkeypatch.setattr(convert_module, "_seconds", lambda *_: next(times))
    model = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8)).eval()
    report = conversion_report(convert(model, mkf.keys.paper8(), batch=torch.randn(1, 8, 9, 9)))
    assert report.expected_speed_up is None
    assert str(report).endswith("so this machine was too busy to tell how fast it will run.")


def test_timings_take_turns(monkeypatch) -> None:
    now = iter(0.004 * i for i in range(10**6))
    monkeypatch.setattr(convert_module.time, "perf_counter", lambda: next(now))
    turns = []
    seconds = convert_module._seconds([lambda: turns.append("a"), lambda: turns.append("b")], torch.device("cpu"))
    assert seconds == pytest.approx([0.004, 0.004])
    assert turns == ["a", "b"] * 4  # the first are not timed


def test_outputs_of_zero_have_no_relative_error() -> None:
    model = convert(Often().eval(), mkf.keys.paper8(), batch=torch.zeros(1, 8, 9, 9))
    assert conversion_report(model).layers[0].output_error is None
    assert "nan" not in str(conversion_report(model))


def test_a_model_that_is_a_convolution() -> None:
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    layer = convert(conv, mkf.keys.paper8())
    assert isinstance(layer, mkf.KeyConv2d)
    assert len(conversion_report(layer).replaced) == 1
    assert isinstance(restore(layer), nn.Conv2d)


def test_from_scratch_rotates_blocks_and_random_follows_the_seed() -> None:
    keys = mkf.keys.paper8()
    model = convert(nn.Sequential(*(nn.Conv2d(64, 64, 7, groups=64) for _ in range(3))), keys, assign="uniform")
    assert [int(layer.index[0]) for layer in model] == [0, 1, 2]
    assert all(layer.residual is None for layer in model)
    assert conversion_report(model).layers[0].residual is None
    one, same, other = (
        convert(nn.Sequential(nn.Conv2d(64, 64, 7, groups=64)), keys, assign="uniform", order="random", seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one[0].index, same[0].index)
    assert not torch.equal(one[0].index, other[0].index)


def test_a_converted_network_trains_what_was_asked() -> None:
    model = convert(tiny().train(), mkf.keys.paper8(), train=("scale", "bias"))
    model(images()).sum().backward()
    layer = model.stages[0].blocks[0].conv_dw
    assert layer.scale.grad is not None
    assert layer.bias.grad is not None
    assert layer.shift.grad is None
    assert layer.keys.grad is None


def test_pickle_deepcopy_and_bank() -> None:
    model = convert(tiny(), mkf.keys.paper8())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert len(conversion_report(other).layers) == 5
    bank = mkf.FilterBank.from_model(model)
    assert len(bank) == 8 + 16 + 2 * 24 + 32
    assert mkf.affine_fit(bank, mkf.keys.paper8()).residual.max() < 1e-4


def test_errors_leave_the_model_as_it_was() -> None:
    model = tiny()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = mkf.keys.paper8()
    with pytest.raises(ValueError, match=r"no layer can have these keys.*7x7"):
        convert(model, mkf.keys.analytic("B", 3))
    with pytest.raises(ValueError, match="no depthwise convolution"):
        convert(nn.Sequential(nn.Linear(3, 3)), keys)
    with pytest.raises(TypeError, match="torch module"):
        convert("convnext", keys)
    with pytest.raises(ValueError, match="keys must be real numbers"):
        convert(model, "paper8")
    with pytest.raises(TypeError, match="before"):
        convert(torch.compile(model), keys)
    with pytest.raises(ValueError, match="train="):
        convert(model, keys, train=("scales",))
    with pytest.raises(ValueError, match="assign="):
        convert(model, keys, assign="nearest")
    with pytest.raises(ValueError, match="order="):
        convert(model, keys, assign="uniform", order="sorted")
    assert not any(isinstance(layer, mkf.KeyConv2d) for layer in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_keys_as_a_tensor_and_a_second_time() -> None:
    model = convert(tiny(), mkf.keys.paper8().filters)
    assert len(conversion_report(model).replaced) == 5
    with pytest.raises(ValueError, match="all have keys already"):
        convert(model, mkf.keys.paper8())
    with pytest.raises(TypeError, match="torch module"):
        restore("convnext")


def test_the_meta_device() -> None:
    model = tiny().to("meta")
    with pytest.raises(ValueError, match="load its state first"):
        convert(model, mkf.keys.paper8())
    report = conversion_report(convert(model, mkf.keys.paper8(), assign="uniform"))
    assert "5 of 5 depthwise layers" in str(report)


def test_filters_that_are_not_finite_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 7, groups=8), nn.Conv2d(8, 8, 7, groups=8))
    model[0].weight.data[3, 0, 2, 2] = float("nan")
    convert(model, mkf.keys.paper8())
    assert isinstance(model[0], nn.Conv2d)
    assert "NaN" in conversion_report(model).skipped[0].reason
