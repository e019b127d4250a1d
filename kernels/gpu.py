"""Whether a GPU can run what is written for it, the reason why not, and whether it only records."""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from mkf.kernels import extension

OLDEST = (8, 0)  # compute capability


def why_not_cuda(device: torch.device) -> str | None:
    """CUDA C++ needs the compiled extension with its CUDA kernels, and an NVIDIA GPU they were compiled for."""
    if torch.version.hip:
        return "written for NVIDIA GPUs; on AMD there is triton"
    missing = extension.missing()
    if missing is not None:
        return missing
    if not extension.native().cuda:
        return "the C++ extension was built without nvcc"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _too_old(device) or _too_old_driver()


def why_not_triton(device: torch.device) -> str | None:
    """Triton must be installed, and the GPU an AMD one or an NVIDIA one that is not too old."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    return None if torch.version.hip else _too_old(device)


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on a tensor is being recorded in a CUDA graph, so that nothing may wait for the GPU."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def keep_if_captured(*tensors: Tensor) -> None:
    """Let tensors that a CUDA graph being captured reads, and that are not the caller's, live as long as the process.

    The graph may be replayed at any time. These are a few kB for each call.
    """
    if is_capturing(tensors[0]):
        _captured.append(tensors)


_captured: list[tuple[Tensor, ...]] = []


def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    return f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, this GPU has {capability[0]}.{capability[1]}"


@cache
def _too_old_driver() -> str | None:
    """The kernels have a CUDA runtime of their own, which may be newer than torch's."""
    driver, runtime = extension.native().cuda_versions()
    if driver // 1000 >= runtime // 1000:  # within one major version all serve all
        return None
    needed, served = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return f"built with CUDA {needed}, for which this driver, which serves CUDA {served}, is too old"
