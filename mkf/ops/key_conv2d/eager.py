"""The key convolution on plain tensors with nobody watching: without the dispatcher, which costs as much as a layer.

`torch.ops.mkf.key_conv2d` with derivatives takes 40 microseconds a call, and as much backward, before anything is
computed; a small layer is computed in 50.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mkf.ops.key_conv2d import compute

PLAIN = frozenset((Tensor, Parameter))


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which only torch's own operators support."""
    return not torch.compiler.is_compiling() and (
        torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
    )


def is_watched(*tensors: Any) -> bool:
    """Whether something wants to see operators or to change what they do.

    That is torch.compile, export, tracing, the profiler, dispatch modes, torch.func, forward-mode differentiation and
    subclasses of tensors.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or not PLAIN.issuperset(map(type, tensors))
    )


def run(
    x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    """See `compute.forward`, whose arguments these are; with derivatives."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or shift.requires_grad
        or scale.requires_grad
        or keys.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        out: Tensor = _KeyConv2d.apply(x, keys, index, scale, shift, bias, *options)
        return out
    return compute.forward(x, keys, index, scale, shift, bias, *options)[0]


class _KeyConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, keys, index, scale, shift, _, *options, _ = arguments
        x_trains, keys_train, _, scale_trains, shift_trains, bias_trains, *_ = ctx.needs_input_grad
        out, ctx.call = compute.forward(*arguments)
        ctx.wanted = x_trains, keys_train, scale_trains, shift_trains, bias_trains
        ctx.options = options
        ctx.size = x.shape
        ctx.save_for_backward(x if keys_train or scale_trains or shift_trains else None, keys, index, scale, shift)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        wanted, size, options, saved = ctx.wanted, ctx.size, ctx.options, ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to be differentiated again
            gradients = _differentiable_gradients(dy, *saved, wanted, size, *options)
        elif is_watched(dy):
            gradients = torch.ops.mkf.key_conv2d_backward(dy, *saved, wanted, size, *options)
            gradients = [t if w else None for t, w in zip(gradients, wanted, strict=True)]
        else:
            stride, padding, dilation, *_ = options
            gradients = compute.gradients(ctx.call, dy, saved[0], wanted, size, stride, padding, dilation)
        dx, d_keys, *others = gradients
        return dx, d_keys, None, *others, None, None, None, None, None, None


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor | None,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    wanted: Sequence[bool],
    size: Sequence[int],
    *options: Any,
) -> list[Tensor | None]:
    """As `compute.gradients`, by torch's own operators: those of the ordinary convolution."""
    if x is None:  # then its values do not matter
        x = dy.new_zeros(size, requires_grad=True)
    out = compute.written_out(x, keys, index, scale, shift, None, *options)
    leaves = [t for t, w in zip((x, keys, scale, shift), wanted, strict=False) if w]
    found = iter(torch.autograd.grad(out, leaves, dy, create_graph=True) if leaves else ())
    d_bias = dy.sum((0, 2, 3), dtype=shift.dtype) if wanted[4] else None
    return [*(next(found) if w else None for w in wanted[:4]), d_bias]
