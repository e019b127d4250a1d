"""The key convolution on plain tensors with nobody watching: without the dispatcher, which costs as much as a layer.

`torch.ops.mkf.key_conv2d` with derivatives takes 40 microseconds a call, and as much backward, before anything is
computed; a small layer is computed in 50.
"""

import os
from collections.abc import Sequence
from threading import RLock
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, maybe_current_level
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from mkf.kernels import extension
from mkf.kernels.derived import values_of
from mkf.ops.key_conv2d import compute

PLAIN = frozenset((Tensor, Parameter))

# Looked up once: after a large layer has emptied the caches, every step from name to name waits for memory, and every
# function of torch that is asked for the first time since takes microseconds.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which only torch's own operators support."""
    return forward_ad._current_level >= 0 or (not _is_compiling() and maybe_current_level() is not None)


def is_watched() -> bool:
    """Whether something wants to see operators or to change what they do.

    That is torch.compile, export, tracing, a dispatch mode, the profiler, forward-mode differentiation or torch.func.
    """
    return (
        _is_compiling()
        or _is_unseen_by_guards()
        or torch._C._get_tracing_state() is not None
        or maybe_current_level() is not None
    )


def _is_unseen_by_guards() -> bool:
    """The part of `is_watched` that `_guards` do not tell."""
    return _dispatch_modes() > 0 or forward_ad._current_level >= 0 or profiler._is_profiler_enabled


def are_plain(*tensors: Any) -> bool:
    """Whether these are tensors, not of a subclass, that hold their values as they are."""
    return PLAIN.issuperset(map(type, tensors)) and not any(
        t.layout is not torch.strided or t.is_meta or t.is_neg() or t._is_zerotensor() or torch._is_functional_tensor(t)
        for t in tensors
    )


def run(call: compute.Call, x: Tensor, keys: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a prepared call, with derivatives."""
    if _is_grad_enabled() and (
        x.requires_grad
        or shift.requires_grad
        or scale.requires_grad
        or keys.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        out: Tensor = _KeyConv2d.apply(call, x, keys, scale, shift, bias)
        return out
    return compute.forward(call, x, bias)


def normalizes(call: compute.Call, weight: Tensor, bias: Tensor) -> bool:
    """Whether the call's kernel can also do a LayerNorm with these parameters."""
    if call.kernel.forward_norm is None or call.size[0] == 0:
        return False
    if call.norm_guards is not None and call.norm_guards.check(weight, bias):
        return True
    fits = are_plain(weight, bias) and all(
        t.is_cpu and t.dtype == torch.float32 and t.shape == call.shift.shape and t.is_contiguous()
        for t in (weight, bias)
    )
    if fits:
        call.norm_guards = _guards(weight, bias)
    return fits


def run_norm(
    call: compute.Call,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """The LayerNorm of the output of a prepared call that `normalizes`, with derivatives."""
    trained = (t for t in (x, scale, shift, bias, weight, norm_bias) if t is not None)
    if _is_grad_enabled() and any(t.requires_grad for t in trained):
        normalized: Tensor = _KeyConv2dNorm.apply(call, x, scale, shift, bias, weight, norm_bias, eps)[0]
        return normalized
    return compute.forward_norm(call, x, bias, weight, norm_bias, eps, keep=False)[1]


class _Kept(NamedTuple):
    """A call and what it depends on: while that is the same, it need not be checked and prepared again.

    It refers to nothing but memory of the parameters, and goes when the scale does.

    Attributes:
        call: What was prepared.
        guards: Of `_guards`, for x and the parameters.
        has_bias: Whether a bias is one of them.
        options: Of the call.
        snapshot: Of `_snapshot`.
        pinned: The memory of keys and index, so that no others come to their addresses.
        scale: Its end is this entry's.
    """

    call: compute.Call
    guards: Any
    has_bias: bool
    options: tuple[Any, ...]
    snapshot: Any
    pinned: tuple[Tensor, ...]
    scale: ref[Tensor]


KEPT = 256  # scales; the oldest go first
KEPT_OF_EACH = 16  # sizes and layouts of x, with a gradient and without

_kept: dict[int, tuple[_Kept, ...]] = {}  # by the id of the scale, the newest first
_lock = RLock()  # what goes may call whatever waits for its end


def find(
    x: Tensor,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> compute.Call | None:
    """The call that was kept for these parameters and this size and layout, if it is still right.

    Keys and index must hold the values they had, scale and shift, which change as they train, lie where they lay and be
    finite.
    """
    if type(x) not in PLAIN or x.is_nested:  # the guards of some versions end the process there
        return None
    for call, guards, has_bias, kept_options, snapshot, _, _ in _kept.get(id(scale), ()):
        if (
            options == kept_options
            and (bias is not None) == has_bias
            and (
                guards.check(x, keys, index, scale, shift, bias)
                if has_bias
                else guards.check(x, keys, index, scale, shift)
            )
            and _holds(snapshot, keys, index, scale, shift)
            and not _is_unseen_by_guards()
        ):
            return call
    return None


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
    parameters = [t for t in (keys, index, scale, shift, bias) if t is not None]
    if (
        keys.requires_grad
        or not all(t.is_leaf and t.is_contiguous() for t in parameters)
        or not x.is_contiguous(memory_format=call.layout)
        or x.dtype == torch.float64
        or any(isinstance(option, list) for option in options)  # which may change
    ):
        return
    guards, snapshot = _guards(x, *parameters), _snapshot(keys, index, scale, shift)
    if guards is None or snapshot is None:
        return
    place, has_bias = id(scale), bias is not None
    pinned, end = (keys.detach(), index.detach()), ref(scale, lambda _: _kept.pop(place, None))
    kept = _Kept(call, guards, has_bias, options, snapshot, pinned, end)
    with _lock:
        others = [
            other
            for other in _kept.get(place, ())
            if (other.has_bias, other.options) != (has_bias, options) or not other.guards.check(x, *parameters)
        ]
        while place not in _kept and len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)), None)  # its scale may end at this moment
        _kept[place] = kept, *others[: KEPT_OF_EACH - 1]


