"""The key convolution in Triton, for NVIDIA and AMD GPUs (triton_kernel.py)."""

from typing import Any

import torch
from torch import Tensor

from mkf.kernels.gpu import why_not_triton
from mkf.kernels.key_conv2d import KeyPlan, Pair, device_plan

TILES = {True: (8, 4, 32), False: (8, 32, 4)}  # rows, columns and channels of a program, in NHWC and in NCHW
WARPS = 4


def why_not(device: torch.device) -> str | None:
    """See `mkf.kernels.gpu`."""
    return why_not_triton(device)


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
        launch(x, None, out, None, plan, index, scale, shift, bias, stride[0], backward=False)


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
    """See `mkf.kernels.key_conv2d`. The kernel leaves sums of its tiles, which torch adds up in their order."""
    with torch.cuda.device(dy.device):
        launch_backward(dy, x, plan, index, scale, shift, stride[0], dx, d_scale, d_shift, d_bias)


def launch_backward(
    dy: Tensor,
    x: Tensor | None,
    plan: KeyPlan,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    dx: Tensor | None,
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """The same on the current device, or in Triton's interpreter."""
    shaped = dx if x is None else x
    if shaped is None:  # only a sum is asked for
        if d_bias is not None:
            d_bias.copy_(dy.sum((0, 2, 3), dtype=torch.float32))
        return
    wanted = d_scale, d_shift, d_bias
    sums = None
    if any(t is not None for t in wanted):
        sums = dy.new_zeros(_tiles(shaped, dy), 3, len(index), dtype=torch.float32)
    factor = None if d_scale is None and d_shift is None else x
    launch(dy, factor, dx, sums, plan, index, scale, shift, None, stride, backward=True, shaped=shaped)
    if sums is not None:
        for total, of in zip(sums.sum(0, dtype=torch.float64), wanted, strict=True):
            if of is not None:
                of.copy_(total)


def launch(
    x: Tensor,
    factor: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    plan: KeyPlan,
    index: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    stride: int,
    backward: bool,
    shaped: Tensor | None = None,
) -> None:
    """One launch; `shaped` is like `out`, also if none is asked for."""
    from mkf.kernels.key_conv2d import triton_kernel

    like = out if shaped is None else shaped
    assert like is not None
    records, keys = device_plan.on_device(plan, index)
    channels = -(-x.shape[1] // _tile(like, x)[2])
    triton_kernel.key_conv2d[(_tiles(like, x) * channels,)](
        x,
        x if factor is None else factor,
        x if out is None else out,
        x if sums is None else sums,
        records,
        keys,
        index,
        scale,
        shift,
        scale if bias is None else bias,
        x.shape[1],
        *x.shape[2:],
        *like.shape[2:],
        *x.stride(),
        *like.stride(),
        **constants(keys.shape[-1], stride, backward, bias is not None, out is not None, sums is not None,
                    factor is not None, _tile(like, x)),
        num_warps=WARPS,
    )  # fmt: skip


def constants(
    k: int,
    stride: int,
    backward: bool,
    has_bias: bool,
    wants_out: bool,
    wants_sums: bool,
    wants_factor: bool,
    tile: tuple[int, int, int],
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "k": k,
        "stride": stride,
        "backward": backward,
        "has_bias": has_bias,
        "wants_out": wants_out,
        "wants_sums": wants_sums,
        "wants_factor": wants_factor,
        "ROWS": tile[0],
        "COLUMNS": tile[1],
        "CHANNELS": tile[2],
    }


def _tile(x: Tensor, other: Tensor) -> tuple[int, int, int]:
    return TILES[not (x.is_contiguous() and other.is_contiguous())]


def _tiles(like: Tensor, other: Tensor) -> int:
    rows, columns, _ = _tile(like, other)
    n, _, h, w = like.shape
    return n * -(-h // rows) * -(-w // columns)
