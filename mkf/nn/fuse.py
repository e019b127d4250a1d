"""Where a network normalises what a KeyConv2d gives, so that both can be computed together."""

from __future__ import annotations

from collections import Counter

from torch import nn

from mkf.nn.key_conv2d import KeyConv2d

# Blocks that give a convolution's output to a LayerNorm over the channels and to nothing else, and their two names.
BLOCKS = {
    "timm.models.convnext.ConvNeXtBlock": ("conv_dw", "norm"),
    "torchvision.models.convnext.CNBlock": ("block.0", "block.2"),
}
NORMS = "torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNorm2d"


def fuse_norms(model: nn.Module) -> list[str]:
    """Let the `KeyConv2d` layers of ConvNeXt blocks compute the LayerNorm that follows them, in place.

    What the network computes changes by rounding, its parameters and their names do not: each norm stays where it is,
    and passes on what is normalised already (`KeyConv2d.fuse_norm`). Known are timm's ConvNeXtBlock and torchvision's
    CNBlock, where the layer is on the CPU, which has a kernel for both, and the norm has weight and bias, no hooks and
    no other place in the model. `part_norms` undoes it.

    Returns:
        The names of the layers.
    """
    held = Counter(id(child) for module in model.modules() for child in module._modules.values())
    fused = []
    for block_name, block in model.named_modules():
        names = BLOCKS.get(_path(block))
        if names is None or "forward" in vars(block):
            continue
        conv, norm = map(block.get_submodule, names)
        if isinstance(conv, KeyConv2d) and held[id(conv)] == held[id(norm)] == 1 and _can_fuse(conv, norm):
            conv.fuse_norm(norm)
            fused.append(f"{block_name}.{names[0]}".lstrip("."))
    return fused


def part_norms(model: nn.Module) -> None:
    """Let the norms that `fuse_norms` has fused compute by themselves again, in place."""
    for layer in model.modules():
        if isinstance(layer, KeyConv2d):
            layer.part_norm()


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _can_fuse(conv: KeyConv2d, norm: nn.Module) -> bool:
    return (
        conv.norm is None
        and conv.scale.is_cpu
        and _path(norm) in NORMS
        and isinstance(norm, nn.LayerNorm)
        and norm.normalized_shape == (conv.out_channels,)
        and norm.weight is not None
        and norm.bias is not None
        and "forward" not in vars(norm)
        and not getattr(norm, "_fast_norm", False)  # timm's, which autocast does not make float32
        and not any(value for name, value in vars(norm).items() if name.endswith("_hooks"))
    )
