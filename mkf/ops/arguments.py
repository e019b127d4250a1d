"""What the fits take: filters, keys and tensors to write into, checked before any kernel runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mkf.kernels.extension import DTYPES
from mkf.kernels.gpu import is_capturing

KERNEL_SIZES = (3, 5, 7, 9, 11)
MAX_KEYS = 256
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class CentredKeys(NamedTuple):
    """Keys without their means.

    Attributes:
        unit: (K, k*k) float64, contiguous, centred and divided by their norms.
        norm: (K,) float64, norms of the centred keys.
        mean: (K,) float64.
    """

    unit: Tensor
    norm: Tensor
    mean: Tensor


def filters_tensor(filters: Any) -> Tensor:
    """Filters as a tensor (N, k, k) of a dtype that the kernels read."""
    f = _tensor(filters, "filters")
    if f.ndim == 2 and f.shape[1] in [k * k for k in KERNEL_SIZES]:
        k = KERNEL_SIZES[[k * k for k in KERNEL_SIZES].index(f.shape[1])]
        f = f.unflatten(1, (k, k))
    if f.ndim != 3 or f.shape[1] != f.shape[2] or f.shape[1] not in KERNEL_SIZES:
        hint = " (squeeze the weight of a Conv2d: weight[:, 0])" if f.ndim == 4 else ""
        raise ValueError(
            f"filters have shape {tuple(f.shape)}: expected (N, k, k) or (N, k*k) with k one of {KERNEL_SIZES}{hint}"
        )
    if len(f) == 0 and hasattr(filters, "filters"):
        raise ValueError("there are no filters to fit: the bank is empty")
    return f


def keys_tensor(keys: Any, filters: Tensor) -> Tensor:
    """Keys as a tensor (K, k, k) of the filters' size and on their device."""
    if isinstance(keys, str):
        raise TypeError(f"keys={keys!r}: give a KeySet, which mkf.keys.parse makes of such a word, or a tensor")
    q = _tensor(keys, "keys")
    if q.ndim != 3 or q.shape[1] != q.shape[2] or not 1 <= len(q) <= MAX_KEYS:
        raise ValueError(f"keys have shape {tuple(q.shape)}: expected (K, k, k) with 1 <= K <= {MAX_KEYS}")
    if q.shape[1:] != filters.shape[1:]:
        k, own = filters.shape[1], q.shape[1]
        raise ValueError(
            f"filters are {k}x{k} but keys are {own}x{own}: use keys of {k}x{k}, or select(k={own}) filters"
        )
    return q.to(filters.device)


def centred_keys(keys: Tensor) -> CentredKeys:
    """Centre and normalise keys in float64, refusing those that cannot be."""
    q = keys.detach().flatten(1).double().contiguous()  # without a copy, flatten keeps the strides of a permuted tensor
    mean = q.mean(1)
    centred = q - mean[:, None]
    norm = centred.norm(dim=1)
    # Below float32's rounding of a constant; the comparison is also false for NaN and for zero.
    usable = (norm > 1e-7 * q.norm(dim=1)) & norm.isfinite()
    if not is_capturing(q) and not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise ValueError(f"keys {bad} are constant or not finite, so no filter can be a scaled copy of them")
    return CentredKeys(centred / norm[:, None], norm, mean)


def output_tensors(
    out: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The tensors that share memory with what a caller gave as `out=`.

    Args:
        out: A tensor or numpy array by the output's name.
        shapes: What shape each must have. `index` is int32, all others are float32.
        inputs: What will be read; the first has the outputs' device.

    Raises:
        TypeError: No tensor or array, or one of another dtype.
        ValueError: Another shape or device, not contiguous, or an array that is read-only.
        RuntimeError: Gradients are asked for, as torch's own functions raise with `out=`.
    """
    tensors = {}
    for name, given in out.items():
        dtype = torch.int32 if name == "index" else torch.float32
        x = tensors[name] = _writable(given, f"out.{name}")
        if x.dtype != dtype:
            raise TypeError(f"out.{name} is {x.dtype}: make it {dtype}")
        if x.shape != shapes[name]:
            raise ValueError(f"out.{name} has shape {tuple(x.shape)}: this fit writes {shapes[name]}")
        if x.device != inputs[0].device:
            raise ValueError(f"out.{name} is on {x.device}, but the filters are on {inputs[0].device}")
        if x.layout != torch.strided or not x.is_contiguous():
            raise ValueError(f"out.{name} is not contiguous: write into memory that is, and copy from it")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *tensors.values())):
        raise RuntimeError(
            "a fit with out= has no gradients, but one of its arguments requires them: call it under "
            "torch.no_grad(), or without out="
        )
    return tensors


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise NotImplementedError where derivatives are wanted that a fit would leave out, or torch refuse obscurely."""
    if torch.compiler.is_compiling():
        return
    forward_ad = torch.autograd.forward_ad
    if any(torch._C._functorch.is_gradtrackingtensor(x) for x in tensors) or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    ):
        raise NotImplementedError(
            "a fit has no derivatives in forward mode or by torch.func: use backward() or torch.autograd.grad"
        )


def refuse_overlap(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError where an output may share memory with an input or with another output."""
    taken = [(name, *_memory(x)) for name, x in inputs.items()]
    for name, x in outputs.items():
        start, stop = _memory(x)
        for other, other_start, other_stop in taken:
            if start < other_stop and other_start < stop:
                raise ValueError(f"out.{name} shares memory with {other}: give it memory of its own")
        taken.append((f"out.{name}", start, stop))


def _tensor(x: Any, what: str) -> Tensor:
    """A floating-point tensor of an array, or of an object that holds its filters as `.filters`."""
    x = getattr(x, "filters", x)
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative or any(s % x.itemsize or s < 0 for s in x.strides):
            x = x.astype(x.dtype.newbyteorder("="), order="C")
        if x.dtype.kind != "f" or x.dtype.itemsize > 8:
            raise TypeError(f"{what} are {x.dtype}: convert them to float32, float64 or float16")
        x = torch.from_numpy(x if x.flags.writeable else np.asarray(_ReadOnly(x)))
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: expected a tensor or a numpy array, not {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{what} are not a dense tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{what} are {x.dtype}: convert them to float32, float64, bfloat16 or float16")
    return x


class _ReadOnly:
    """The memory of a read-only array as one that torch shares without a warning; what is fitted is never written to.

    A copy would be as large as the filters, and the warning comes once a process: silenced here, it would be missing
    where a user writes to such memory himself.
    """

    def __init__(self, x: np.ndarray[Any, Any]):
        self._kept = x
        self.__array_interface__ = x.__array_interface__ | {"data": (x.ctypes.data, False)}


def _writable(x: Any, what: str) -> Tensor:
    if isinstance(x, np.ndarray):
        if not x.flags.writeable:
            raise ValueError(f"{what} is read-only")
        if not x.dtype.isnative or any(s % x.itemsize or s < 0 for s in x.strides):
            raise ValueError(f"{what} is an array that torch cannot share memory with: make it with numpy.empty")
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: expected a tensor or a numpy array, not {type(x).__name__}")
    return x


def _memory(x: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's numbers lie."""
    if x.numel() == 0:
        return 0, 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + span * x.element_size()
