"""How alike two sets of filters are, how many dimensions a bank has, and which filters are there twice."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mkf.keys import KeySet
from mkf.ops import stream
from mkf.ops.arguments import filters_tensor
from mkf.ops.fit_statistics import refuse_mixed_sizes

DUPLICATE = 0.999
"""Filters whose |correlation| is at least this are near-duplicates: a scale and a shift make one of the other to
within a residual of .045. Our choice."""

_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Matching:
    """The best pairing of K keys with L others, of min(K, L) pairs, in the order of the first set.

    Attributes:
        first: Indices into the first set, int64.
        second: Indices into the second set, int64: `first[i]` goes with `second[i]`.
        cosine: Correlation of each pair, float64; negative where one is like the other with its sign turned.
        cosines: All correlations, float64 (K, L).
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float64]
    cosines: NDArray[np.float64]

    @property
    def similarity(self) -> float:
        """Mean |correlation| of the pairs, in [0, 1]: 1 for the same keys up to order, sign, scale and shift."""
        return float(np.abs(self.cosine).mean())


def match(first: KeySet | Any, second: KeySet | Any) -> Matching:
    """Pair the keys of two sets, each with at most one of the other, so that the sum of |correlation| is largest.

    The correlation of two keys is the cosine of their centred versions, so sign, scale and shift do not count, as in a
    fit. The pairing is the optimal assignment (Hungarian method), not a greedy one.

    Args:
        first: A `KeySet`, or (K, k, k) filters.
        second: A `KeySet`, or (L, k, k) filters of the same size.

    Raises:
        ValueError: Other shapes, different sizes, or a constant or not finite key.
    """
    from scipy.optimize import linear_sum_assignment

    units = []
    for filters in (first, second):
        f = filters_tensor(filters.filters if isinstance(filters, KeySet) else filters)
        unit, live = unit_filters(f)
        if not len(f) or not live.all():
            raise ValueError("keys to match must be at least one, finite, and not constant")
        units.append(unit.numpy(force=True))
    if units[0].shape[1] != units[1].shape[1]:
        sizes = " and ".join(f"{k}x{k}" for k in (int(unit.shape[1] ** 0.5) for unit in units))
        raise ValueError(f"keys of {sizes} cannot be matched: they must be of one size")
    cosines = np.clip(units[0] @ units[1].T, -1, 1)
    rows, columns = linear_sum_assignment(-np.abs(cosines))
    return Matching(rows, columns, cosines[rows, columns], cosines)


def effective_dimension(filters: Any) -> float:
    """The number of dimensions a bank spreads over: the participation ratio of its filters' second moments.

    With x the live filters, each centred and scaled to norm 1, and l_i the eigenvalues of C = sum(x x^T),

        dimension = (sum l_i)^2 / sum l_i^2,

    1 if all are linear shifts of one key, up to k^2 - 1 for white noise. The mean filter is not subtracted: the sign of
    a filter is arbitrary, and C does not change with it.

    Args:
        filters: As `affine_fit` takes them; a bank is read in pieces.

    Returns:
        The dimension; NaN where no filter is live.

    Raises:
        ValueError: Shapes that are no filters, an empty bank or one of several kernel sizes.
        TypeError: A dtype that is no floating-point number.
    """
    refuse_mixed_sizes(filters)
    source = filters if hasattr(filters, "batches") else filters_tensor(filters)
    moment: Any = 0
    with closing(stream.pieces(source)) as pieces:
        for piece in pieces:
            unit = unit_filters(filters_tensor(piece))[0]
            moment = moment + (unit.T @ unit).numpy(force=True)
    return participation(moment)


def participation(moment: NDArray[np.float64]) -> float:
    """(sum of the eigenvalues)^2 / sum of their squares, of a symmetric matrix; NaN of zero."""
    squares = np.square(moment).sum()
    return float(np.trace(moment) ** 2 / squares) if squares else float("nan")


def duplicates(filters: Any, cosine: float = DUPLICATE) -> NDArray[np.int64]:
    """For each filter the first one that it is a near-copy of, up to sign, scale and shift.

    Args:
        filters: (N, k, k), as `affine_fit` takes them; compared with one another in N^2 k^2 / 2 multiplications, so
            best a layer at a time.
        cosine: The least |correlation| of near-duplicates.

    Returns:
        (N,) int64: the lowest index of an earlier live filter with at least that |correlation|, -1 where there is none
        and for filters that are constant or not finite.

    Raises:
        ValueError: `cosine` is not in (0, 1].
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"cosine={cosine}: near-duplicates have a |correlation| above 0 and at most 1")
    unit, _ = unit_filters(filters_tensor(filters))
    unit = unit.float()
    earlier = torch.full((len(unit),), -1, dtype=torch.int64, device=unit.device)
    for start in range(0, len(unit), _ROWS):
        block = unit[start : start + _ROWS]
        alike = (block @ unit[: start + len(block)].T).abs() >= cosine - 1e-6  # float32 products
        alike = alike.tril(start - 1)
        found = alike.any(1).nonzero().flatten()
        earlier[start + found] = alike[found].int().argmax(1)
    return earlier.numpy(force=True)


def unit_filters(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Filters (N, k, k) centred and of norm 1, (N, k * k) float64, zero for the others; and which live, (N,)."""
    flat = scaled(filters.detach())[0].flatten(1).double()
    live = flat.isfinite().all(1) & (flat.amin(1) < flat.amax(1))
    flat = torch.where(live[:, None], flat, 0)
    flat = flat - flat.mean(1, keepdim=True)
    norm = flat.norm(dim=1, keepdim=True)
    return flat / torch.where(live[:, None], norm, 1), live


def scaled(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Filters (N, k, k) brought to a largest magnitude in [1, 2), so that no square leaves float64's range.

    Returns:
        The filters divided by powers of two, which rounds nothing, in their own dtype; and those powers, (N,) float64,
        1 for a filter of zeros and for one that is not finite.
    """
    f = filters.double()
    largest = f.abs().amax((1, 2))
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 1)
    size = largest / (2 * torch.frexp(largest).mantissa)
    return (f / size[:, None, None]).to(filters.dtype), size
