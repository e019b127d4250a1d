"""Find the depthwise layers of a torch model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mkf.bank.schema import KERNEL_SIZES, Layer

# Parts of a flattened checkpoint's names that mark an optimiser's state.
_OPTIMISER = re.compile(r"(^|\.)(optim\w*|exp_avg\w*|max_exp_avg\w*|momentum_buffer)(\.|$)")


class Extraction(NamedTuple):
    """What was found: the layers in module order, and what to call each depthwise layer of a size no bank can hold."""

    layers: list[Layer]
    skipped: list[str]


def depthwise_layers(model: nn.Module) -> Extraction:
    """Collect the depthwise convolutions of a model.

    `FilterBank.from_model` tells the rules. Names are those in the model itself, without what DataParallel,
    DistributedDataParallel and torch.compile add to them.

    Raises:
        ValueError: The model has no depthwise filter of a size a bank holds.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"from_model takes a torch module, not a {type(model).__name__}; names of timm go to from_timm, files to "
            "from_checkpoint"
        )
    model = unwrap(model)
    layers, skipped, convolutions = [], [], 0
    for name, module in model.named_modules():
        convolutions += isinstance(module, nn.Conv2d)
        if not _is_depthwise(module):
            continue
        name = without_compiled(name) or type(module).__name__  # a model can be a single layer, which has no name
        height, width = module.kernel_size
        if height == width and height in KERNEL_SIZES:
            stride = module.stride[0] if len(set(module.stride)) == 1 else None
            layers.append(Layer(name, _weight_in_force(module), stride))
        else:
            skipped.append(f"{name} ({height}x{width})")
    layers = unshared(layers)
    if not layers:
        sizes = f"; depthwise but not square, odd and 3 to 11 wide: {', '.join(skipped)}" if skipped else ""
        raise ValueError(
            f"no depthwise filters in this {type(model).__name__}: "
            f"of its {convolutions} Conv2d layers none has groups == in_channels > 1 and a square kernel "
            f"of odd size 3 to 11{sizes}"
        )
    return Extraction(layers, skipped)


def is_depthwise(key: str, shape: Sequence[int]) -> bool:
    """Whether an entry of a state dict is a depthwise weight, by its name and its shape (C, 1, h, w), C > 1."""
    named = (key.endswith("weight") or "/" in key) and not _OPTIMISER.search(key)
    return named and len(shape) == 4 and shape[0] > 1 and shape[1] == 1 and max(shape[2:]) > 1


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel or torch.compile, however nested."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def without_compiled(name: str) -> str:
    """A layer's name without the `_orig_mod` that torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unshared(layers: Iterable[Layer]) -> list[Layer]:
    """The layers without those whose weight is the very tensor of an earlier one: a bank is of filters, not of uses."""
    first: dict[Any, Layer] = {}
    for layer in layers:
        weight = layer.filters
        first.setdefault((weight.device, weight.dtype, weight.data_ptr(), weight.shape, weight.stride()), layer)
    return list(first.values())


def _weight_in_force(module: nn.Module) -> Any:
    """The weight that the layer's next forward would use.

    Under the old `torch.nn.utils.weight_norm` and `spectral_norm`, `.weight` is what the last forward left there; a
    hook makes it anew before each.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(module, do_power_iteration=False)
    return module.weight


def _is_depthwise(module: Any) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels > 1
    if hasattr(module, "_orig_mod"):  # torch.compile's module has all that the one inside has, which comes next
        return False
    # KeyConv2d lives on a floor above: it is known by what it has, one key's index per channel.
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in ("keys", "index", "kernel_size"))
