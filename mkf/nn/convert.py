"""Put keys into a network in place of its depthwise filters, and take them out again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mkf.keys import KeySet
from mkf.nn.assign import Order
from mkf.nn.conversion_report import ConversionReport, LayerReport
from mkf.nn.fuse import fuse_norms, part_norms
from mkf.nn.key_conv2d import KeyConv2d

Layer = TypeVar("Layer", bound=nn.Module)
FilterFn = Callable[[nn.Module, str], bool]

_RECORD = "_mkf_conversion"  # where a converted model keeps its report, which is pickled and copied with it
_TURNS = 3  # timings of a layer or a model at least, of which the fastest counts
_ENOUGH = 0.02  # seconds after which there are no more


def convert(
    model: nn.Module,
    keys: KeySet | Tensor,
    filter_fn: FilterFn | None = None,
    *,
    assign: str | Sequence[float] = "fit",
    order: Order = "blocks",
    seed: int = 0,
    train: Iterable[str] = ("shift", "bias"),
    tolerance: float = 0.0,
    batch: Any = None,
    fuse_norm: bool = True,
) -> nn.Module:
    """Replace the depthwise convolutions of a model by `KeyConv2d` layers, in place.

    With `assign="fit"` every filter becomes its nearest key, scaled and shifted (`affine_fit`), and the network
    computes nearly what it did. What this costs in accuracy, training wins back: replacing the filters of a trained
    ConvNeXtV2-Tiny took it from 83.0 to 76.7 % (table 1 of "The Quest for Universal Master Key Filters in DS-CNNs").
    Any other `assign` gives new layers to train from scratch, whatever the old filters were.

    Replaced is every `nn.Conv2d`, and timm's `Conv2dSame` where it pads evenly, that has one filter per channel, of the
    size of the keys, shares no parameter with another layer, holds nothing but weight and bias, and is neither
    parametrised nor hooked.
    `conversion_report(model)` tells which were left alone and why. Where the model has filters of several sizes, call
    this again with keys of each. Convert before the model is compiled, wrapped or given to an optimiser.

    Args:
        model: Changed in place, unless it is itself a depthwise convolution: then only what is returned has keys.
        keys: A `KeySet`, or (K, k, k) of which one can be made.
        filter_fn: Called with each depthwise convolution and its name; where it is False, the layer is left alone.
        assign: "fit", or as `KeyConv2d` takes it: "uniform", or K proportions.
        order: Of the keys over the channels where they are not fitted: "blocks", which rotate from layer to layer so
            that a residual channel does not always meet the same key, or "random".
        seed: Of the random order.
        train: What trains in the new layers, also where the old ones were frozen: any of "scale", "shift", "bias" and
            "keys", or nothing.
        tolerance: Relative error allowed in a key where it makes it cheaper, see `KeySet.plan`.
        batch: One input of the model, or a tuple of its arguments. The model runs on it, in evaluation mode, and the
            report then has the error of each layer's output, its share of the time and the network's speed-up.
        fuse_norm: Let the new layers of ConvNeXt blocks on the CPU compute the LayerNorm that follows them too, see
            `mkf.nn.fuse_norms`. That changes no names. Before replacing such a layer or norm yourself, call
            `mkf.nn.part_norms`.

    Returns:
        The model.

    Raises:
        ValueError: No layer can be replaced; the message tells why. The model is as it was.
        TypeError: `model` is no module, or one that is compiled or wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch module, not a {type(model).__name__}")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"convert the model before it becomes a {type(model).__name__}")
    keys = keys if isinstance(keys, KeySet) else KeySet(keys)
    # Wrong options are told here, and not as the reason why each layer is left alone.
    options: dict[str, Any] = {"order": order, "train": train, "tolerance": tolerance}
    KeyConv2d(1, keys.kernel_size, keys, assign="uniform" if assign == "fit" else assign, **options, device="meta")

    generator = torch.Generator().manual_seed(seed)
    new: dict[str, KeyConv2d] = {}
    reports: dict[str, LayerReport] = {}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, conv in _layers(model, nn.Conv2d):
        if not conv.groups == conv.in_channels > 1:
            continue
        report = reports[name] = LayerReport(name, conv.out_channels, (conv.kernel_size[0], conv.kernel_size[1]))
        report.reason = _why_not(name, conv, filter_fn)
        if report.reason is None and any(owners[id(p)] > 1 for p in conv.parameters(recurse=False)):
            report.reason = "it shares parameters with another layer"
        if report.reason is not None:
            continue
        try:
            layer = KeyConv2d.from_conv2d(
                _plain(conv), keys, assign=assign, rotation=len(new), generator=generator, **options
            )
        except (TypeError, ValueError) as error:
            report.reason = str(error)
            continue
        new[name] = layer
        report.keys_used = _keys_used(layer)
        if layer.residual is not None and (live := layer.residual[(layer.scale != 0).cpu()]).numel():
            report.residual, report.worst_residual = live.mean().item(), live.max().item()
    if not new:
        reasons = "; ".join(f"{name or 'the model'}: {report.reason}" for name, report in reports.items())
        if any(_layers(model, KeyConv2d)):
            reasons = reasons or "all have keys already; mkf.restore(model) makes them ordinary layers"
        raise ValueError(f"no layer can have these keys: {reasons or 'the model has no depthwise convolution'}")
    seconds = None if batch is None else _measure(model, new, reports, batch if isinstance(batch, tuple) else (batch,))
    earlier = getattr(model, _RECORD, ConversionReport())
    kept = [report for report in earlier.layers if report.name not in reports]
    if seconds is not None:  # before any conversion: what earlier ones saved is added
        seconds += ConversionReport(kept, seconds).saved
    in_order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    layers = sorted([*kept, *reports.values()], key=lambda report: in_order.get(report.name, len(in_order)))
    model = _replaced(model, new)
    fused = set(fuse_norms(model, new.values())) if fuse_norm else set()
    for report in layers:
        report.norm_fused = report.norm_fused or report.name in fused
    setattr(model, _RECORD, ConversionReport(layers, seconds))
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What `convert` did to a model.

    Of layers whose parameters were loaded since, nobody knows what they were fitted to: their residuals are None then.

    Raises:
        ValueError: The model was not converted, or only a part of it was: ask that part.
    """
    report = getattr(model, _RECORD, None)
    if not isinstance(report, ConversionReport):
        raise ValueError(f"this {type(model).__name__} has no report: it is not what mkf.convert returned")
    modules = dict(model.named_modules())
    for layer in report.replaced:
        module = modules.get(layer.name)
        if isinstance(module, nn.Conv2d):
            layer.reason = "it was restored since"
        elif isinstance(module, KeyConv2d) and module.residual is None and layer.residual is not None:
            layer.residual = layer.worst_residual = layer.output_error = None
            layer.keys_used = _keys_used(module)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Replace the `KeyConv2d` layers of a model by `nn.Conv2d` layers with the same filters, in place.

    Args:
        model: A converted model; changed in place, unless it is itself a `KeyConv2d`.

    Returns:
        The model, an ordinary network again, whose state dict loads where the original's did. All of the layers'
        parameters train.

    Raises:
        TypeError: `model` is no module.
        ValueError: A layer has hooks, which would be lost, or a norm that it computes was parametrised. The model is
            as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes a torch module, not a {type(model).__name__}")
    layers = _layers(model, KeyConv2d)
    if hooked := [name or "the model" for name, layer in layers if _has_hooks(layer)]:
        raise ValueError(f"these layers have hooks, which would be lost: remove them from {', '.join(hooked)}")
    part_norms(model)
    model = _replaced(model, {name: layer.to_conv2d() for name, layer in layers})
    if hasattr(model, _RECORD):
        delattr(model, _RECORD)
    return model


def _layers(model: nn.Module, kind: type[Layer]) -> list[tuple[str, Layer]]:
    """The modules of a kind, by the first of their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _keys_used(layer: KeyConv2d) -> int | None:
    return None if layer.index.is_meta else len(layer.index.unique())


