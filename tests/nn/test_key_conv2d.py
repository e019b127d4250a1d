"""KeyConv2d as a member of networks: made, fitted, moved, saved, compiled, exported, trained."""

import copy
import inspect
import io
import pickle

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mkf
from mkf import KeyConv2d
from mkf.bank.compact import compact

PAPER, ANALYTIC = mkf.keys.paper8(), mkf.keys.analytic("B")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def depthwise(channels=24, k=7, **options):
    options.setdefault("padding", k // 2)
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, k, groups=channels, **options)


@pytest.fixture
def layer():
    """A layer of which no number is special."""
    layer = KeyConv2d.from_conv2d(depthwise(), ANALYTIC, train=("scale", "shift", "bias"))
    with torch.no_grad():
        layer.scale.add_(noise(24))
        layer.shift.add_(noise(24, seed=1))
    return layer


@pytest.fixture
def x():
    return noise(2, 24, 9, 11)


def assert_same(layer, other, x):
    torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=1e-5)


class TestFromScratch:
    def test_every_filter_is_a_key(self, x):
        layer = KeyConv2d(24, 7, PAPER, padding=3)
        assert torch.equal(layer.weight[:, 0], PAPER.filters[layer.index])
        assert torch.bincount(layer.index).tolist() == [3] * 8
        assert not layer.bias.any()
        assert layer(x).shape == x.shape
        assert_same(layer, layer.to_conv2d(), x)

    @pytest.mark.parametrize("train", [("shift", "bias"), ("bias",), (), ("scale", "keys"), "shift"])
    def test_what_trains(self, train, x):
        layer = KeyConv2d(24, 7, PAPER, padding=3, train=train)
        names = {train} if isinstance(train, str) else set(train)
        out = layer(x)
        assert out.requires_grad == bool(names)
        if names:
            out.square().sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()} == names
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == names
        assert set(layer.state_dict()) == {"keys", "index", "scale", "shift", "bias"}
        layer.set_trainable(("keys",))
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["keys"]
        layer.set_trainable(("bias",))
        assert "keys" in dict(layer.named_buffers())

    def test_options(self, x):
        layer = KeyConv2d(
            24, (7, 7), ANALYTIC.filters, bias=False, padding="same", assign=[0, 1] + [0] * 6, dtype=torch.float64
        )
        assert layer.bias is None
        assert (layer.index == 1).all()
        assert layer.scale.dtype == torch.float64
        assert layer(x.double()).dtype == torch.float64
        layer = KeyConv2d(24, 7, ANALYTIC, order="random", generator=torch.Generator().manual_seed(3))
        again = KeyConv2d(24, 7, ANALYTIC, order="random", generator=torch.Generator().manual_seed(3))
        assert torch.equal(layer.index, again.index)

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((24, 5, PAPER), {}, "the layer is 5x5, the keys are 7x7: give keys of its size"),
            ((24, (7, 5), PAPER), {}, "the layer is 7x5, .* there are no keys of its size"),
            ((0, 7, PAPER), {}, "channels=0"),
            ((24, 7, torch.ones(8, 7, 7)), {}, "key 1 is constant"),
            ((24, 7, PAPER), {"padding_mode": "reflect"}, "zeros only"),
            ((24, 7, PAPER), {"padding": "full"}, "'same' or 'valid'"),
            ((24, 7, PAPER), {"padding": "same", "stride": 2}, "needs stride 1"),
            ((24, 7, PAPER), {"stride": 0}, "stride=0"),
            ((24, 7, PAPER), {"train": ("weight",)}, "choose from scale, shift, bias, keys"),
            ((24, 7, PAPER), {"assign": "fit"}, "'fit' where there are filters"),
            ((24.0, 7, PAPER), {}, "channels=24.0: expected a whole number"),
            ((24, 7, "paper8"), {}, "keys must be real numbers"),
            ((24, 7, PAPER), {"tolerance": -1}, "tolerance=-1: it is a relative error"),
            ((24, 7, PAPER), {"tolerance": "x"}, "tolerance='x'"),
            ((24, 7, PAPER), {"backend": "abacus"}, "no such implementation; there are native"),
        ],
    )
    def test_what_is_refused(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            KeyConv2d(*arguments, **options)

    def test_a_dtype_that_is_no_floating_point_one(self):
        with pytest.raises(TypeError, match=r"dtype=torch\.complex64"):
            KeyConv2d(24, 7, PAPER, dtype=torch.complex64)

    def test_a_wrong_input_says_so(self, layer, x):
        with pytest.raises(ValueError, match="but x has 23 channels"):
            layer(x[:, 1:])


class TestFromConv2d:
    @pytest.mark.parametrize(
        "options", [{}, {"stride": 2}, {"padding": "same"}, {"bias": False}, {"dilation": 2, "padding": (6, 5)}]
    )
    def test_filters_that_are_keys_are_kept(self, options, x):
        conv = depthwise(**options)
        with torch.no_grad():
            conv.weight.copy_((noise(24, 1, 1) * ANALYTIC.filters[torch.arange(24) % 8] + noise(24, 1, 1))[:, None])
        layer = KeyConv2d.from_conv2d(conv.eval(), ANALYTIC)
        assert layer.residual.max() < 1e-5
        assert not layer.training
        assert_same(conv, layer, x)
        back = layer.to_conv2d()
        assert_same(conv, back, x)
        torch.testing.assert_close(back.weight, conv.weight, rtol=1e-5, atol=1e-5)
        for name in inspect.signature(nn.Conv2d).parameters:
            if hasattr(conv, name) and name not in ("bias", "weight"):
                assert getattr(conv, name) == getattr(layer, name) == getattr(back, name), name

    def test_others_are_fitted(self):
        conv = depthwise()
        layer = KeyConv2d.from_conv2d(conv, PAPER)
        fit = mkf.affine_fit(conv.weight[:, 0], PAPER)
        assert torch.equal(layer.residual, fit.residual.detach())
        assert torch.equal(layer.index, fit.index)
        assert torch.equal(layer.bias, conv.bias)
        error = (layer.weight - conv.weight).flatten(1).norm(dim=1)
        spread = (conv.weight - conv.weight.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1)
        torch.testing.assert_close(error / spread, fit.residual)
        assert f"mean residual={fit.residual.mean():.3f}" in repr(layer)

    def test_a_new_assignment_instead_of_a_fit(self):
        layer = KeyConv2d.from_conv2d(depthwise(stride=2), PAPER, assign="uniform", rotation=2, train=("bias",))
        assert (layer.stride, layer.index[0].item(), layer.residual) == ((2, 2), 2, None)
        assert torch.equal(layer.weight[:, 0], PAPER.filters[layer.index])

    def test_dtype_and_nothing_shared(self):
        conv = depthwise().bfloat16()
        layer = KeyConv2d.from_conv2d(conv, PAPER)
        assert (layer.scale.dtype, layer.keys.dtype) == (torch.bfloat16, torch.float32)
        assert layer(noise(1, 24, 8, 8).bfloat16()).dtype == torch.bfloat16
        before = layer.bias.clone()
        conv.bias.data.add_(1)
        assert torch.equal(layer.bias, before)

    @pytest.mark.parametrize(
        ("conv", "error", "message"),
        [
            (nn.Conv2d(8, 8, 7), ValueError, "8 channels in, 8 out, 1 groups"),
            (nn.Conv2d(8, 16, 7, groups=8), ValueError, "multiplier of 2: KeyConv2d has one filter"),
            (depthwise(8, 5), ValueError, "the layer is 5x5, the keys are 7x7"),
            (depthwise(8, padding_mode="circular"), ValueError, "zeros only"),
            (nn.Conv2d(8, 8, (7, 3), groups=8), ValueError, "the layer is 7x3"),
            (Conv2dSame(8, 8, 7, groups=8), TypeError, "Conv2dSame computes otherwise"),
            (nn.Conv1d(8, 8, 7, groups=8), TypeError, "not a Conv1d"),
        ],
    )
    def test_what_is_refused(self, conv, error, message):
        with pytest.raises(error, match=message):
            KeyConv2d.from_conv2d(conv, PAPER)

    def test_the_meta_device(self):
        with pytest.raises(ValueError, match="no filters to fit: load its state first"):
            KeyConv2d.from_conv2d(depthwise().to("meta"), PAPER)
        assert KeyConv2d.from_conv2d(depthwise().to("meta"), PAPER, assign="uniform").weight.is_meta

    def test_filters_that_are_not_finite(self):
        conv = depthwise()
        conv.weight.data[3, 0, 2, 2] = torch.nan
        with pytest.raises(ValueError, match="1 of 24 filters hold NaN"):
            KeyConv2d.from_conv2d(conv, PAPER)


class TestAttributes:
    def test_it_looks_like_the_convolution_it_is(self, layer, x):
        assert torch.equal(layer(input=x), layer(x))
        conv = layer.to_conv2d()
        for name in inspect.signature(nn.Conv2d).parameters.keys() - {"bias", "device", "dtype"}:
            assert getattr(layer, name) == getattr(conv, name), name
        assert (layer.transposed, layer.output_padding) == (conv.transposed, conv.output_padding)
        assert layer.weight.shape == conv.weight.shape == (24, 1, 7, 7)
        assert torch.equal(layer.weight, conv.weight)
        layer.weight.sum().backward()
        torch.testing.assert_close(layer.shift.grad, torch.full((24,), 49.0))

    def test_writing_in_place_takes_effect(self, layer, x):
        layer(x)
        for write in (
            lambda: layer.keys.mul_(1.5),
            lambda: layer.keys.data[2].add_(0.3),
            lambda: layer.scale.data.mul_(2),
            lambda: layer.index.fill_(3),
        ):
            write()
            assert_same(layer, layer.to_conv2d(), x)

    def test_repr_and_explain(self, layer, x):
        text = repr(KeyConv2d(16, 7, PAPER[[0, 6]], padding=3, dilation=2, bias=False))
        assert text == (
            "KeyConv2d(16, kernel_size=(7, 7), stride=(1, 1), padding=(3, 3), dilation=(2, 2), bias=False, "
            "channels by key: {1: 8, 7: 8})"
        )
        assert layer.explain(x.double()).startswith("reference: ")
        layer.backend = "reference"
        assert layer.explain(x).startswith("reference: ")
        layer.backend = "fortran"
        with pytest.raises(ValueError, match="no such implementation"):
            layer.explain(x)
        with pytest.raises(ValueError, match="no such implementation"):
            layer(x)


class TestFitWeight:
    def test_it_takes_over_filters(self, layer, x):
        conv = depthwise()
        fit = layer.fit_weight(conv.weight, conv.bias)
        again = KeyConv2d.from_conv2d(conv, ANALYTIC)
        assert torch.equal(layer.weight, again.weight)
        assert torch.equal(layer.bias, conv.bias)
        assert torch.equal(layer.residual, fit.residual)
        layer.fit_weight(conv.weight[:, 0])

    @pytest.mark.parametrize(
        ("weight", "bias", "message"),
        [
            (noise(24, 1, 5, 5), None, r"this layer needs \(24, 1, 7, 7\)"),
            (noise(23, 7, 7), None, "weight has shape"),
            (noise(24, 7, 7), noise(3), r"this layer has one of shape \(24,\)"),
        ],
    )
    def test_what_is_refused(self, layer, weight, bias, message):
        with pytest.raises(ValueError, match=message):
            layer.fit_weight(weight, bias)
        with pytest.raises(ValueError, match="this layer has no bias"):
            KeyConv2d(24, 7, PAPER, bias=False).fit_weight(noise(24, 7, 7), noise(24))
        with pytest.raises(TypeError, match="expected a tensor, not ndarray"):
            layer.fit_weight(noise(24, 7, 7).numpy())
        before = layer.half().scale.clone()
        with pytest.raises(ValueError, match=r"beyond the 65504 that torch\.float16 reaches"):
            layer.fit_weight(noise(24, 7, 7) * 1e6)
        assert torch.equal(layer.scale, before)

    def test_the_residual_goes_with_the_fit(self, layer):
        layer.fit_weight(noise(24, 7, 7))
        layer.load_state_dict(layer.state_dict())
        assert layer.residual is None
        layer.fit_weight(noise(24, 7, 7))
        layer.reset_parameters()
        assert layer.residual is None


class TestState:
    def test_it_goes_through_a_state_dict(self, layer, x):
        other = KeyConv2d(24, 7, PAPER, padding=3)
        assert other.load_state_dict(layer.state_dict()).missing_keys == []
        assert torch.equal(other(x), layer(x))
        trains = KeyConv2d(24, 7, PAPER, padding=3, train=("keys",))
        trains.load_state_dict(layer.state_dict())
        assert torch.equal(trains.weight, layer.weight)

    @pytest.mark.parametrize("strict", [True, False])
    def test_the_filters_of_a_convolution_are_not_fitted_silently(self, strict, x):
        network = nn.Sequential(KeyConv2d(24, 7, PAPER, padding=3))
        state = nn.Sequential(depthwise()).state_dict()
        with pytest.raises(RuntimeError, match=r"0\.weight holds the filters of an nn\.Conv2d.*fit_weight"):
            network.load_state_dict(state, strict=strict)

    def test_a_compact_state_says_what_it_is(self):
        state, _ = compact({"0.weight": depthwise().weight.detach()}, PAPER)
        with pytest.raises(
            RuntimeError, match=r"0\.keys is missing, as in a compact state: load mkf\.bank\.compact\.expand"
        ):
            nn.Sequential(KeyConv2d(24, 7, PAPER, padding=3)).load_state_dict(state)

    def test_it_goes_through_safetensors_pickle_and_deepcopy(self, layer, x, tmp_path):
        from safetensors.torch import load_model, save_model

        network = nn.Sequential(layer, copy.deepcopy(layer))
        save_model(network, str(tmp_path / "model.safetensors"))
        other = nn.Sequential(KeyConv2d(24, 7, PAPER, padding=3), KeyConv2d(24, 7, PAPER, padding=3))
        load_model(other, str(tmp_path / "model.safetensors"))
        assert torch.equal(other(x), network(x))
        for same in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert torch.equal(same(x), layer(x))
            assert repr(same) == repr(layer)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True).keys() == layer.state_dict().keys()

    def test_the_meta_device(self, layer, x):
        with torch.device("meta"):
            empty = KeyConv2d(24, 7, PAPER, padding=3)
        assert all(t.is_meta for t in empty.state_dict().values())
        assert "KeyConv2d(24" in repr(empty)
        assert empty(x.to("meta")).shape == x.shape
        materialised = copy.deepcopy(empty).to_empty(device="cpu")
        materialised.load_state_dict(layer.state_dict())
        assert torch.equal(materialised(x), layer(x))
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(empty(x), layer(x))

    def test_parameters_may_be_swapped(self, layer, x, monkeypatch):
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        state, expected = copy.deepcopy(layer.state_dict()), layer(x).detach()
        with torch.no_grad():
            layer(x)
            layer.load_state_dict(state)
            assert torch.equal(layer(x), expected)
            layer.to(torch.bfloat16)
            torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("train", [("shift",), ("keys",)])
    def test_converting_does_not_round_the_keys(self, train, x):
        layer = KeyConv2d(24, 7, ANALYTIC, padding=3, train=train)
        for convert in (
            lambda m: m.bfloat16(),
            lambda m: m.half(),
            lambda m: m.to(torch.bfloat16),
            lambda m: m.double(),
        ):
            network = convert(nn.Sequential(copy.deepcopy(layer)))
            assert torch.equal(network[0].keys, ANALYTIC.filters)
            assert network[0].keys.requires_grad == ("keys" in train)
            dtype = network[0].scale.dtype
            assert network[0].bias.dtype == dtype
            torch.testing.assert_close(network(x.to(dtype)).float(), layer(x), rtol=0.05, atol=0.05)
            assert network[0].index.dtype == torch.int32

    @pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
    def test_converting_between_backward_and_a_step(self, convert, x):
        layer = KeyConv2d(24, 7, ANALYTIC, padding=3, train=("keys",))
        layer(x).square().mean().backward()
        gradient = layer.keys.grad.clone()
        convert(layer)
        assert torch.equal(layer.keys.grad, gradient)
        torch.optim.AdamW(layer.parameters()).step()

    def test_filters_of_float64(self, layer, x):
        layer, x = layer.double(), x.double()
        torch.testing.assert_close(layer.to_conv2d()(x), layer(x), rtol=1e-12, atol=1e-12)


