"""The affine fit in CUDA C++ (csrc/affine_fit/cuda.cu)."""

import torch
from torch import Tensor

from mkf.kernels import extension
from mkf.kernels.affine_fit import FitKeys

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
    count, best = index.shape
    with torch.cuda.device(filters.device):
        extension.native().affine_fit_cuda(
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
            device=torch.cuda.current_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