def _why_not(name: str, conv: nn.Conv2d, filter_fn: FilterFn | None) -> str | None:
    """Why a depthwise convolution is left alone, or None; `KeyConv2d.from_conv2d` knows more reasons."""
    if filter_fn is not None and not filter_fn(conv, name):
        return "left out by filter_fn"
    if is_parametrized(conv):
        return "its weight is parametrised, computed anew at every step"
    if _has_hooks(conv):
        return "it has hooks, which would be lost"
    if "forward" in vars(conv):
        return "its forward was replaced"
    if conv._buffers or conv._modules or conv._parameters.keys() - {"weight", "bias"}:
        return "it holds more than weight and bias, which would be lost"
    return None


def _has_hooks(layer: nn.Module) -> bool:
    of_layer = [value for name, value in vars(layer).items() if name.endswith("_hooks") and name.startswith("_")]
    of_parameters = [
        hooks for p in layer.parameters(recurse=False) for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
    ]
    return any(of_layer) or any(of_parameters)


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution itself, or the equal nn.Conv2d of timm's Conv2dSame where that pads equally on both sides."""
    if type(conv).__name__ != "Conv2dSame":
        return conv
    if conv.stride != (1, 1) or any(k % 2 == 0 for k in conv.kernel_size):
        raise ValueError(f"a Conv2dSame of stride {conv.stride} pads one side more than the other")
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        padding="same",
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain.train(conv.training)


