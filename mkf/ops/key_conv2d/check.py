"""What a key convolution refuses before anything is computed, and what follows from sizes and dtypes alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mkf.kernels.derived import Derived
from mkf.kernels.key_conv2d import Pair
from mkf.ops.arguments import INTEGERS, KERNEL_SIZES

MAX_KEYS = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_input(
    x: Tensor,
    keys: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> tuple[Pair, Pair, Pair]:
    """Refuse an input and keys that are none or do not go together; stride, padding and dilation as pairs.

    Raises:
        ValueError: Sizes, options and devices.
        TypeError: What is no tensor of floating-point numbers.
    """
    _check_tensor("x", x)
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a KeySet or a tensor, not {type(keys).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x is not a dense tensor but {'nested' if x.is_nested else x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: convert it to float32, bfloat16, float16 or float64")
    if x.ndim not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (N, C, H, W) or (C, H, W); only N may be 0")
    if keys.ndim != 3 or keys.shape[1] != keys.shape[2] or keys.shape[2] not in KERNEL_SIZES:
        raise ValueError(f"keys have shape {tuple(keys.shape)}: expected (K, k, k) with k one of {KERNEL_SIZES}")
    count, k = int(keys.shape[0]), int(keys.shape[2])
    if not 1 <= count <= MAX_KEYS:
        raise ValueError(f"there are {count} keys: expected 1 to {MAX_KEYS}")
    if keys.dtype not in DTYPES:
        raise TypeError(f"keys are {keys.dtype}: convert them to float32")
    if keys.device != x.device:
        raise ValueError(f"keys are on {keys.device}, x is on {x.device}: move them to one device")
    steps, zeros, spread = geometry(k, stride, padding, dilation)
    height, width = x.shape[-2:]
    if height + 2 * zeros[0] <= spread[0] * (k - 1) or width + 2 * zeros[1] <= spread[1] * (k - 1):
        raise ValueError(
            f"x of {height}x{width} is smaller than a {k}x{k} filter of dilation {spread} with padding {zeros}"
        )
    return steps, zeros, spread


def check_parameters(x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None) -> None:
    """Refuse parameters that do not go with x, all but their values.

    Raises:
        ValueError: Sizes and devices.
        TypeError: What is no tensor, and dtypes.
    """
    channels = x.shape[-3]
    parameters = {"index": index, "scale": scale, "shift": shift}
    if bias is not None:
        parameters["bias"] = bias
    for name, p in parameters.items():
        _check_tensor(name, p)
        check_channels(name, p, channels)
        if p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, x is on {x.device}: move them to one device")
        if name == "index":
            if p.dtype not in INTEGERS:
                raise TypeError(f"index is {p.dtype}: expected integers")
        elif p.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{name} is {p.dtype}, x is {x.dtype}: make {name} float32 or {x.dtype}")


def check_channels(name: str, p: Tensor, channels: int) -> None:
    """Refuse a parameter that has not one number for each channel.

    Raises:
        ValueError: It has another shape.
    """
    if p.ndim != 1 or p.shape[0] != channels:
        raise ValueError(f"{name} has shape {tuple(p.shape)}, but x has {channels} channels: expected ({channels},)")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, not {type(value).__name__}")


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


def checked_index(index: Tensor, count: int) -> Tensor:
    """The index as the implementations take it, int32 and contiguous, in memory that nobody else writes to.

    Raises:
        ValueError: It is out of range for `count` keys; it tells in which channels.
    """
    copy, low, high = _copy_and_range(index)
    if low < 0 or high >= count:
        raise ValueError(f"index is out of range [0, {count}) {_where((index < 0) | (index >= count))}")
    return copy


@Derived
def _copy_and_range(index: Tensor) -> tuple[Tensor, int, int]:
    copy = index.to(torch.int32, memory_format=torch.contiguous_format, copy=True)
    return copy, int(index.min()), int(index.max())  # on a GPU this waits, so that any stream may read the copy


def check_finite(**parameters: Tensor) -> None:
    """Refuse what is not finite, on the CPU.

    Raises:
        ValueError: There is such a parameter; it tells in which channels.
    """
    for name, p in parameters.items():
        if p.is_cpu and not p.isfinite().all():
            raise ValueError(f"{name} is not finite {_where(~p.isfinite())}")


def _where(bad: Tensor) -> str:
    channels = bad.nonzero().flatten().tolist()
    return f"in {len(channels)} of {len(bad)} channels, the first is channel {channels[0]}"
