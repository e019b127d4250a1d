"""The key convolution: a depthwise convolution whose filters are scaled and shifted copies of a few shared keys."""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.registry import choose, passed_over
from mkf.ops.key_conv2d import compute, eager, operator  # noqa: F401 (the operator registers itself)
from mkf.ops.key_conv2d.check import Checked, check, check_once

Sizes = int | Sequence[int]


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
    own convolution does, silently; `explain_key_conv2d` tells which would run and why no faster one does.

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
        stride: One number, or vertical and horizontal.
        padding: Rows and columns of zeros on every side; one number, a pair, "valid" (none) or "same" (the output has
            the size of the input; stride 1 only).
        dilation: One number, or vertical and horizontal.
        backend: Name of an implementation (`mkf env` lists them); automatic if None, or as `MKF_BACKEND` says.
        tolerance: The largest relative L2 error in a key that is allowed where it makes it cheaper; 0 for exact, that
            is to float32 rounding. The reference is always exact.

    Returns:
        (N, C, H', W') or (C, H', W') of the dtype of x, H' = (H + 2 * padding - dilation * (k - 1) - 1) // stride + 1.
        It has derivatives with respect to x, scale, shift, bias and keys given as a tensor. Where the fast
        implementations run, the first ones are deterministic, on the CPU also whatever the number of threads; second
        ones, forward mode and torch.func take PyTorch's convolution.

    Raises:
        ValueError: Shapes that do not fit together, an index out of range, a scale or shift or key that is not finite,
            an input smaller than the filter. On a GPU, index and keys are looked at when they are new or were written
            to, scale and shift never: that would wait for the GPU at every step of training.
        TypeError: Dtypes that are no floating-point numbers or do not go together.
        BackendError: The implementation asked for cannot run there, or cannot serve this call.
    """
    some_bias = x if bias is None else bias
    watched = eager.is_watched(x, keys, index, scale, shift, some_bias)
    if watched or torch._C._is_any_autocast_enabled():
        x, keys = _prepared(x, keys, index, scale, shift, bias)
        watched = eager.is_watched(x, keys, index, scale, shift, some_bias)
    checked = _checked(x, keys, index, scale, shift, bias, stride, padding, dilation)
    single = x.ndim == 3
    if not checked.ready:
        index = index.clamp(-1, keys.shape[0]).to(torch.int32)  # what is out of range stays so
        keys, scale, shift = keys.to(checked.dtype), scale.to(checked.dtype), shift.to(checked.dtype)
        bias = None if bias is None else bias.to(checked.dtype)
        x = x[None] if single else x
    options = (
        checked.stride,
        checked.padding,
        checked.dilation,
        None if keys.requires_grad else tolerance,
        backend or "",
    )
    if not (watched or x.is_meta or x.is_neg()):
        out = eager.run(x, keys, index, scale, shift, bias, *options, checked.size)
    elif eager.is_transformed():
        out = compute.written_out(x, keys, index, scale, shift, bias, *options)
    else:
        out = torch.ops.mkf.key_conv2d(x, keys, index, scale, shift, bias, *options)
    return out[0] if single else out


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

    The arguments are those of `key_conv2d` and refused alike. Nothing is computed.
    """
    index = torch.zeros(x.shape[-3] if isinstance(x, Tensor) and x.ndim > 2 else 0, dtype=torch.int32)
    index = index.to(x.device) if isinstance(x, Tensor) else index
    x, keys = _prepared(x, keys, index, index.float(), index.float(), None)
    checked = _checked(x, keys, index, index.float(), index.float(), None, stride, padding, dilation)
    x = x if x.ndim == 4 else x[None]
    x = x.contiguous(memory_format=compute.layout_of(x))
    plan = plan_of(keys.to(checked.dtype).contiguous(), None if keys.requires_grad else tolerance)

    def why_not_call(module: ModuleType) -> str | None:
        reason: str | None = module.why_not_call(x, plan, checked.stride, checked.padding, checked.dilation)
        return reason

    chosen = choose("key_conv2d", x.device, backend, why_not_call)
    reasons = passed_over("key_conv2d", x.device, chosen, why_not_call)
    return "; ".join([f"{chosen.name}: {chosen.description}", *(f"not {name}: {why}" for name, why in reasons.items())])


def _prepared(x: Any, keys: Any, index: Any, scale: Any, shift: Any, bias: Any) -> tuple[Tensor, Tensor]:
    """Refuse what is no tensor; x in the dtype of autocast, and keys as a tensor where x is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, not {type(x).__name__}")
    if hasattr(keys, "filters"):
        keys = _filters(keys, x.device)
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a KeySet or a tensor, not {type(keys).__name__}")
    for name, t in (("index", index), ("scale", scale), ("shift", shift), ("bias", bias)):
        if not isinstance(t, Tensor) and not (t is None and name == "bias"):
            raise TypeError(f"{name}: expected a tensor, not {type(t).__name__}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x, keys


@lru_cache(64)
def _filters(keys: Any, device: torch.device) -> Tensor:
    filters: Tensor = keys.filters
    return filters.to(device)


def _checked(
    x: Tensor,
    keys: Tensor,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
) -> Checked:
    if x.layout is not torch.strided:
        raise TypeError(f"x is not a dense tensor but {x.layout}")
    tensors = (
        (x.shape, x.dtype, x.device),
        (keys.shape, keys.dtype, keys.device),
        (index.shape, index.dtype, index.device),
        (scale.shape, scale.dtype, scale.device),
        (shift.shape, shift.dtype, shift.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )
    if torch.compiler.is_compiling():
        return check(*tensors, stride, padding, dilation)
    if list in (type(stride), type(padding), type(dilation)):  # which cannot be looked up
        return check(*tensors, stride, padding, dilation)
    return check_once(*tensors, stride, padding, dilation)