def forget(scale: Tensor) -> None:
    """Let go of the calls with this scale: while one refers to it, torch refuses to swap it for another tensor."""
    _kept.pop(id(scale), None)


def _guards(*tensors: Tensor) -> Any:
    """Tells whether tensors have the types, sizes, strides, dtypes and devices that these have, in one microsecond.

    It is how torch.compile knows whether what it compiled is still right. It says no also under torch.func, tracing,
    autocast and inference mode, if it was not made there. It is private to torch: None where there is none.
    """
    try:
        return torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, TypeError):
        return None


def _snapshot(keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """What `_holds` compares with: the values of keys and index, where scale and shift lie, `MKF_BACKEND`.

    None on a CPU without the extension.
    """
    if not keys.is_cpu:
        places = scale.data_ptr(), shift.data_ptr()
        return values_of(keys), values_of(index), places, os.environ.get("MKF_BACKEND")
    if extension.missing():
        return None
    addresses = keys.data_ptr(), index.data_ptr(), scale.data_ptr(), shift.data_ptr()
    return extension.native().snapshot(*addresses, keys.nbytes, index.nbytes, len(index))


def _holds(snapshot: Any, keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether all is as it was, and on the CPU also whether scale and shift are finite."""
    if not keys.is_cpu:
        return bool(snapshot == _snapshot(keys, index, scale, shift))
    holds: bool = snapshot(keys.data_ptr(), index.data_ptr(), scale.data_ptr(), shift.data_ptr())
    return holds


class _KeyConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: compute.Call, x: Tensor, keys: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None
    ) -> Tensor:
        _, _, keys_train, scale_trains, shift_trains, _ = ctx.needs_input_grad
        ctx.call = call
        x_needed = keys_train or scale_trains or shift_trains
        ctx.save_for_backward(x if x_needed else None, keys if keys_train else None, scale, shift)
        return compute.forward(call, x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        call: compute.Call = ctx.call
        x, keys, scale, shift = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if not _is_grad_enabled() and _are_in_place(call, scale, shift):
            arranged = _arranged(call, dy, x)
            if arranged is not None:
                return None, *compute.gradients(call, *arranged, wanted)
        gradients = _watched_gradients(call, dy, x, call.plan.keys if keys is None else keys, scale, shift, wanted)
        return None, *gradients


class _KeyConv2dNorm(torch.autograd.Function):
    """Gives the convolution beside what is wanted of it, so that what is saved of it has a history of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        call: compute.Call,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        norm_bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        _, _, scale_trains, shift_trains, *_ = ctx.needs_input_grad
        out, normalized = compute.forward_norm(call, x, bias, weight, norm_bias, eps, keep=True)
        ctx.call, ctx.eps = call, eps
        ctx.save_for_backward(x if scale_trains or shift_trains else None, scale, shift, weight, out)
        ctx.set_materialize_grads(False)
        return normalized, out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_out: Tensor | None) -> tuple[Any, ...]:
        call: compute.Call = ctx.call
        x, scale, shift, weight, out = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:7]
        if dy is not None and d_out is None and not _is_grad_enabled() and _are_in_place(call, scale, shift):
            arranged = _arranged(call, dy, x)
            if arranged is not None:
                return None, *compute.gradients_norm(call, *arranged, out, weight, ctx.eps, wanted), None
        d_weight = d_norm_bias = None
        if dy is not None:
            dy, d_weight, d_norm_bias = _layer_norm_gradients(dy, out, weight, ctx.eps)
            d_out = dy if d_out is None else dy + d_out
        if d_out is None:
            return (None,) * 8
        of_conv = wanted[0], False, *wanted[1:4]
        dx, _, *others = _watched_gradients(call, d_out, x, call.plan.keys, scale, shift, of_conv)
        return None, dx, *others, d_weight if wanted[4] else None, d_norm_bias if wanted[5] else None, None


