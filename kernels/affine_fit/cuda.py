"""The affine fit in CUDA C++ (csrc/affine_fit/cuda.cu)."""

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.affine_fit import FitKeys, problem

OLDEST = (8, 0)  # compute capability


def why_not(device: torch.device) -> str | None:
    """Needs the compiled extension with its CUDA kernels, and an NVIDIA GPU they were compiled for."""
    if torch.version.hip:
        return "written for NVIDIA GPUs; on AMD there is triton"
    missing = extension.missing()
    if missing is not None:
        return missing
    if not extension.native().cuda:
        return "the C++ extension was built without nvcc"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return (
            f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, this GPU has {capability[0]}.{capability[1]}"
        )
    return None


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
