"""LayerNorms that the layers before them compute."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import mkf
from mkf.kernels import extension
from mkf.nn import conversion_report, fuse_norms, part_norms
from mkf.nn.key_conv2d import FusedLayerNorm
from mkf.ops.key_conv2d import compute

IMAGES = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def convnext(conv_mlp: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "convnext_atto",
        depths=(1, 1, 2, 1),
        dims=(24, 32, 40, 48),
        num_classes=7,
        conv_mlp=conv_mlp,
        ls_init_value=1.0,
    )
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return model.to(memory_format=torch.channels_last)


def torchvisions() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    torch.manual_seed(0)
    return ConvNeXt([CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 2)], num_classes=7, layer_scale=1.0)


MODELS = {"conv_mlp": convnext, "linear": lambda: convnext(False), "torchvision": torchvisions}


def converted(model: nn.Module, fuse_norm: bool) -> nn.Module:
    return mkf.convert(copy.deepcopy(model), mkf.keys.analytic("B"), assign="uniform", fuse_norm=fuse_norm)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IMAGES.to(memory_format=torch.channels_last)).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_fused_is_the_same_network(kind: str, monkeypatch) -> None:
    passes = []
    run = compute.gradients_norm
    monkeypatch.setattr(compute, "gradients_norm", lambda *a: (passes.append(a), run(*a))[1])
    model = MODELS[kind]()
    apart, fused = converted(model, False), converted(model, True)
    layers = [layer for layer in fused.modules() if isinstance(layer, mkf.KeyConv2d)]
    assert all(isinstance(layer.norm, FusedLayerNorm) for layer in layers)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in apart.named_parameters()]
    assert not any(layer.norm for layer in apart.modules() if isinstance(layer, mkf.KeyConv2d))
    expected, got = gradients(apart), gradients(fused)
    assert len(passes) == (0 if extension.missing() else len(layers))
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert (gradient - got[name]).norm() <= 1e-4 * gradient.norm(), name
    report = conversion_report(fused)
    assert f"{len(layers)} of them were fused with the LayerNorm" in str(report)
    assert "LayerNorm that follows" not in str(conversion_report(apart))


@pytest.mark.parametrize("kind", MODELS)
def test_restored_and_parted_networks_are_ordinary_again(kind: str) -> None:
    model = MODELS[kind]()
    fused = converted(model, True)
    logits = fused.eval()(IMAGES)
    part_norms(fused)
    assert {type(m) for m in fused.modules()} == {type(m) for m in model.modules()} - {nn.Conv2d} | {
        mkf.KeyConv2d,
        nn.Conv2d,
    }
    torch.testing.assert_close(fused(IMAGES), logits, rtol=1e-3, atol=1e-3)
    names = fuse_norms(fused)
    assert names
    assert not fuse_norms(fused)
    restored = mkf.restore(fused)
    assert {type(m) for m in restored.modules()} == {type(m) for m in model.modules()}
    assert restored.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(restored(IMAGES), logits, rtol=1e-3, atol=1e-3)
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(restored.modules(), model.modules(), strict=True))


def test_copies_pickles_states_and_averages_hold_their_own_norms() -> None:
    fused = converted(convnext(), True).eval()
    logits = fused(IMAGES)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), ModelEmaV3(fused).module):
        block, own = other.stages[0].blocks[0], fused.stages[0].blocks[0]
        assert block.conv_dw.norm is block.norm
        assert block.norm is not own.norm
        torch.testing.assert_close(other.eval()(IMAGES), logits, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            block.norm.weight.neg_()
        assert not torch.allclose(other(IMAGES), logits)
        assert torch.equal(fused(IMAGES), logits)
    other = converted(convnext(), False)
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(other.eval()(IMAGES), logits, rtol=1e-3, atol=1e-3)
    half = copy.deepcopy(fused).bfloat16()
    assert half(IMAGES.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(IMAGES), other(IMAGES), rtol=0.1, atol=0.1)


def test_timms_reparameterisation_parts_them() -> None:
    fused = converted(convnext(), True).eval()
    logits = fused(IMAGES)
    ordinary = reparameterize_model(fused)
    assert not any(isinstance(m, FusedLayerNorm | mkf.KeyConv2d) for m in ordinary.modules())
    torch.testing.assert_close(ordinary(IMAGES), logits, rtol=1e-3, atol=1e-3)


def test_what_is_not_fused() -> None:
    def stay(change) -> bool:
        model = convnext()
        change(model.stages[0].blocks[0])
        fused = converted(model, True)
        assert fused.stages[3].blocks[0].conv_dw.norm is not None
        return fused.stages[0].blocks[0].conv_dw.norm is None

    def share(block) -> None:
        block.drop_path = block.norm

    assert not stay(lambda block: None)
    assert stay(lambda block: block.norm.register_forward_hook(lambda *_: None))
    assert stay(lambda block: setattr(block, "norm", nn.LayerNorm(24, elementwise_affine=False)))
    assert stay(lambda block: setattr(block, "norm", nn.BatchNorm2d(24)))
    assert stay(lambda block: setattr(block.norm, "_fast_norm", True))
    assert stay(lambda block: setattr(block, "forward", block.forward))
    assert stay(lambda block: setattr(block, "__class__", Other))
    assert stay(share)
    assert not fuse_norms(nn.Sequential(mkf.KeyConv2d(8, 7, mkf.keys.analytic("B")), nn.LayerNorm(8)))


class Other(ConvNeXtBlock):
    pass


def test_a_class_whose_forward_was_replaced_is_not_fused(monkeypatch) -> None:
    monkeypatch.setattr(ConvNeXtBlock, "forward", lambda self, x: x + self.conv_dw(x))
    assert not any(report.norm_fused for report in conversion_report(converted(convnext(), True)).layers)


def test_a_second_conversion_leaves_the_first_as_it_is() -> None:
    model = convnext()
    model.head.global_pool.pool = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.AdaptiveAvgPool2d(1))
    mkf.convert(model, mkf.keys.analytic("B"), assign="uniform", fuse_norm=False)
    mkf.convert(model, mkf.keys.analytic("B", 3), assign="uniform")
    assert not any(isinstance(m, FusedLayerNorm) for m in model.modules())


@pytest.mark.parametrize("which", ["conv_dw", "norm"])
def test_hooks_see_what_they_would(which: str) -> None:
    fused, apart = (converted(convnext(), fuse_norm).eval() for fuse_norm in (True, False))
    logits = fused(IMAGES)
    seen = []

    def after(module, x, y) -> torch.Tensor:
        seen.append((x[0], y))
        return y.abs()

    for _ in range(2):  # the first leaves nothing behind
        seen.clear()
        for model in (fused, apart):
            module = getattr(model.stages[1].blocks[0], which)
            handles = [module.register_forward_hook(after)]
            handles.append(module.register_forward_pre_hook(lambda m, x: (3 * x[0],)))
            seen.append(model(IMAGES))
            for handle in handles:
                handle.remove()
        for got, right in zip(seen[:2], seen[2:], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(seen[1], logits, atol=1e-3)
        torch.testing.assert_close(fused(IMAGES), logits)


def test_a_hook_that_removes_itself_leaves_the_norm_to_compute() -> None:
    fused = converted(convnext(), True).eval()
    logits = fused(IMAGES)
    handle = fused.stages[1].blocks[0].conv_dw.register_forward_hook(lambda *_: handle.remove())
    for _ in range(2):
        torch.testing.assert_close(fused(IMAGES), logits, rtol=1e-3, atol=1e-3)


def test_hooks_of_all_modules_see_what_they_would() -> None:
    fused, apart = (converted(convnext(), fuse_norm).eval() for fuse_norm in (True, False))
    fused(IMAGES)
    seen: list[torch.Tensor] = []
    with nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(y)):
        fused(IMAGES), apart(IMAGES)
    half = len(seen) // 2
    for got, right in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_graphs_of_torch_fx(kind: str, ran_before: bool) -> None:
    class KeepsLayersWhole(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return isinstance(m, mkf.KeyConv2d) or super().is_leaf_module(m, qualified_name)

    fused, apart = (converted(MODELS[kind](), fuse_norm).eval() for fuse_norm in (True, False))
    logits = apart(IMAGES)
    if ran_before:
        fused(IMAGES)
    for tracer in (KeepsLayersWhole(), torch.fx.Tracer()):
        graph = torch.fx.GraphModule(fused, tracer.trace(fused))
        torch.testing.assert_close(graph(IMAGES), logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fused(IMAGES), logits, rtol=1e-3, atol=1e-3)


def test_features_of_torchvision_are_those_of_the_layers() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    fused, apart = (converted(torchvisions(), fuse_norm).eval() for fuse_norm in (True, False))
    nodes = ["features.1.0.block.0", "features.1.0.block.2"]
    got, right = (create_feature_extractor(model, nodes)(IMAGES) for model in (fused, apart))
    for node in nodes:
        torch.testing.assert_close(got[node], right[node], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ran_before", [False, True])
def test_replicas_of_data_parallel(ran_before: bool) -> None:
    fused = converted(convnext(), True).eval()
    if ran_before:
        fused(IMAGES)
    block = fused.stages[0].blocks[0]
    layer, norm = (module._replicate_for_data_parallel() for module in (block.conv_dw, block.norm))
    for replica, module in ((layer, block.conv_dw), (norm, block.norm)):  # what torch then does, for another device
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.detach().clone())
    x = torch.randn(2, 24, 16, 16).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm(layer(x)), block.norm(block.conv_dw(x)), rtol=1e-3, atol=1e-3)
    assert layer.norm is None
    assert block.conv_dw.norm is block.norm


def test_norms_that_are_pruned_or_parametrised_afterwards() -> None:
    fused, apart = (converted(convnext(), fuse_norm).eval() for fuse_norm in (True, False))
    for model in (fused, apart):
        prune.l1_unstructured(model.stages[0].blocks[0].norm, "weight", 0.5)
        with torch.no_grad():
            model.stages[0].blocks[0].norm.weight_orig.mul_(2)
        parametrize.register_parametrization(model.stages[3].blocks[0].norm, "weight", nn.Softplus())
    torch.testing.assert_close(fused(IMAGES), apart(IMAGES), rtol=1e-3, atol=1e-3)
    for undo in (part_norms, mkf.restore):
        with pytest.raises(ValueError, match="parametrised since"):
            undo(fused)
    torch.testing.assert_close(fused(IMAGES), apart(IMAGES), rtol=1e-3, atol=1e-3)
    assert fused.stages[0].blocks[0].conv_dw.norm is not None
    with pytest.raises(ValueError, match="parametrised: remove"):
        mkf.KeyConv2d(48, 7, mkf.keys.analytic("B")).fuse_norm(apart.stages[3].blocks[0].norm)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_from_the_first_step_on(use_reentrant: bool) -> None:
    fused, apart = (converted(convnext(), fuse_norm) for fuse_norm in (True, False))
    for size in (64, 96):
        results = []
        for model in (fused, apart):
            model.zero_grad()
            x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2), requires_grad=True)
            x = x.contiguous(memory_format=torch.channels_last)
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
            results.append(model.stages[0].blocks[0].norm.weight.grad)
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_has_ordinary_operators(dynamo: bool, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fused = converted(convnext(), True).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(fused, (IMAGES,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), fused(IMAGES), rtol=1e-3, atol=1e-3)


def test_fusing_by_hand() -> None:
    layer, norm = mkf.KeyConv2d(24, 7, mkf.keys.analytic("B"), padding=3), nn.LayerNorm(24)
    x = torch.randn(2, 24, 8, 8)
    expected = norm(layer(x).movedim(1, -1)).movedim(-1, 1)
    layer.fuse_norm(norm)
    torch.testing.assert_close(layer(x), expected)
    assert "computes the LayerNorm that follows" in repr(layer)
    assert set(layer.state_dict()) == {"keys", "index", "scale", "shift", "bias"}
    with pytest.raises(ValueError, match="fused already"):
        layer.fuse_norm(nn.LayerNorm(24))
    layer.part_norm()
    assert type(norm) is nn.LayerNorm
    assert torch.equal(norm(x.movedim(1, -1)), nn.functional.layer_norm(x.movedim(1, -1), (24,)))
    with pytest.raises(TypeError, match="BatchNorm2d"):
        layer.fuse_norm(nn.BatchNorm2d(24))
    for other in (nn.LayerNorm(23), nn.LayerNorm(24, bias=False)):
        with pytest.raises(ValueError, match="24 channels"):
            layer.fuse_norm(other)