class TestTraining:
    def test_a_step_of_an_optimiser(self, x):
        layer = KeyConv2d(24, 7, PAPER, padding=3)
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        layer(x).square().sum().backward()
        optimiser.step()
        changed = {name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])}
        assert changed == {"shift", "bias"}

    def test_autocast_and_channels_last(self, layer, x):
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        network = nn.Sequential(layer).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
        out.sum().backward()
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}

    @pytest.mark.parametrize("kind", ["timm", "torch"])
    def test_an_average_of_the_weights(self, kind, layer, x):
        from timm.utils import ModelEmaV3
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        if kind == "timm":
            average = ModelEmaV3(layer, decay=0.9)
            update = average.update
        else:
            average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            update = average.update_parameters
            update(layer)  # the first is a copy
        with torch.no_grad():
            layer.shift.add_(1)
        for _ in range(3):
            update(layer)
        assert torch.equal(average.module.keys, layer.keys)
        assert torch.equal(average.module.index, layer.index)
        expected = layer.shift - 0.9**3
        torch.testing.assert_close(average.module.shift, expected)
        assert average.module(x).shape == x.shape

    def test_distributed_data_parallel(self, x, tmp_path):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            layer = KeyConv2d(24, 7, PAPER, padding=3)
            parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
            for network in (layer, parallel):
                network(x).square().sum().backward()
            torch.testing.assert_close(parallel.module.shift.grad, layer.shift.grad)
            assert parallel.module.scale.grad is None
            assert len(mkf.FilterBank.from_model(parallel)) == 24
        finally:
            torch.distributed.destroy_process_group()

    def test_fully_sharded(self, x, tmp_path):
        """It gives the memory of the parameters back between forward and backward."""
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            whole = nn.Sequential(
                *(KeyConv2d(24, 7, PAPER, padding=3, train=("scale", "shift", "bias", "keys")) for _ in range(3))
            )
            sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (1,))
            for layer in sharded:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            for _ in range(2):
                for network in (whole, sharded):
                    network(x).square().mean().backward()
            for own, others in zip(sharded.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(own.grad.full_tensor(), others.grad)
        finally:
            torch.distributed.destroy_process_group()

    def test_a_parametrised_scale(self, x):
        class Positive(nn.Module):
            def forward(self, t):
                return t.exp()

        layer = KeyConv2d(24, 7, PAPER, padding=3, train=("scale",))
        torch.nn.utils.parametrize.register_parametrization(layer, "scale", Positive())
        assert_same(layer, layer.to_conv2d(), x)
        layer(x).sum().backward()
        assert layer.parametrizations.scale.original.grad.any()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = KeyConv2d(24, 7, ANALYTIC, padding="same")
        self.down = KeyConv2d(24, 7, PAPER, stride=2, padding=3, bias=False)

    def forward(self, x):
        return self.down(x + self.conv(x).relu())


class TestGraphs:
    def test_compile_in_one_graph(self):
        block = Block()
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((2, 24, 13, 10), (3, 24, 9, 17)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = noise(*size).to(memory_format=layout)
                out = compiled(x)
                torch.testing.assert_close(out, block(x))
                assert out.is_contiguous(memory_format=layout)
        compiled(x).sum().backward()
        compiled_gradient = block.conv.shift.grad.clone()
        block.zero_grad()
        block(x).sum().backward()
        torch.testing.assert_close(compiled_gradient, block.conv.shift.grad)

    @pytest.mark.parametrize("strict", [True, False])
    def test_export_with_dynamic_shapes(self, strict):
        block = Block().eval()
        batch, height, width = (
            torch.export.Dim(name, min=low, max=512) for name, low in (("n", 1), ("h", 4), ("w", 4))
        )
        exported = torch.export.export(
            block, (noise(2, 24, 13, 10),), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=strict
        )
        assert "mkf.key_conv2d" in str(exported.graph)
        x = noise(5, 24, 30, 21)
        torch.testing.assert_close(exported.module()(x), block(x))

    def test_fx_and_tracing(self, x):
        block = Block().eval()
        for graph in (torch.fx.symbolic_trace(block), torch.jit.trace(block, x)):
            torch.testing.assert_close(graph(x + 1), block(x + 1))

    @pytest.mark.parametrize("dynamo", [True, False])
    def test_onnx_has_an_ordinary_convolution(self, dynamo, tmp_path):
        onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript")
        pytest.importorskip("onnxscript", reason="pip install onnxscript")
        block = Block().eval()
        x = noise(2, 24, 13, 10)
        path = str(tmp_path / "block.onnx")
        torch.onnx.export(block, (x,), path, dynamo=dynamo, verbose=False)
        assert sorted(node.op_type for node in onnx.load(path).graph.node) == ["Add", "Conv", "Conv", "Relu"]
        runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
        session = runtime.InferenceSession(path)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), block(x).detach(), rtol=1e-4, atol=1e-4)


