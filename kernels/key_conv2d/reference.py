"""The key convolution in PyTorch: the filters are written out, then it is an ordinary depthwise convolution."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mkf.kernels.gpu import keep_if_captured
from mkf.kernels.key_conv2d import KeyPlan, Pair


def why_not(device: torch.device) -> str | None:
    """It runs everywhere."""
    return None


def why_not_call(x: Tensor, plan: KeyPlan, stride: Pair, padding: Pair, dilation: Pair) -> str | None:
    """It serves every call."""
    return None


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
    """See `mkf.kernels.key_conv2d`. Uses the keys themselves, whatever the plan's tolerance."""
    keep_if_captured(index, plan.keys)
    w = weight(plan, index, scale, shift).to(x.dtype)
    b = None if bias is None else bias.to(x.dtype)
    out.copy_(F.conv2d(x, w, b, stride, padding, dilation, groups=len(index)))


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
    """See `mkf.kernels.key_conv2d`. Scale and shift by way of the gradient of the filters."""
    keep_if_captured(index, plan.keys)
    if dx is not None:
        w = weight(plan, index, scale, shift).to(dy.dtype)
        dx.copy_(_convolution_backward(dy, dx, w, stride, padding, dilation, input_gradient=True))
    if d_scale is not None or d_shift is not None:
        assert x is not None
        dw = weight_gradient(dy, x, plan.keys.shape[-1], stride, padding, dilation)
        if d_scale is not None:
            d_scale.copy_((dw * plan.keys[index]).sum((1, 2)))
        if d_shift is not None:
            d_shift.copy_(dw.sum((1, 2)))
    if d_bias is not None:
        d_bias.copy_(dy.sum((0, 2, 3), dtype=d_bias.dtype))


def weight(plan: KeyPlan, index: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The filters scale * key + shift, (C, 1, k, k)."""
    return torch.addcmul(shift[:, None, None], scale[:, None, None], plan.keys[index])[:, None]


def weight_gradient(dy: Tensor, x: Tensor, k: int, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The gradient of the filters, (C, k, k) float32, or float64 where x is."""
    if x.is_cpu and x.dtype != torch.float64:
        x, dy = x.float(), dy.float()  # oneDNN's bfloat16 gradient reads unwritten memory for some small inputs
    w = x.new_empty(x.shape[1], 1, k, k)  # only its shape counts
    dw = _convolution_backward(dy, x, w, stride, padding, dilation, input_gradient=False)
    return dw[:, 0].to(torch.promote_types(dw.dtype, torch.float32))


def _convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, stride: Pair, padding: Pair, dilation: Pair, input_gradient: bool
) -> Tensor:
    """The gradient of the convolution's input, of which only the shape counts, or else of its filters."""
    dx: Tensor
    dw: Tensor
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, (0, 0), len(w), (input_gradient, not input_gradient, False)
    )
    return dx if input_gradient else dw
