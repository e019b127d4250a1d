"""The key convolution: a depthwise convolution whose filters are scaled and shifted copies of a few shared keys."""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mkf.kernels.key_conv2d import Pair
from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.registry import choose, passed_over
from mkf.ops.key_conv2d import compute, eager, operator  # noqa: F401 (the operator registers itself)
from mkf.ops.key_conv2d.check import check_input, check_parameters

Sizes = int | Sequence[int]

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def key_conv2d(
    x: Tensor,
    keys: Any,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    backend: str | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """Convolve every channel with its own filter, a scaled and shifted key.

        out[n, c] = conv(x[n, c], scale[c] * keys[index[c]] + shift[c]) + bias[c]

    This equals `torch.nn.functional.conv2d(x, weight, bias, ..., groups=C)` with those filters as the weight, up to
    rounding. It is faster because keys are shared and few: each is taken once as the cheapest sum of separable terms, a
    box, which the shift joins, and a tap (`KeySet.plan` shows it), and because the gradients of scale, shift and bias
    need no gradient of k * k taps. Sums are float32 or better. What the fast implementations do not serve, PyTorch's
    own convolution does, silently and with its own sums; `explain_key_conv2d` tells which would run and why no faster
    one does.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, bfloat16, float16, or float64, which only the reference serves. Any
            strides; a channels-last input gives a channels-last output. N may be 0. Under autocast x is cast to the
            autocast dtype, the parameters are not.
        keys: (K, k, k), a `KeySet` or a tensor; k odd, 3 to 11, 1 <= K <= 256. A tensor that requires a gradient is
            used as it is, tap by tap.
        index: (C,) integers in [0, K), the key of each channel.
        scale: (C,), finite; float32 or of the dtype of x.
        shift: (C,), finite; float32 or of the dtype of x.
        bias: (C,), or None; float32 or of the dtype of x.
        stride: One number, or vertical and horizontal. Fast are 1 and 2.
        padding: Rows and columns of zeros on every side; one number, a pair, "valid" (none) or "same" (the output has
            the size of the input; stride 1 only).
        dilation: One number, or vertical and horizontal.
        backend: Name of an implementation (`mkf env` lists them); automatic if None, or as `MKF_BACKEND` says.
        tolerance: The largest relative L2 error in a key that is allowed where it makes it cheaper; 0 for exact, that
            is to float32 rounding. The reference is always exact.

    Returns:
        (N, C, H', W') or (C, H', W') of the dtype of x, H' = (H + 2 * padding - dilation * (k - 1) - 1) // stride + 1.
        It has derivatives with respect to x, scale, shift, bias and keys given as a tensor. Where the fast
        implementations run, the first ones are deterministic, on the CPU also whatever the number of threads unless
        keys require a gradient; that, and the parameters' with it, PyTorch's convolution computes, as it does second
        ones, forward mode and torch.func. What is not finite in x reaches the outputs whose window holds it and no
        others; as filters are added up in parts, these are often NaN where `conv2d` has Inf.

    Raises:
        ValueError: Shapes that do not fit together, an index out of range, a scale or shift or key that is not finite,
            an input smaller than the filter. On a GPU, index and keys are looked at when they are new or were written
            to, scale and shift never: that would wait for the GPU at every step of training.
        TypeError: Dtypes that are no floating-point numbers or do not go together.
        BackendError: The implementation asked for cannot run there, or cannot serve this call.
    """
    if _is_any_autocast_enabled():
        x = _autocast(x)
    options = stride, padding, dilation, tolerance, backend
    if not _is_dynamo_compiling():  # which could not trace this; others that look at calls, `find` sees itself
        call = eager.find(x, keys, index, scale, shift, bias, options)
        if call is not None:
            return eager.run(call, x, keys, scale, shift, bias)

    if _is_onnx_export():
        q = _filters(keys, x)
        return compute.written_out(x, q, index, scale, shift, bias, stride, padding, dilation)
    tensors, geometry, planned, call = prepared(x, keys, index, scale, shift, bias, options)
    if call is not None:
        out = eager.run(call, *tensors[:2], *tensors[3:])
    elif eager.is_transformed():
        out = compute.written_out(*tensors, *geometry)
    else:
        out = torch.ops.mkf.key_conv2d(*tensors, *geometry, planned, backend or "")
    return out if x.ndim == 4 else out[0]


def prepared(
    x: Tensor,
    keys: Any,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> tuple[Any, tuple[Pair, Pair, Pair], float | None, compute.Call | None]:
    """What there is to do before a call that was not kept, with the options as `key_conv2d` passes them on.

    Returns:
        The six tensors as they are computed with, stride, padding and dilation as pairs, the tolerance or None where
        the keys train, and the call, which is kept for the next time if it can be. None where something watches.

    Raises:
        As `key_conv2d`.
    """
    stride, padding, dilation, tolerance, backend = options
    q = _filters(keys, x)
    geometry = check_input(x, q, stride, padding, dilation)
    check_parameters(x, index, scale, shift, bias)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = scale.to(dtype), shift.to(dtype), None if bias is None else bias.to(dtype)
    # What is known of keys that are frozen and of an index is known by the caller's tensors, converted or not.
    tensors = (x if x.ndim == 4 else x[None], q.to(dtype) if q.requires_grad else q, index, *wide)
    planned = None if q.requires_grad else tolerance
    if eager.is_watched() or not eager.are_plain(*(t for t in tensors if t is not None)):
        return tensors, geometry, planned, None
    call = compute.prepare(*tensors[:5], *geometry, planned, backend or "")
    if all(t is u for t, u in zip(tensors, (x, keys, index, scale, shift, bias), strict=True)):
        eager.keep(call, *tensors, options)
    return tensors, geometry, planned, call


def explain_key_conv2d(
    x: Tensor,
    keys: Any,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    backend: str | None = None,
    tolerance: float = 0.0,
) -> str:
    """Say which implementation `key_conv2d` would run, and why not those that are preferred to it.

    The arguments are those of `key_conv2d` of the same names and refused alike. Nothing is computed.
    """
    x = _autocast(x)
    keys = _filters(keys, x)
    geometry = check_input(x, keys, stride, padding, dilation)
    x = x if x.ndim == 4 else x[None]
    x = x.contiguous(memory_format=compute.layout_of(x))
    plan = plan_of(keys, None if keys.requires_grad else tolerance, torch.float32)

    def why_not_call(module: ModuleType) -> str | None:
        reason: str | None = module.why_not_call(x, plan, *geometry)
        return reason

    chosen = choose("key_conv2d", x.device, backend, why_not_call)
    reasons = passed_over("key_conv2d", x.device, chosen, why_not_call)
    return "; ".join([f"{chosen.name}: {chosen.description}", *(f"not {name}: {why}" for name, why in reasons.items())])


def _is_onnx_export() -> bool:
    """Whether a graph of ONNX's operators is being made, which has none for keys."""
    return (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def _autocast(x: Any) -> Any:
    """The input of a convolution as autocast wants it."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta:
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    return x


def _filters(keys: Any, x: Any) -> Any:
    """The filters of a key set where x is, and all else as it is."""
    return _filters_on(keys, x.device) if hasattr(keys, "filters") and isinstance(x, Tensor) else keys


@lru_cache(64)
def _filters_on(keys: Any, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they outlive it
        filters: Tensor = keys.filters
        return filters.to(device)