def _are_in_place(call: compute.Call, scale: Tensor, shift: Tensor) -> bool:
    """Whether the kernel reads these: they were not replaced or moved, and no hook has stored copies."""
    return (scale.data_ptr(), shift.data_ptr(), call.plan.keys.data_ptr()) == call.places


def _arranged(call: compute.Call, dy: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """What kernels read of dy and x, if dy is plain and nobody watches; quick where those before were alike."""
    given = (dy,) if x is None else (dy, x)
    if call.backward_guards is not None and call.backward_guards.check(*given):
        return None if _is_unseen_by_guards() else (dy, x)
    if is_legacy_batchedtensor(dy) or is_watched() or not are_plain(dy):
        return None
    arranged = compute.arranged(call, dy, x)
    if arranged[0] is dy and arranged[1] is x:
        call.backward_guards = _guards(*given)
    return arranged


def _watched_gradients(
    call: compute.Call,
    dy: Tensor,
    x: Tensor | None,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """As `compute.gradients`, by operators of torch."""
    saved = x, keys, call.index, scale, shift
    if _is_grad_enabled() or is_legacy_batchedtensor(dy) or is_transformed():
        # These gradients are to be differentiated again, or dy stands for many (`is_grads_batched`).
        return _differentiable_gradients(dy, *saved, wanted, call.x_size, *call.options)
    gradients = torch.ops.mkf.key_conv2d_backward(dy, *saved, wanted, call.x_size, *call.options)
    return [t if w else None for t, w in zip(gradients, wanted, strict=True)]


def _layer_norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias of a LayerNorm over the channels, differentiable."""
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    normal = (x - mean) * scale
    g = dy * weight[:, None, None]
    dx = scale * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))
    return dx, (dy * normal).sum((0, 2, 3)), dy.sum((0, 2, 3))


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
    """As `compute.gradients`, by torch's own operators: those of the ordinary convolution.

    Each is written out, and not left to autograd: where x itself was computed from the parameters, as in a layer that
    is applied twice, that would follow x to them too.
    """
    if x is None:  # then its values do not matter
        x = dy.new_zeros(size)
    stride, padding, dilation, *_ = options
    filters = compute.filters_of(keys, index, scale, shift)
    of_filters = any(wanted[1:4])
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        x,
        filters[:, None].to(x.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        len(index),
        (wanted[0], of_filters, False),
    )
    d_keys = d_scale = d_shift = None
    if of_filters:
        dw = dw[:, 0].to(filters.dtype)
        if wanted[1]:
            d_keys = torch.zeros_like(keys).index_add(0, index, (scale[:, None, None] * dw).to(keys.dtype))
        d_scale = (dw * keys[index.long()]).sum((1, 2)) if wanted[2] else None
        d_shift = dw.sum((1, 2)) if wanted[3] else None
    d_bias = dy.sum((0, 2, 3), dtype=shift.dtype) if wanted[4] else None
    return [dx if wanted[0] else None, d_keys, d_scale, d_shift, d_bias]
