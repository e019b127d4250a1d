"""The affine fit in C++ (csrc/affine_fit/cpu_kernel.hpp)."""

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.affine_fit import FitKeys

PER_THREAD = 1 << 17  # multiply-adds below which another thread costs more than it brings


def why_not(device: torch.device) -> str | None:
    """Needs the compiled extension."""
    return extension.missing()


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Uses as many threads as torch does."""
    native = extension.native()
    count, best = index.shape
    work = filters.numel() * (len(keys.unit) + 4)
    native.affine_fit_cpu(
        filters=filters.data_ptr(),
        dtype=extension.DTYPES[filters.dtype],
        count=count,
        stride=filters.stride(0),
        row_stride=filters.stride(1),
        col_stride=filters.stride(2),
        k=filters.shape[1],
        keys=keys.unit.data_ptr(),
        inverse_norms=keys.inverse_norm.data_ptr(),
        key_means=keys.mean.data_ptr(),
        keys_count=len(keys.unit),
        best=best,
        positive=positive,
        index=index.data_ptr(),
        scale=scale.data_ptr(),
        shift=shift.data_ptr(),
        residual=residual.data_ptr(),
        isa=getattr(native.Isa, extension.isa()),
        threads=max(1, min(torch.get_num_threads(), work // PER_THREAD)),
    )
