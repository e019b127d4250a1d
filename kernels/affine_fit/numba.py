"""The affine fit with numba, for a CPU without the compiled extension."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys


def why_not(device: torch.device) -> str | None:
    """Needs numba."""
    return None if importlib.util.find_spec("numba") else "numba is not installed (pip install numba)"


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. The first call compiles, which takes a few seconds."""
    if filters.dtype in (torch.bfloat16, torch.float16):  # numba has neither
        filters = filters.float()
    rows = filters.flatten(1).contiguous().numpy()
    arrays = (x.numpy() for x in (keys.unit, keys.inverse_norm, keys.mean, index, scale, shift, residual))
    _compiled(torch.get_num_threads())(rows, positive, *arrays)


@cache
def _compiled(threads: int) -> Callable[..., None]:
    import numba

    def fit(rows: Any, positive: Any, unit: Any, inverse_norm: Any, key_mean: Any, index: Any, scale: Any, shift: Any,
            residual: Any) -> None:  # fmt: skip
        taps = rows.shape[1]
        best = index.shape[1]
        for i in numba.prange(len(rows)):
            x = np.empty(taps, np.float64)
            low, high, total = np.inf, -np.inf, 0.0
            finite = True
            for t in range(taps):
                value = np.float64(rows[i, t])
                x[t] = value
                finite = finite and np.isfinite(value)
                low, high = min(low, value), max(high, value)
                total += value
            if not finite or low == high:
                for b in range(best):
                    index[i, b] = b if finite else -1
                    scale[i, b] = residual[i, b] = 0.0 if finite else np.nan
                    shift[i, b] = low if finite else np.nan
                continue
            mean = total / taps
            reach = max(high - mean, mean - low)  # keeps the squares in range
            squares = 0.0
            for t in range(taps):
                x[t] = (x[t] - mean) / reach
                squares += x[t] * x[t]
            dot = np.empty(len(unit), np.float64)
            score = np.empty(len(unit), np.float64)
            for j in range(len(unit)):
                total = 0.0
                for t in range(taps):
                    total += x[t] * unit[j, t]
                dot[j] = total
                score[j] = total if positive else abs(total)
            for b in range(best):
                top = np.argmax(score)
                score[top] = -np.inf
                a = max(dot[top], 0.0) if positive else dot[top]
                error = 0.0
                for t in range(taps):
                    error += (x[t] - a * unit[top, t]) ** 2
                index[i, b] = top
                scale[i, b] = a * reach * inverse_norm[top]
                shift[i, b] = mean - a * reach * inverse_norm[top] * key_mean[top]
                residual[i, b] = min(1.0, np.sqrt(error / squares))

    compiled = numba.njit(parallel=True, fastmath={"reassoc", "contract"}, nogil=True, cache=True)(fit)

    process = os.getpid()

    def run(*args: Any) -> None:
        if os.getpid() != process:  # GNU OpenMP would end the process without a word of Python
            raise RuntimeError(
                "numba's threads do not survive a fork: start workers with the method 'spawn', or fit with "
                "backend='reference'"
            )
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        compiled(*args)

    return run
