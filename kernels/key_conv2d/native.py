"""The key convolution in C++ (csrc/key_conv2d/cpu_kernel.hpp)."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.key_conv2d import Bound, KeyPlan, Pair

PER_THREAD = 1 << 14  # outputs below which another thread costs more than it brings


def why_not(device: torch.device) -> str | None:
    """Needs the compiled extension."""
    return extension.missing()


def why_not_call(x: Tensor, plan: KeyPlan, stride: Pair, padding: Pair, dilation: Pair) -> str | None:
    """Serves float32 and bfloat16, stride 1 and 2, dilation 1 and 'same' zero padding."""
    k = plan.keys.shape[-1]
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"float32 and bfloat16 only, not {x.dtype}"
    if k % 2 == 0 or not 3 <= k <= 11:
        return f"odd kernels of 3 to 11 only, not {k}"
    if tuple(stride) not in ((1, 1), (2, 2)):
        return f"stride 1 and 2 only, not {stride}"
    if tuple(dilation) != (1, 1):
        return f"dilation 1 only, not {dilation}"
    if tuple(padding) != (k // 2, k // 2):
        return f"padding {k // 2} only, not {padding}"
    return None


@lru_cache(256)
def _prepared(plan: KeyPlan, dtype: torch.dtype, channels_last: bool, size: torch.Size, stride: int) -> Any:
    """The extension's object for one plan, which is known by its tensors and kept with them, and one size of x."""
    shape = (extension.DTYPES[dtype], channels_last, *size, plan.keys.shape[-1], stride)
    factors = plan.direct, plan.terms, plan.columns, plan.rows, plan.box, plan.tap, plan.tap_row, plan.tap_column
    addresses = [t.data_ptr() for t in (plan.keys, *factors)]
    return extension.native().KeyConv2dCpu(shape, (len(plan.keys), plan.columns.shape[1], addresses))


def bind(x: Tensor, plan: KeyPlan, index: Tensor, scale: Tensor, shift: Tensor, stride: Pair, *_: Pair) -> Bound:
    """See `mkf.kernels.key_conv2d`. Uses as many threads as torch does, or one if x is small or the process forked."""
    prepared = _prepared(plan, x.dtype, not x.is_contiguous(), x.shape, stride[0])
    convolve, differentiate, *with_norm = prepared.bind(index.data_ptr(), scale.data_ptr(), shift.data_ptr())
    most_threads = max(1, x.numel() // PER_THREAD)

    def forward(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        threads = min(extension.num_threads(), most_threads)
        convolve(threads, 0 if bias is None else bias.data_ptr(), x.data_ptr(), out.data_ptr())

    def backward(*tensors: Tensor | None) -> None:
        threads = min(extension.num_threads(), most_threads)
        differentiate(threads, *[0 if t is None else t.data_ptr() for t in tensors])

    if not with_norm:
        return Bound(forward, backward)
    convolve_norm, differentiate_norm = with_norm

    def forward_norm(
        x: Tensor, bias: Tensor | None, out: Tensor | None, weight: Tensor, norm_bias: Tensor, eps: float, norm: Tensor
    ) -> None:
        threads = min(extension.num_threads(), most_threads)
        tensors = bias, x, out, weight, norm_bias
        convolve_norm(threads, *[0 if t is None else t.data_ptr() for t in tensors], eps, norm.data_ptr())

    def backward_norm(dy: Tensor, out: Tensor, weight: Tensor, eps: float, *tensors: Tensor | None) -> None:
        threads = min(extension.num_threads(), most_threads)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        differentiate_norm(threads, dy.data_ptr(), out.data_ptr(), weight.data_ptr(), eps, *addresses)

    return Bound(forward, backward, forward_norm, backward_norm)


def key_conv2d(
    x: Tensor,
    plan: KeyPlan,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out: Tensor,
) -> None:
    """See `mkf.kernels.key_conv2d`."""
    bind(x, plan, index, scale, shift, stride, padding, dilation).forward(x, bias, out)


def key_conv2d_backward(
    dy: Tensor,
    x: Tensor | None,
    plan: KeyPlan,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    dx: Tensor | None,
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """See `mkf.kernels.key_conv2d`. One pass over dy and x."""
    like = dx if x is None else x
    if like is None:  # then only d_bias is wanted, for which the stride and what x looks like do not matter
        like, stride = dy, (1, 1)
    bound = bind(like, plan, index, scale, shift, stride, padding, dilation)
    bound.backward(dy, x, dx, d_scale, d_shift, d_bias)
