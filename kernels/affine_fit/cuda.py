"""The affine fit in CUDA C++ (csrc/affine_fit/cuda.cu)."""

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.affine_fit import FitKeys, problem
from mkf.kernels.gpu import why_not_cuda


def why_not(device: torch.device) -> str | None:
    """See `mkf.kernels.gpu`."""
    return why_not_cuda(device)


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Queues the work on the current stream of the filters' device and returns."""
    with torch.cuda.device(filters.device):
        extension.native().affine_fit_cuda(
            **problem(filters, keys, positive, index, scale, shift, residual),
            device=torch.cuda.current_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
