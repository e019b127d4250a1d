"""The key convolution in CUDA C++ (csrc/key_conv2d/cuda.cu)."""

from typing import Any

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.gpu import why_not_cuda
from mkf.kernels.key_conv2d import KeyPlan, Pair, device_plan


def why_not(device: torch.device) -> str | None:
    """See `mkf.kernels.gpu`."""
    return why_not_cuda(device)


def why_not_call(x: Tensor, plan: KeyPlan, stride: Pair, padding: Pair, dilation: Pair) -> str | None:
    """See `mkf.kernels.key_conv2d.device_plan`."""
    return device_plan.why_not_call(x, plan, stride, padding, dilation)


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
    """See `mkf.kernels.key_conv2d`. Queues the work on the current stream of the device of x and returns."""
    with torch.cuda.device(x.device):
        extension.native().key_conv2d_cuda(
            shape=_shape(x, out, plan, stride),
            filters=_filters(plan, index, scale, shift),
            bias=_address(bias),
            x=x.data_ptr(),
            out=out.data_ptr(),
            **_where(),
        )


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
    """See `mkf.kernels.key_conv2d`. Two launches: the second adds up the sums of the first one's blocks in order."""
    shaped = dx if x is None else x
    if shaped is None:  # only a sum is asked for
        if d_bias is not None:
            d_bias.copy_(dy.sum((0, 2, 3), dtype=torch.float32))
        return
    with torch.cuda.device(dy.device):
        native, shape, where = extension.native(), _shape(shaped, dy, plan, stride), _where()
        sums = None
        if not (d_scale is None and d_shift is None and d_bias is None):
            parts = native.key_conv2d_cuda_parts(shape=shape, device=where["device"])
            sums = dy.new_empty(parts, 3, len(index), dtype=torch.float32)
        native.key_conv2d_backward_cuda(
            shape=shape,
            filters=_filters(plan, index, scale, shift),
            dy=dy.data_ptr(),
            x=0 if d_scale is None and d_shift is None else _address(x),
            dx=_address(dx),
            d_scale=_address(d_scale),
            d_shift=_address(d_shift),
            d_bias=_address(d_bias),
            partial_sums=_address(sums),
            **where,
        )


def _shape(x: Tensor, out: Tensor, plan: KeyPlan, stride: Pair) -> tuple[int, ...]:
    # A tensor of one channel, or of one row and column, has both layouts: what the other one has decides.
    channels_last = not (x.is_contiguous() and out.is_contiguous())
    return (extension.DTYPES[x.dtype], channels_last, *x.shape, plan.keys.shape[-1], stride[0])


def _filters(plan: KeyPlan, index: Tensor, scale: Tensor, shift: Tensor) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in (*device_plan.on_device(plan, index), index, scale, shift))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _where() -> dict[str, Any]:
    return {"device": torch.cuda.current_device(), "stream": torch.cuda.current_stream().cuda_stream}