def _replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """The model with layers exchanged, under every name by which it holds them."""
    by_layer = {id(model.get_submodule(name)): layer for name, layer in new.items()}
    for name, layer in new.items():
        layer.train(model.get_submodule(name).training)
    if id(model) in by_layer:
        return by_layer[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in by_layer:
                setattr(module, name, by_layer[id(child)])
    return model


@torch.no_grad()
def _measure(
    model: nn.Module, new: Mapping[str, KeyConv2d], reports: Mapping[str, LayerReport], arguments: tuple[Any, ...]
) -> float:
    """Run the model on a batch, compare and time each layer with what takes its place, and return the model's time.

    A layer and its replacement see the same input, that of the original network: errors do not add up over layers.
    """

    def compare(name: str) -> Callable[..., None]:
        def hook(conv: nn.Module, inputs: tuple[Tensor, ...], by_name: dict[str, Tensor], y: Tensor) -> None:
            report = reports[name]
            x = inputs[0] if inputs else by_name["input"]
            layer = new[name].to(x.device).eval()
            if report.seconds is None and (norm := y.float().norm()) > 0:  # of the first run, if there are several
                report.output_error = float((layer(x) - y).float().norm() / norm)
            before, after = _seconds((lambda: conv.forward(x), lambda: layer(x)), x.device)
            report.seconds = (report.seconds or 0.0) + before
            report.seconds_with_keys = (report.seconds_with_keys or 0.0) + after

        return hook

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ExitStack() as hooks:
            for name in new:
                hooks.callback(model.get_submodule(name).register_forward_hook(compare(name), with_kwargs=True).remove)
            model(*arguments)
        device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
        return _seconds((lambda: model(*arguments),), device)[0]
    finally:
        for module, training in modes:
            module.training = training


def _seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The shortest of a few calls of each, which take turns, after one to warm up: others use the machine too."""
    for run in runs:
        run()
    times: list[list[float]] = []
    while len(times) < _TURNS or sum(map(sum, times)) < _ENOUGH:
        times.append([_timed(run, device) for run in runs])
    return [min(each) for each in zip(*times, strict=True)]


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
