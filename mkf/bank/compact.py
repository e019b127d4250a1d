"""State dicts that hold depthwise filters as what they are: a key's index, a scale and a shift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mkf.bank.extract import is_depthwise
from mkf.bank.schema import KERNEL_SIZES
from mkf.ops import AffineFit, affine_fit

if TYPE_CHECKING:
    from mkf.keys import KeySet

KEYS = "mkf.keys"  # the entry with the keys that all layers share
PARTS = ("keys", "index", "scale", "shift")  # of a layer's filters, as KeyConv2d names its state


def compact(state: Mapping[str, torch.Tensor], keys: KeySet) -> tuple[dict[str, torch.Tensor], dict[str, AffineFit]]:
    """Fit the depthwise filters of a state dict to keys and keep the fit in their place.

    The weight of a layer L, (C, 1, k, k) with k that of the keys, becomes `L.index` (uint8), `L.scale` and `L.shift`
    (float32), C of each: 9 bytes a filter in place of 196 for 7x7 float32. The keys are kept once, as `mkf.keys`.
    Everything else stays as it is.

    Args:
        state: A state dict.
        keys: The keys.

    Returns:
        The compact state dict, and the fit of every layer.

    Raises:
        ValueError: There is no depthwise weight of that size, or one holds NaN, Inf or what float32 cannot hold.
    """
    k = keys.kernel_size
    out: dict[str, torch.Tensor] = {}
    fits: dict[str, AffineFit] = {}
    for name, tensor in state.items():
        if not (is_depthwise(name, tensor.shape) and tensor.shape[2:] == (k, k) and tensor.is_floating_point()):
            out[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        filters = tensor[:, 0].float()
        if (filters.isinf() & tensor[:, 0].isfinite()).any():
            largest = tensor[tensor.isfinite()].abs().max()
            raise ValueError(
                f"{name} holds {tensor.dtype} with values up to {largest:.3g}, beyond the range of float32, in which "
                "filters are fitted: scale them down"
            )
        fit = fits[layer] = affine_fit(filters, keys)
        if bad := int((fit.index < 0).sum()):
            raise ValueError(f"{name} holds {bad} filters with NaN or Inf: no key fits them")
        out |= {f"{layer}.index": fit.index.to(torch.uint8), f"{layer}.scale": fit.scale, f"{layer}.shift": fit.shift}
    if not fits:
        raise ValueError(f"there is no depthwise weight (C, 1, {k}, {k}) with C > 1 to convert{_other_sizes(state)}")
    return out | {KEYS: keys.filters}, fits


def _other_sizes(state: Mapping[str, torch.Tensor]) -> str:
    """The depthwise sizes that there are, and which keys fit the most frequent one that keys can have."""
    sizes = Counter(tuple(tensor.shape[2:]) for name, tensor in state.items() if is_depthwise(name, tensor.shape))
    if not sizes:
        return ""
    fitting = [height for (height, width), _ in sizes.most_common() if height == width and height in KERNEL_SIZES]
    found = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
    advice = f": choose keys of that size, as --keys analytic:B:{fitting[0]}" if fitting else ""
    return f"; there are some of {found}{advice}"


def layers_with_keys(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers whose filters are kept as index, scale and shift: by `compact`, or as the state of a `KeyConv2d`."""
    layers = [name.removesuffix(".index") for name in state if name.endswith(".index")]
    return [layer for layer in layers if f"{layer}.scale" in state and f"{layer}.shift" in state]


def with_shared_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The compact state dict of a model with `KeyConv2d` layers; nothing is fitted again.

    Keys that all of them have are kept once; where they differ, as keys that were trained do, each layer keeps its own.
    """
    layers = layers_with_keys(state)
    indices, own = ({f"{layer}.{part}" for layer in layers} for part in ("index", "keys"))
    keys = [state[name] for name in own if name in state]
    if KEYS in state or not all(torch.equal(keys[0], others) for others in keys):
        own, keys = set(), []
    out = {
        name: tensor.to(torch.uint8) if name in indices else tensor for name, tensor in state.items() if name not in own
    }
    return out | ({KEYS: keys[0]} if keys else {})


def is_part(name: str) -> bool:
    """Whether `expand` looks at an entry of this name."""
    return name == KEYS or name.rpartition(".")[2] in PARTS


def expand(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ordinary state dict of one from `compact`, or of a model with `KeyConv2d` layers.

    The filters of a layer are written out as its weight, (C, 1, k, k) float32:
    `weight = scale * keys[index] + shift`, with the keys of the layer or those all layers share. It stands where the
    first of the layer's parts stood: a checkpoint's order is the depth of its layers.

    Raises:
        ValueError: A layer has no keys, no index, or one that is none of theirs.
    """
    weights = {layer: _weight(layer, state) for layer in layers_with_keys(state)}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        if layer in weights and part in (*PARTS, "weight"):
            out[f"{layer}.weight"] = weights[layer]  # its place stays that of the layer's first part
        elif name != KEYS:
            out[name] = tensor
    return out


def _weight(layer: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    index, scale, shift = (state[f"{layer}.{part}"] for part in ("index", "scale", "shift"))
    keys = state.get(f"{layer}.keys", state.get(KEYS))
    if keys is None or index.numel() == 0:
        raise ValueError(f"the layer {layer} has no " + ("keys" if keys is None else "index"))
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= len(keys):
        raise ValueError(f"the layer {layer} has an index beyond its keys: {low if low < 0 else high} of {len(keys)}")
    return (scale.view(-1, 1, 1) * keys[index.long()] + shift.view(-1, 1, 1))[:, None]
