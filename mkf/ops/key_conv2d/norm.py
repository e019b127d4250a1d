"""The key convolution with the LayerNorm that follows it in ConvNeXt, in one pass where there is a kernel for it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mkf.ops.key_conv2d import Sizes, eager, key_conv2d, prepared

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def key_conv2d_layer_norm(
    x: Tensor,
    keys: Any,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-6,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    backend: str | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """Convolve every channel with its own filter, a scaled and shifted key, and normalise pixels over the channels.

        y = key_conv2d(x, keys, index, scale, shift, bias, ...)
        out[n, c] = (y[n, c] - mean[n]) / sqrt(variance[n] + eps) * norm_weight[c] + norm_bias[c]

    with the mean and the (biased) variance of a pixel's channels: `torch.nn.functional.layer_norm` where the channels
    come last ("Layer Normalization", Ba, Kiros and Hinton, 2016). In one pass, forward and backward, an image is
    normalised while the caches hold it: on the CPU, for float32 in channels-last memory with 16 channels and ten pixels
    or more, with the C++ extension and keys that do not train, outside of autocast and torch.compile. Everywhere else
    it is those two operations, one after the other. The two differ by rounding.

    Args:
        x: As for `key_conv2d`, as the next five.
        keys: K keys.
        index: The key of each channel.
        scale: Of each channel.
        shift: Of each channel.
        bias: Of each channel, or None.
        norm_weight: (C,), of the LayerNorm.
        norm_bias: (C,), of the LayerNorm.
        eps: Added to the variance.
        stride: As for `key_conv2d`, as the rest.
        padding: Zeros on every side.
        dilation: Of the filters.
        backend: Name of an implementation.
        tolerance: Relative error allowed in a key.

    Returns:
        Of the size of what `key_conv2d` returns; as many derivatives, and first ones that are deterministic.

    Raises:
        ValueError: As `key_conv2d`.
        TypeError: As `key_conv2d`.
        BackendError: As `key_conv2d`.
        RuntimeError: `norm_weight` or `norm_bias` does not have C elements, or is of another dtype than y.
    """
    if not _is_dynamo_compiling() and not _is_any_autocast_enabled():
        options = stride, padding, dilation, tolerance, backend
        call = eager.find(x, keys, index, scale, shift, bias, options)
        if call is None and _is_for_the_kernel(x, keys):
            tensors, *_, call = prepared(x, keys, index, scale, shift, bias, options)
            same = all(t is u for t, u in zip(tensors[2:], (index, scale, shift, bias), strict=True))
            call = call if same else None  # else they are of other dtypes, and so is the norm
        if call is not None and eager.normalizes(call, norm_weight, norm_bias):
            return eager.run_norm(call, x, scale, shift, bias, norm_weight, norm_bias, eps)
    y = key_conv2d(x, keys, index, scale, shift, bias, stride, padding, dilation, backend, tolerance)
    channels, last = y.ndim - 3, y.ndim - 1
    normalized = F.layer_norm(y.movedim(channels, last), (y.shape[channels],), norm_weight, norm_bias, eps)
    return normalized.movedim(last, channels)


def _is_for_the_kernel(x: Any, keys: Any) -> bool:
    """Whether it is worth while to look closer."""
    return (
        type(x) in eager.PLAIN
        and x.ndim == 4
        and x.dtype == torch.float32
        and x.is_cpu
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not getattr(keys, "requires_grad", False)
    )
