"""The key convolution on plain tensors with nobody watching: without the dispatcher, which costs as much as a layer.

`torch.ops.mkf.key_conv2d` with derivatives takes 40 microseconds a call, and as much backward, before anything is
computed; a small layer is computed in 50.
"""

import os
from collections.abc import Hashable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mkf.kernels import registry
from mkf.kernels.derived import values_of
from mkf.ops.key_conv2d import compute
from mkf.ops.key_conv2d.check import are_finite

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


def is_plain(x: Any, keys: Any, index: Any, scale: Any, shift: Any, bias: Any) -> bool:
    """Whether these are tensors that hold their values as they are, for which nobody watches."""
    return (
        not is_watched(x, keys, index, scale, shift, x if bias is None else bias)
        and x.layout is torch.strided
        and not x.is_meta
        and not x.is_neg()
    )


def run(
    call: compute.Call, x: Tensor, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None
) -> Tensor:
    """The output of a prepared call, with derivatives."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or shift.requires_grad
        or scale.requires_grad
        or keys.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        out: Tensor = _KeyConv2d.apply(call, x, keys, index, scale, shift, bias)
        return out
    return compute.forward(call, x, bias)


class _Kept(NamedTuple):
    """A call and what it depends on: while that is the same, it need not be checked and prepared again."""

    call: compute.Call
    tensors: tuple[Tensor | None, ...]
    described: tuple[Any, ...]
    values: tuple[Hashable, Hashable]


KEPT = 256  # calls; the oldest go first

_kept: dict[tuple[int, torch.Size], _Kept] = {}
_lock = Lock()


def find(
    x: Tensor,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> compute.Call | None:
    """The call that was kept for these parameters and this size, if it is still right.

    Keys and index must hold the values they had; scale and shift, which change as they train, must be finite.
    """
    kept = _kept.get((id(scale), x.shape))
    if kept is None:
        return None
    call, tensors, described, values = kept
    if not (
        tensors[0] is keys
        and tensors[1] is index
        and tensors[2] is scale
        and tensors[3] is shift
        and tensors[4] is bias
        and described == _describe(x, keys, index, scale, shift, bias, options)
        and values == (values_of(keys), values_of(index))
        and are_finite(scale, shift)
    ):
        return None
    return call


def keep(
    call: compute.Call,
    x: Tensor,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> None:
    """Let `find` find it, if its parameters are there to stay: no results of a computation, no copies."""
    tensors = keys, index, scale, shift, bias
    if (
        all(t is None or (t.is_leaf and t.is_contiguous()) for t in tensors)
        and x.is_contiguous(memory_format=call.layout)
        and not keys.requires_grad
    ):
        described = _describe(x, keys, index, scale, shift, bias, options)
        with _lock:
            while len(_kept) >= KEPT:
                del _kept[next(iter(_kept))]
            _kept[id(scale), x.shape] = _Kept(call, tensors, described, (values_of(keys), values_of(index)))


def _describe(
    x: Tensor,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> tuple[Any, ...]:
    """All that a call depends on but the values and the size of x: `.data` can make another tensor of a parameter."""
    return (
        options,
        os.environ.get("MKF_BACKEND"),
        id(registry.IMPLEMENTATIONS),
        x.stride(),
        x.dtype,
        x.device,
        keys.shape,
        keys.stride(),
        keys.dtype,
        keys.device,
        keys.requires_grad,
        index.stride(),
        index.dtype,
        index.device,
        scale.shape,
        scale.stride(),
        scale.dtype,
        scale.device,
        shift.shape,
        shift.stride(),
        shift.dtype,
        shift.device,
        bias is None or (bias.shape, bias.stride(), bias.dtype, bias.device),
    )


class _KeyConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: compute.Call,
        x: Tensor,
        keys: Tensor,
        index: Tensor,
        scale: Tensor,
        shift: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        _, x_trains, keys_train, _, scale_trains, shift_trains, bias_trains = ctx.needs_input_grad
        ctx.wanted = x_trains, keys_train, scale_trains, shift_trains, bias_trains
        ctx.call = call
        ctx.size = x.shape
        ctx.save_for_backward(x if keys_train or scale_trains or shift_trains else None, keys, index, scale, shift)
        return compute.forward(call, x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        call, wanted, size, saved = ctx.call, ctx.wanted, ctx.size, ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):
            # These gradients are to be differentiated again, or dy stands for many (`is_grads_batched`).
            gradients = _differentiable_gradients(dy, *saved, wanted, size, *call.options)
        elif is_watched(dy):
            gradients = torch.ops.mkf.key_conv2d_backward(dy, *saved, wanted, size, *call.options)
            gradients = [t if w else None for t, w in zip(gradients, wanted, strict=True)]
        else:
            gradients = compute.gradients(call, dy, saved[0], wanted, size)
        dx, d_keys, *others = gradients
        return None, dx, d_keys, None, *others


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
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        out = compute.written_out(x, keys, index, scale, shift, None, *options)
    leaves = [t for t, w in zip((x, keys, scale, shift), wanted, strict=False) if w]
    found = iter(torch.autograd.grad(out, leaves, dy, create_graph=again) if leaves else ())
    d_bias = dy.sum((0, 2, 3), dtype=shift.dtype) if wanted[4] else None
    return [*(next(found) if w else None for w in wanted[:4]), d_bias]
