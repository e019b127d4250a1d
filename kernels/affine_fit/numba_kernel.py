"""The numba kernel of the affine fit: apart from `numba.py`, because it needs numba as soon as it is imported.

A block of `LANES` filters is transposed into a tile (taps, LANES), so that the inner loops run over lanes, one filter
each, and LLVM makes vector instructions of them. A product and a sum may become one fused instruction, and nothing is
reordered: a filter's result is the same in every lane.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# Filters in a block: many, because each loop over lanes has a cost of its own; nine cache lines of them, an odd number,
# so that the taps of one filter spread over all sets of the first cache.
LANES = 144
KEYS_AT_ONCE = 4  # a tap is read once for so many keys
RECOMPUTE_ABOVE = np.float32(0.95)  # of corr^2: beyond it norm^2 - scale^2 has lost too many digits
LEFT = -2  # index of a filter so small or large that float32 squares would not do

# Without numpy's error model every division would be a branch, and a loop with branches stays scalar.
OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy"}
jit = numba.njit(**OPTIONS)


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for many threads, once for all processes where there is a folder to write to, else once in each."""
    try:
        return numba.njit(function, parallel=True, nogil=True, cache=True, **OPTIONS)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(function, parallel=True, nogil=True, **OPTIONS)  # type: ignore[no-any-return]


@_kept
def affine_fit(
    rows: Floats,
    positive: bool,
    unit: Floats,
    inverse_norm: Floats,
    key_mean: Floats,
    index: Ints,
    scale: Floats,
    shift: Floats,
    residual: Floats,
) -> int:
    """Fit `rows`, (N, taps) float32 or float64; keys and outputs as in `mkf.kernels.affine_fit`.

    `unit` is padded with zeros to a multiple of `KEYS_AT_ONCE`; `key_mean` tells how many keys there are. Returns how
    many filters were left to somebody else, with index `LEFT`.
    """
    count, taps = rows.shape
    left = 0
    for block in numba.prange((count + LANES - 1) // LANES):
        first = block * LANES
        tile = np.empty((taps, LANES), np.float32)
        dot = np.empty((len(unit), LANES), np.float32)
        mean, rest, squares = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        score, a, error = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        winner = np.empty(LANES, np.int32)
        load(rows, first, tile)
        centre(tile, mean, rest, squares)
        multiply(tile, unit, dot)
        for b in range(index.shape[1]):
            choose(dot, len(key_mean), positive, score, a, winner)
            explain(tile, rest, squares, unit, winner, a, error)
            for lane in range(min(LANES, count - first)):
                i, j = first + lane, winner[lane]
                dot[j, lane] = np.nan  # taken: NaN never wins
                slope = a[lane] * inverse_norm[j]
                index[i, b] = j
                scale[i, b] = slope
                shift[i, b] = rows[i, 0] + (mean[lane] + rest[lane] - slope * key_mean[j])
                residual[i, b] = np.sqrt(error[lane] / squares[lane])
        for lane in range(min(LANES, count - first)):
            if not (np.float32(1e-28) < squares[lane] < np.float32(1e30)):
                i = first + lane
                left += fit_special(rows[i], index[i], scale[i], shift[i], residual[i])
    return left


@jit
def load(rows: Floats, first: int, tile: Floats) -> None:
    """tile[t, lane] = rows[first + lane, t] - rows[first + lane, 0]; past the last filter comes the last once more.

    With the first tap a common offset leaves, and at no loss: the difference is rounded to the digits of the spread.
    """
    for lane in range(LANES):
        row = rows[min(first + lane, len(rows) - 1)]
        for t in range(len(row)):
            tile[t, lane] = row[t] - row[0]


@jit
def centre(tile: Floats, mean: Floats, rest: Floats, squares: Floats) -> None:
    """Take the mean out of the tile; `rest` is what its rounding left behind, too little to show in the `squares`."""
    inverse_taps = np.float32(1 / len(tile))
    for lane in range(LANES):
        mean[lane] = rest[lane] = squares[lane] = 0
    for t in range(len(tile)):
        for lane in range(LANES):
            mean[lane] += tile[t, lane] * inverse_taps
    for t in range(len(tile)):
        for lane in range(LANES):
            x = tile[t, lane] - mean[lane]
            tile[t, lane] = x
            rest[lane] += x * inverse_taps
            squares[lane] += x * x


@jit
def multiply(tile: Floats, unit: Floats, dot: Floats) -> None:
    """dot[j, lane] = sum over taps of unit[j, t] * tile[t, lane]."""
    last = len(tile) - 1  # the taps are an odd square: groups of four, and one
    for j in range(0, len(unit), KEYS_AT_ONCE):
        for lane in range(LANES):
            x = tile[last, lane]
            dot[j, lane] = unit[j, last] * x
            dot[j + 1, lane] = unit[j + 1, last] * x
            dot[j + 2, lane] = unit[j + 2, last] * x
            dot[j + 3, lane] = unit[j + 3, last] * x
        for t in range(0, last, 4):
            p, q, r, s = four(unit, j, t), four(unit, j + 1, t), four(unit, j + 2, t), four(unit, j + 3, t)
            for lane in range(LANES):
                y = tile[t, lane], tile[t + 1, lane], tile[t + 2, lane], tile[t + 3, lane]
                dot[j, lane] += product(p, y)
                dot[j + 1, lane] += product(q, y)
                dot[j + 2, lane] += product(r, y)
                dot[j + 3, lane] += product(s, y)


Four = tuple[np.float32, np.float32, np.float32, np.float32]


@jit
def four(unit: Floats, j: int, t: int) -> Four:
    """Neighbouring taps of key j."""
    return unit[j, t], unit[j, t + 1], unit[j, t + 2], unit[j, t + 3]


@jit
def product(x: Four, y: Four) -> np.float32:
    """The dot product of four numbers with four."""
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]


