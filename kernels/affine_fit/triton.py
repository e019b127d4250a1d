"""The affine fit in Triton, for NVIDIA and AMD GPUs (triton_kernel.py)."""

from typing import Any

import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys
from mkf.kernels.gpu import why_not_triton

ROWS = 32  # filters in a block
WARPS = 8  # with fewer, 11x11 filters do not fit in the registers


def why_not(device: torch.device) -> str | None:
    """See `mkf.kernels.gpu`."""
    return why_not_triton(device)


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Queues the work on the current stream of the filters' device and returns."""
    with torch.cuda.device(filters.device):
        launch(filters, keys, positive, index, scale, shift, residual)


def launch(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """The same on the current device, or in Triton's interpreter."""
    import triton

    from mkf.kernels.affine_fit import triton_kernel

    count, best = index.shape
    k = filters.shape[1]
    triton_kernel.affine_fit[(triton.cdiv(count, ROWS),)](
        filters,
        keys.unit,
        keys.inverse_norm,
        keys.mean,
        index,
        scale,
        shift,
        residual,
        count,
        *filters.stride(),
        len(keys.unit),
        best,
        **constants(k, positive),
        num_warps=WARPS,
    )


def constants(k: int, positive: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {"k": k, "positive": positive, "ROWS": ROWS, "TAPS": 1 << (k * k - 1).bit_length()}
