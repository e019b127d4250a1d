"""Where a network normalises what a KeyConv2d gives, so that both can be computed together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from mkf.nn.key_conv2d import KeyConv2d

# Blocks that give a convolution's output to a LayerNorm over the channels and to nothing else, and their two names.
BLOCKS = {
    "timm.models.convnext.ConvNeXtBlock": ("conv_dw", "norm"),
    "torchvision.models.convnext.CNBlock": ("block.0", "block.2"),
}
NORMS = "torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNorm2d"


def fuse_norms(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> list[str]:
    """Let the `KeyConv2d` layers of ConvNeXt blocks compute the LayerNorm that follows them, in place.

    What the network computes changes by rounding, its parameters and their names do not: each norm stays where it is,
    and passes on what is normalised already (`KeyConv2d.fuse_norm`). Known are timm's ConvNeXtBlock and torchvision's
    CNBlock, where the layer is on the CPU, which has a kernel for both, and the norm has weight and bias, no hooks and
    no other place in the model. `part_norms` undoes it; do so before you replace one of the two in a block.

    Args:
        model: Changed in place.
        layers: Those to fuse; all that can be if None.

    Returns:
        The names of the layers.
    """
    held = Counter(id(child) for module in model.modules() for child in module._modules.values())
    chosen = None if layers is None else set(map(id, layers))
    fused = []
    for block_name, block in model.named_modules():
        kind = _path(type(block))
        names = BLOCKS.get(kind)
        if names is None or "forward" in vars(block) or _path(type(block).forward) != f"{kind}.forward":
            continue
        conv, norm = map(block.get_submodule, names)
        if chosen is not None and id(conv) not in chosen:
            continue
        if isinstance(conv, KeyConv2d) and held[id(conv)] == held[id(norm)] == 1 and _can_fuse(conv, norm):
            conv.fuse_norm(norm)
            fused.append(f"{block_name}.{names[0]}".lstrip("."))
    return fused


def part_norms(model: nn.Module) -> None:
    """Let the norms that `fuse_norms` has fused compute by themselves again, in place.

    Raises:
        ValueError: One was parametrised since. The model is as it was.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, KeyConv2d)]
    for layer in layers:
        layer.check_norm()
    for layer in layers:
        layer.part_norm()


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _can_fuse(conv: KeyConv2d, norm: nn.Module) -> bool:
    return (
        conv.scale.is_cpu
        and _path(type(norm)) in NORMS
        and isinstance(norm, nn.LayerNorm)
        and conv.why_not_norm(norm) is None
        and "forward" not in vars(norm)
        and not getattr(norm, "_fast_norm", False)  # timm's, which autocast does not make float32
        and not any(value for name, value in vars(norm).items() if name.endswith("_hooks"))
    )