@jit
def choose(dot: Floats, keys: int, positive: bool, score: Floats, a: Floats, winner: Ints) -> None:
    """The key of the highest score, the lowest index among equals, and `a`, its dot product."""
    for lane in range(LANES):
        score[lane] = -np.inf
        winner[lane] = 0
    for j in range(keys):
        for lane in range(LANES):
            d = dot[j, lane]
            s = d if positive else abs(d)
            better = s > score[lane]
            score[lane] = s if better else score[lane]
            a[lane] = d if better else a[lane]
            winner[lane] = np.int32(j) if better else winner[lane]
    if positive:
        for lane in range(LANES):
            a[lane] = max(a[lane], np.float32(0))


@jit
def explain(tile: Floats, rest: Floats, squares: Floats, unit: Floats, winner: Ints, a: Floats, error: Floats) -> None:
    """error[lane] = sum over taps of (filter - a * key)^2, from the differences themselves where the key is close."""
    for lane in range(LANES):
        error[lane] = max(squares[lane] - a[lane] * a[lane], np.float32(0))
    for lane in range(LANES):
        if a[lane] * a[lane] > squares[lane] * RECOMPUTE_ABOVE:
            error[lane] = 0
            for t in range(len(tile)):
                e = tile[t, lane] - rest[lane] - a[lane] * unit[winner[lane], t]
                error[lane] += e * e


@jit
def fit_special(row: Floats, index: Ints, scale: Floats, shift: Floats, residual: Floats) -> int:
    """Write the fit of a filter that is constant or not finite and return 0, or leave any other and return 1."""
    finite = constant = True
    for x in row:
        finite &= np.isfinite(x)
        constant &= x == row[0]
    if finite and not constant:
        index[0] = LEFT
        return 1
    for b in range(len(index)):
        index[b] = b if finite else -1
        scale[b] = residual[b] = 0 if finite else np.nan
        shift[b] = row[0] if finite else np.nan
    return 0
