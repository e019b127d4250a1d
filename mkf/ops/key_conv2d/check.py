"""What a key convolution refuses before anything is computed, and what follows from sizes and dtypes alone."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mkf.kernels.derived import Derived

KERNEL_SIZES = (3, 5, 7, 9, 11)
MAX_KEYS = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

Pair = tuple[int, int]

Described = tuple[Sequence[int], torch.dtype, torch.device]
"""A tensor as far as its values do not matter."""


class Checked(NamedTuple):
    """What `check` makes of the arguments.

    Attributes:
        stride: Vertical, horizontal.
        padding: Rows and columns of zeros on every side.
        dilation: Vertical, horizontal.
        dtype: Of the parameters in the computation.
        ready: Whether they have that dtype, the index is int32, and x has four dimensions.
        size: Of the output, (N, C, H, W).
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    dtype: torch.dtype
    ready: bool
    size: tuple[int, ...]


def check(
    x: Described,
    keys: Described,
    index: Described,
    scale: Described,
    shift: Described,
    bias: Described | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> Checked:
    """Refuse sizes, dtypes and devices that do not go together.

    Raises:
        ValueError: Sizes and devices.
        TypeError: Dtypes.
    """
    shape, dtype, device = x
    if dtype not in DTYPES:
        raise TypeError(f"x is {dtype}: convert it to float32, bfloat16, float16 or float64")
    if len(shape) not in (3, 4) or 0 in shape[-3:]:
        raise ValueError(f"x has shape {tuple(shape)}: expected (N, C, H, W) or (C, H, W); only N may be 0")
    channels, height, width = shape[-3:]

    keys_shape, keys_dtype, keys_device = keys
    if len(keys_shape) != 3 or keys_shape[1] != keys_shape[2] or keys_shape[2] not in KERNEL_SIZES:
        raise ValueError(f"keys have shape {tuple(keys_shape)}: expected (K, k, k) with k one of {KERNEL_SIZES}")
    count, k = int(keys_shape[0]), int(keys_shape[2])
    if not 1 <= count <= MAX_KEYS:
        raise ValueError(f"there are {count} keys: expected 1 to {MAX_KEYS}")
    if keys_dtype not in DTYPES:
        raise TypeError(f"keys are {keys_dtype}: convert them to float32")
    if keys_device != device:
        raise ValueError(f"keys are on {keys_device}, x is on {device}: move them to one device")

    for name, described in (("index", index), ("scale", scale), ("shift", shift), ("bias", bias)):
        if described is None:
            continue
        its_shape, its_dtype, its_device = described
        if len(its_shape) != 1 or its_shape[0] != channels:
            raise ValueError(
                f"{name} has shape {tuple(its_shape)}, but x has {channels} channels: expected ({channels},)"
            )
        if its_device != device:
            raise ValueError(f"{name} is on {its_device}, x is on {device}: move them to one device")
        if name == "index":
            if its_dtype not in INTEGERS:
                raise TypeError(f"index is {its_dtype}: expected integers")
        elif its_dtype not in (torch.float32, dtype):
            raise TypeError(f"{name} is {its_dtype}, x is {dtype}: make {name} float32 or {dtype}")

    steps, zeros, spread = geometry(k, stride, padding, dilation)
    if height + 2 * zeros[0] <= spread[0] * (k - 1) or width + 2 * zeros[1] <= spread[1] * (k - 1):
        raise ValueError(
            f"x of {height}x{width} is smaller than a {k}x{k} filter of dilation {spread} with padding {zeros}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same = index[1] == torch.int32 and all(t is None or t[1] == wide for t in (keys, scale, shift, bias))
    size = output_size(shape if len(shape) == 4 else (1, *shape), k, steps, zeros, spread)
    return Checked(steps, zeros, spread, wide, same and len(shape) == 4, size)


check_once = lru_cache(4096)(check)
"""The same where it was asked before, as it nearly always was for a layer."""


def geometry(
    k: int, stride: int | Sequence[int], padding: int | Sequence[int] | str, dilation: int | Sequence[int]
) -> tuple[Pair, Pair, Pair]:
    """Stride, rows and columns of zeros on every side, and dilation, each vertical and horizontal.

    Raises:
        ValueError: Numbers that are none, or words other than "same" (which needs stride 1) and "valid".
    """
    steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if padding == "valid":
        return steps, (0, 0), spread
    if padding == "same":
        if steps != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, not {stride}: give the padding as numbers")
        return steps, (spread[0] * (k - 1) // 2, spread[1] * (k - 1) // 2), spread
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r}: use numbers, 'same' or 'valid'")
    return steps, _pair("padding", padding, 0), spread


def _pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more, or two of them")
    return pair


def output_size(size: Sequence[int], k: int, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, ...]:
    """(N, C, H, W) of the output for that of the input."""
    n, c, h, w = size
    h = (h + 2 * padding[0] - dilation[0] * (k - 1) - 1) // stride[0] + 1
    w = (w + 2 * padding[1] - dilation[1] * (k - 1) - 1) // stride[1] + 1
    return n, c, h, w


def check_values(keys: Tensor, index: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Refuse an index out of range, and on the CPU a scale and a shift that are not finite.

    Raises:
        ValueError: There is one; it tells in which channels.
    """
    low, high = _range(index)
    count = keys.shape[0]
    if low < 0 or high >= count:
        raise ValueError(f"index is out of range [0, {count}) {_where((index < 0) | (index >= count))}")
    # The sum is not finite where anything in it is not; or where it overflows, so look closer then.
    if scale.is_cpu and not math.isfinite(scale.dot(shift).item()):
        for name, p in (("scale", scale), ("shift", shift)):
            if not p.isfinite().all():
                raise ValueError(f"{name} is not finite {_where(~p.isfinite())}")


_range = Derived(lambda index: (int(index.min()), int(index.max())))


def _where(bad: Tensor) -> str:
    channels = bad.nonzero().flatten().tolist()
    return f"in {len(channels)} of {len(bad)} channels, the first is channel {channels[0]}"
