"""What a key is made of: a few separable terms and single taps, found numerically."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# A description is exact where it misses the key by no more than this part of the key's norm. A key that was computed
# as a sum of outer products in float32 and scaled is off by one or two float32 epsilons.
EXACT = 4 * float(np.finfo(np.float32).eps)


class Tap(NamedTuple):
    """One entry of a key, added to what its separable terms give; row and column count from 0 at the top left."""

    row: int
    column: int
    weight: float


@dataclass(frozen=True, eq=False)
class Structure:
    """A k x k key as a sum of separable terms and single taps.

        key[r, c] ~ sum over t of columns[r, t] * rows[t, c] + sum over taps at (r, c) of weight

    A separable term is two one-dimensional filters of k taps in place of one of k * k, a single tap is one
    multiplication: that is what makes a key of low rank cheap to convolve with.

    Attributes:
        columns: The vertical factor of each term, (k, rank) float64.
        rows: The horizontal factor of each term, (rank, k) float64.
        taps: The single taps; `find` looks for at most one.
        residual: L2 norm of the key minus this sum, relative to the norm of the centred key, which is 1.
    """

    columns: torch.Tensor
    rows: torch.Tensor
    taps: tuple[Tap, ...]
    residual: float

    @property
    def rank(self) -> int:
        """The number of separable terms; k where the key has no structure."""
        return self.rows.shape[0]

    @property
    def multiplications(self) -> int:
        """Multiplications per output pixel: 2 k for each term, or k * k where that is fewer, and 1 for each tap."""
        return _multiplications(self.rows.shape[1], self.rank) + len(self.taps)

    def dense(self) -> torch.Tensor:
        """The sum written out, (k, k) float64."""
        key = self.columns @ self.rows
        for row, column, weight in self.taps:
            key[row, column] += weight
        return key

    def __repr__(self) -> str:
        taps = ", ".join(f"{weight:.4g} at ({row}, {column})" for row, column, weight in self.taps)
        return f"Structure(rank={self.rank}, taps=[{taps}], residual={self.residual:.1e})"


def find(key: NDArray[np.float64]) -> Structure:
    """The cheapest exact description of one (k, k) key, in multiplications per pixel; no tap where that is no gain.

    A matrix A of rank r can only get the rank r - 1 by subtracting a tap at (i, j) if the tap's weight is
    1 / A+[j, i], with A+ the pseudoinverse (Wedderburn's rank reduction); so each position has one weight to try.
    """
    k = len(key)
    exact = EXACT * float(np.linalg.norm(key))
    u, sigma, vt = np.linalg.svd(key)
    rank = int(np.sum(_tails(sigma) > exact))
    if _multiplications(k, rank - 1) + 1 < _multiplications(k, rank):
        inverse = (u[:, :rank] / sigma[:rank]) @ vt[:rank]  # A+ transposed
        possible = np.abs(inverse) > EXACT * np.abs(inverse).max()
        weights = np.divide(1, inverse, out=np.zeros_like(inverse), where=possible)
        # remaining[i, j] is the key without the tap at (i, j)
        remaining = key - weights[:, :, None, None] * np.eye(k * k).reshape(k, k, k, k)
        missed = _tails(np.linalg.svd(remaining, compute_uv=False))[..., rank - 1]
        row, column = map(int, np.unravel_index(np.argmin(missed), missed.shape))
        if missed[row, column] <= exact:
            return _describe(remaining[row, column], rank - 1, (Tap(row, column, float(weights[row, column])),))
    return _describe(key, rank, ())


def rank_residuals(keys: NDArray[np.float64]) -> NDArray[np.float64]:
    """The norm of what is left of each of (K, k, k) keys after its best approximation of rank 1 to k, (K, k)."""
    tails = _tails(np.linalg.svd(keys, compute_uv=False))
    return np.concatenate([tails[:, 1:], np.zeros((len(keys), 1))], axis=1)


def _describe(remaining: NDArray[np.float64], rank: int, taps: tuple[Tap, ...]) -> Structure:
    """The key that is `remaining` plus the taps, with `remaining` cut to its `rank` largest separable terms."""
    u, sigma, vt = np.linalg.svd(remaining)
    split = np.sqrt(sigma[:rank])  # shared evenly, so that both factors have the same size
    columns, rows = u[:, :rank] * split, split[:, None] * vt[:rank]
    residual = float(np.linalg.norm(remaining - columns @ rows))
    return Structure(torch.from_numpy(columns), torch.from_numpy(rows), taps, residual)


def _tails(sigma: NDArray[np.floating]) -> NDArray[np.float64]:
    """Entry r is the norm of the singular values from index r on: the error of the best approximation of rank r."""
    tails: NDArray[np.float64] = np.sqrt(np.cumsum(np.square(sigma)[..., ::-1], axis=-1))[..., ::-1]
    return tails


def _multiplications(k: int, rank: int) -> int:
    return min(2 * k * rank, k * k)