class TestInNetworks:
    def test_banks_read_it(self):
        network = nn.Sequential(KeyConv2d(24, 7, PAPER, stride=2), nn.ReLU(), depthwise(4, 5))
        network[0].scale.data.normal_()
        bank = mkf.FilterBank.from_model(network, "net")
        assert torch.equal(bank.select(k=7).filters, network[0].weight[:, 0])
        rows = bank.select(k=7).metadata.to_pylist()
        assert [row["channel"] for row in rows] == list(range(24))
        assert {(row["layer"], row["stride"], row["depth"]) for row in rows} == {("0", 2, 0)}
        fit = mkf.affine_fit(bank.select(k=7), PAPER)
        assert torch.equal(fit.index, network[0].index)
        assert fit.residual.max() < 1e-5

    def test_timm_replaces_it_by_a_convolution(self, x):
        network = nn.Sequential(KeyConv2d(24, 7, PAPER, padding=3), nn.Sequential(KeyConv2d(24, 7, ANALYTIC))).eval()
        plain = timm.utils.reparameterize_model(network)
        assert [type(m) for m in plain.modules() if not isinstance(m, nn.Sequential)] == [nn.Conv2d] * 2
        assert_same(network, plain, x)

    def test_in_a_network_of_timm(self):
        network = timm.create_model("convnext_atto", num_classes=10).eval()
        x = noise(1, 3, 64, 64)
        filters = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1])[:, 0]
        own = mkf.KeySet(filters[:200])
        original, number = network(x), 0
        for block in network.modules():
            if hasattr(block, "conv_dw") and number + block.conv_dw.in_channels <= 200:
                number += block.conv_dw.in_channels
                block.conv_dw = KeyConv2d.from_conv2d(block.conv_dw, own)
        assert number > 0
        torch.testing.assert_close(network(x), original, rtol=1e-4, atol=1e-4)
