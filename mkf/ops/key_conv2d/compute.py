"""Calling an implementation of the key convolution, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mkf.kernels.key_conv2d import KeyPlan
from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.key_conv2d.reference import weight_gradient
from mkf.kernels.registry import choose
from mkf.ops.key_conv2d.check import Pair, check_values, output_size


@dataclass(slots=True)
class Call:
    """One call but for its data: what forward and backward have in common.

    Attributes:
        implementation: The module that computes.
        plan: Of the keys.
        index: (C,), of its own, so that a gradient is of what was computed.
        scale: (C,), contiguous, the memory of the caller's where that can be, as the next: only a tensor that nobody
            else has keeps its size and dtype whatever becomes of theirs.
        shift: (C,).
        layout: Of x and all that has its dimensions.
        x_size: Of x.
        size: Of the output.
        options: Stride, padding, dilation, tolerance and backend.
        guards_of_dy: What the eager backward pass knows its dy by.
    """

    implementation: ModuleType
    plan: KeyPlan
    index: Tensor
    scale: Tensor
    shift: Tensor
    layout: torch.memory_format
    x_size: Sequence[int]
    size: Sequence[int]
    options: tuple[Any, ...]
    guards_of_dy: Any = None


_empty_like = torch.empty_like  # looked up once: after a large layer the way to a name costs as much as the call


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that x has or is nearest to: contiguous or channels-last."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    _, channel, row, column = x.stride()
    return torch.channels_last if channel < row and channel < column else torch.contiguous_format


def prepare(
    x: Tensor,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    tolerance: float | None,
    backend: str,
) -> Call:
    """Check the values, plan the keys and choose an implementation; of x only shape, dtype and layout count.

    Raises:
        ValueError: Sizes and values that are refused.
        BackendError: The implementation asked for cannot run or serve this call.
    """
    for name, p in (("index", index), ("scale", scale), ("shift", shift)):
        if p.shape != x.shape[1:2]:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, but x has {x.shape[1]} channels")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    index = index.to(torch.int32).contiguous()
    scale, shift = (p.detach().to(dtype).contiguous() for p in (scale, shift))
    check_values(keys, index, scale, shift)  # before the copy: on a GPU only a tensor that is new is looked at
    index = index.clone()
    plan = plan_of(keys.to(dtype).contiguous(), tolerance)
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    implementation = choose(
        "key_conv2d", x.device, backend, lambda module: module.why_not_call(x, plan, stride, padding, dilation)
    )
    size = output_size(x.shape, keys.shape[-1], stride, padding, dilation)
    options = stride, padding, dilation, tolerance, backend
    return Call(implementation.load(), plan, index, scale, shift, layout, tuple(x.shape), size, options)


def forward(call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
    """The output for x and bias."""
    stride, padding, dilation, _, _ = call.options
    x = x.contiguous(memory_format=call.layout)
    out = _empty(call.size, x, call.layout)
    if call.size[0] > 0:
        bias = None if bias is None else bias.contiguous()
        call.implementation.key_conv2d(
            x, call.plan, call.index, call.scale, call.shift, bias, stride, padding, dilation, out
        )
    return out


def _empty(size: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    if like.shape == size:
        return _empty_like(like, memory_format=layout)  # twice as fast, and small layers wait for it
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def gradients(call: Call, dy: Tensor, x: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients for x, keys, scale, shift and bias; None where none is wanted.

    Raises:
        RuntimeError: x is no longer what the output was computed of.
    """
    if x is not None and (x.shape != call.x_size or x.dtype != dy.dtype):
        raise RuntimeError(f"x was {dy.dtype} {call.x_size} in the forward pass, is {x.dtype} {tuple(x.shape)}")
    plan, index, scale, shift = call.plan, call.index, call.scale, call.shift
    geometry = call.options[:3]
    dy = dy.contiguous(memory_format=call.layout)
    x = None if x is None else x.contiguous(memory_format=call.layout)
    dx = _empty(call.x_size, dy, call.layout) if wanted[0] else None
    d_scale, d_shift, d_bias = (_empty_like(shift) if w else None for w in wanted[2:])
    d_keys = None
    if dy.shape[0] == 0:
        d_keys = torch.zeros_like(plan.keys) if wanted[1] else None
        return [None if t is None else t.zero_() for t in (dx, d_keys, d_scale, d_shift, d_bias)]
    left = d_scale, d_shift
    if wanted[1]:
        # There must be a gradient of every filter; from it scale and shift have theirs too.
        assert x is not None
        dw = weight_gradient(dy, x, plan.keys.shape[-1], *geometry)
        member = index == torch.arange(len(plan.keys), device=index.device)[:, None]  # a product with it adds up by key
        d_keys = ((member * scale) @ dw.flatten(1)).view_as(plan.keys)
        if d_scale is not None:
            d_scale.copy_((dw * plan.keys[index]).sum((1, 2)))
        if d_shift is not None:
            d_shift.copy_(dw.sum((1, 2)))
        left = None, None
    if not (dx is None and d_bias is None and left == (None, None)):
        call.implementation.key_conv2d_backward(dy, x, plan, index, scale, shift, *geometry, dx, *left, d_bias)
    return [dx, d_keys, d_scale, d_shift, d_bias]


def written_out(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    """The same as an ordinary convolution, differentiable in whatever way and as often as you like."""
    stride, padding, dilation, *_ = options
    filters = (scale[:, None, None] * keys[index] + shift[:, None, None])[:, None].to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, filters, bias, stride, padding, dilation, groups=x.shape[1])
