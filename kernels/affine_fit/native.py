"""The affine fit in C++ (csrc/affine_fit/cpu_kernel.hpp)."""

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.affine_fit import FitKeys, problem

PER_THREAD = 1 << 17  # multiply-adds below which another thread costs more than it brings


def why_not(device: torch.device) -> str | None:
    """Needs the compiled extension."""
    return extension.missing()


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Uses as many threads as torch does, in a forked process one."""
    work = filters.numel() * (len(keys.unit) + 4)
    extension.native().affine_fit_cpu(
        **problem(filters, keys, positive, index, scale, shift, residual),
        threads=max(1, min(extension.num_threads(), work // PER_THREAD)),
    )
