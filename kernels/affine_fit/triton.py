"""The affine fit in Triton, for NVIDIA and AMD GPUs (triton_kernel.py)."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys

ROWS = 32  # filters in a block
WARPS = 8  # with fewer, 11x11 filters do not fit in the registers


def why_not(device: torch.device) -> str | None:
    """Needs Triton and a GPU that torch sees."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


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
