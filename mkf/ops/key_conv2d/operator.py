"""The key convolution as an operator of torch, for all that looks at operators: torch.compile, export, profilers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mkf.ops.key_conv2d import compute
from mkf.ops.key_conv2d.check import check_channels, output_size


def _forward(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    call = compute.prepare(x, keys, index, scale, shift, *options)
    if bias is not None:
        check_channels("bias", bias, x.shape[1])
        bias = bias.to(call.shift.dtype)
    return compute.forward(call, x, bias)


def _forward_fake(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    stride, padding, dilation, *_ = options
    size = output_size(x.shape, keys.shape[-1], stride, padding, dilation)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=compute.layout_of(x))


def _backward(
    dy: Tensor,
    x: Tensor | None,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    wanted: Sequence[bool],
    size: Sequence[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    """Gradients for x, keys, scale, shift and bias; a tensor of no element where none is wanted."""
    layout = compute.layout_of(dy if x is None else x)
    like_x = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=layout)
    call = compute.prepare(like_x, keys, index, scale, shift, *options)
    call.layout = layout
    if dy.shape != call.size:
        raise ValueError(f"dy has shape {tuple(dy.shape)}, but the output has {tuple(call.size)}")
    gradients = compute.gradients(call, *compute.arranged(call, dy, x), wanted)
    return tuple(dy.new_empty(0) if t is None else t for t in gradients)


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    wanted: Sequence[bool],
    size: Sequence[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    layout = compute.layout_of(dy if x is None else x)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=layout)
    gradients = (dx, *(t.new_empty(t.shape) for t in (keys, scale, shift, shift)))
    return tuple(t if w else dy.new_empty(0) for t, w in zip(gradients, wanted, strict=True))


_library = torch.library.Library("mkf", "FRAGMENT")
_library.define(
    "key_conv2d(Tensor x, Tensor keys, Tensor index, Tensor scale, Tensor shift, Tensor? bias, SymInt[2] stride,"
    " SymInt[2] padding, SymInt[2] dilation, float? tolerance, str backend) -> Tensor"
)
_library.define(
    "key_conv2d_backward(Tensor dy, Tensor? x, Tensor keys, Tensor index, Tensor scale, Tensor shift, bool[5] wanted,"
    " SymInt[4] size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, float? tolerance, str backend)"
    " -> (Tensor d_x, Tensor d_keys, Tensor d_scale, Tensor d_shift, Tensor d_bias)"
)
_library.impl("key_conv2d", _forward, "CompositeExplicitAutograd")
_library.impl("key_conv2d_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::key_conv2d", _forward_fake, lib=_library)
torch.library.register_fake("mkf::key_conv2d_backward", _backward_fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, index, scale, shift, _, *options = inputs
    _, keys_train, _, scale_trains, shift_trains, *_ = ctx.needs_input_grad
    needed = x if keys_train or scale_trains or shift_trains else None
    ctx.save_for_backward(needed, keys, index, scale, shift)
    ctx.size = x.shape
    ctx.options = options


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    wanted = [needed[i] for i in (0, 1, 3, 4, 5)]
    gradients = torch.ops.mkf.key_conv2d_backward(dy, *ctx.saved_tensors, wanted, ctx.size, *ctx.options)
    dx, d_keys, *others = (t if w else None for t, w in zip(gradients, wanted, strict=True))
    return dx, d_keys, None, *others, *[None] * len(ctx.options)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("torch.ops.mkf.key_conv2d has first derivatives only: use mkf.ops.key_conv2d, uncompiled")


torch.library.register_autograd("mkf::key_conv2d", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("mkf::key_conv2d_backward", _refuse, lib=_library)
