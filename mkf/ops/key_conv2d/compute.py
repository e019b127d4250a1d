"""Calling an implementation of the key convolution, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mkf.kernels.gpu import keep_if_captured
from mkf.kernels.key_conv2d import Bound, KeyPlan, Pair
from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.key_conv2d.reference import weight_gradient
from mkf.kernels.registry import choose
from mkf.ops.key_conv2d.check import check_channels, check_finite, checked_index, output_size


@dataclass(slots=True)
class Call:
    """One call but for its data: what forward and backward have in common.

    Attributes:
        kernel: What computes.
        plan: Of the keys.
        index: (C,) int32, a copy, so that a gradient is of what was computed.
        scale: (C,), contiguous, the memory of the caller's where that can be, as the next: only a tensor that nobody
            else has keeps its size and dtype whatever becomes of theirs.
        shift: (C,).
        places: Addresses of scale, shift and the plan's keys, which the kernel may keep. Memory that is shared with the
            caller can be moved under these tensors, as FSDP does.
        layout: Of x and all that has its dimensions.
        x_size: Of x.
        size: Of the output.
        keeps_size: Whether the two are equal.
        options: Stride, padding, dilation, tolerance and backend.
        backward_guards: What the eager backward pass knows dy and x by, as they were before.
        norm_guards: The same for weight and bias of a LayerNorm that follows.
    """

    kernel: Bound
    plan: KeyPlan
    index: Tensor
    scale: Tensor
    shift: Tensor
    places: tuple[int, int, int]
    layout: torch.memory_format
    x_size: Sequence[int]
    size: Sequence[int]
    keeps_size: bool
    options: tuple[Any, ...]
    backward_guards: Any = None
    norm_guards: Any = None


_empty_like = torch.empty_like  # looked up once: after a large layer the way to a name costs as much as the call


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that x has or is nearest to: contiguous or channels-last.

    Of one pixel or one channel both are the same memory, and the strides tell which is meant, as for torch.
    """
    _, channel, row, column = x.stride()
    if x.is_contiguous():
        means_last = x.is_contiguous(memory_format=torch.channels_last) and channel * x.shape[1] <= column
        return torch.channels_last if means_last else torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
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
        check_channels(name, p, x.shape[1])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    index = checked_index(index, len(keys))
    scale, shift = (p.detach().to(dtype).contiguous() for p in (scale, shift))
    check_finite(scale=scale, shift=shift)
    plan = plan_of(keys, tolerance, dtype)
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    implementation = choose(
        "key_conv2d", x.device, backend, lambda module: module.why_not_call(x, plan, stride, padding, dilation)
    )
    size = output_size(x.shape, keys.shape[-1], stride, padding, dilation)
    kernel = Bound.of(implementation.load(), x, plan, index, scale, shift, stride, padding, dilation)
    options = stride, padding, dilation, tolerance, backend
    places = scale.data_ptr(), shift.data_ptr(), plan.keys.data_ptr()
    return Call(kernel, plan, index, scale, shift, places, layout, tuple(x.shape), size, x.shape == size, options)


def forward(call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
    """The output for x and bias."""
    x = x.contiguous(memory_format=call.layout)
    out = _empty(call, call.size, x)
    if call.size[0] > 0:
        call.kernel.forward(x, None if bias is None else bias.contiguous(), out)
    return out


def forward_norm(
    call: Call, x: Tensor, bias: Tensor | None, weight: Tensor, norm_bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """The output, if it is to be kept, and its LayerNorm, for x in the layout of the call."""
    assert call.kernel.forward_norm is not None
    bias = None if bias is None else bias.contiguous()
    normalized = _empty(call, call.size, x)
    out = _empty_like(normalized) if keep else None
    call.kernel.forward_norm(x, bias, out, weight, norm_bias, eps, normalized)
    return out, normalized


def _empty(call: Call, size: Sequence[int], like: Tensor) -> Tensor:
    if call.keeps_size:
        return _empty_like(like)  # which lies as the call wants it; much faster, and small layers wait for it
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=call.layout)


def arranged(call: Call, dy: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What kernels read of dy and x: these in the layout of the call.

    Raises:
        RuntimeError: x is no longer what the output was computed of.
    """
    if x is None:
        return dy.contiguous(memory_format=call.layout), None
    if x.shape != call.x_size or x.dtype != dy.dtype:
        raise RuntimeError(f"x was {dy.dtype} {call.x_size} in the forward pass, is {x.dtype} {tuple(x.shape)}")
    return dy.contiguous(memory_format=call.layout), x.contiguous(memory_format=call.layout)


def gradients(call: Call, dy: Tensor, x: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients for x, keys, scale, shift and bias, None where none is wanted, of dy and x that are `arranged`."""
    x_trains, keys_train, scale_trains, shift_trains, bias_trains = wanted
    dx = _empty(call, call.x_size, dy) if x_trains else None
    d_scale = _empty_like(call.shift) if scale_trains else None
    d_shift = _empty_like(call.shift) if shift_trains else None
    d_bias = _empty_like(call.shift) if bias_trains else None
    if call.size[0] == 0:
        d_keys = torch.zeros_like(call.plan.keys) if keys_train else None
        return [None if t is None else t.zero_() for t in (dx, d_keys, d_scale, d_shift, d_bias)]
    if not keys_train:
        call.kernel.backward(dy, x, dx, d_scale, d_shift, d_bias)
        return [dx, None, d_scale, d_shift, d_bias]
    # There must be a gradient of every filter; from it scale and shift have theirs too.
    assert x is not None
    keys, index = call.plan.keys, call.index
    keep_if_captured(index)
    dw = weight_gradient(dy, x, keys.shape[-1], *call.options[:3])
    member = index == torch.arange(len(keys), device=index.device)[:, None]  # a product with it adds up by key
    d_keys = ((member * call.scale) @ dw.flatten(1)).view_as(keys)
    if d_scale is not None:
        d_scale.copy_((dw * keys[index]).sum((1, 2)))
    if d_shift is not None:
        d_shift.copy_(dw.sum((1, 2)))
    if dx is not None or d_bias is not None:
        call.kernel.backward(dy, x, dx, None, None, d_bias)
    return [dx, d_keys, d_scale, d_shift, d_bias]


def gradients_norm(
    call: Call, dy: Tensor, x: Tensor | None, out: Tensor, weight: Tensor, eps: float, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for x, scale, shift, bias and the norm's weight and bias, of dy and x that are `arranged`."""
    assert call.kernel.backward_norm is not None
    dx = _empty(call, call.x_size, dy) if wanted[0] else None
    others = [_empty_like(call.shift) if w else None for w in wanted[1:]]
    out = out.contiguous(memory_format=call.layout)
    call.kernel.backward_norm(dy, out, weight.contiguous(), eps, x, dx, *others)
    return [dx, *others]


def filters_of(keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What the channels are convolved with, written out: scale[c] * keys[index[c]] + shift[c], (C, k, k)."""
    return scale[:, None, None] * keys[index.long()] + shift[:, None, None]


def written_out(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    """The same as an ordinary convolution, differentiable in whatever way and as often as you like."""
    stride, padding, dilation, *_ = options
    weight = filters_of(keys, index, scale, shift)[:, None].to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])
