"""What a key is made of: a few separable terms, a constant and a single tap, found numerically."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# A description is exact where it misses the key by no more than this part of the key's norm. A key that was computed
# as a sum of outer products in float32 and scaled is off by one or two float32 epsilons.
EXACT = 4 * float(np.finfo(np.float32).eps)

NOISE = 1e-9  # relative; what float64 leaves of a difference that should be zero is less

STEPS = 30  # of the alternating approximation; on the published keys hundreds more gain a few per cent of the error


class Tap(NamedTuple):
    """One entry of a key, added to what its separable terms give; row and column count from 0 at the top left."""

    row: int
    column: int
    weight: float


@dataclass(frozen=True, eq=False)
class Structure:
    """A k x k key as a sum of separable terms, single taps and a constant.

        key[r, c] ~ sum over t of columns[r, t] * rows[t, c] + box + sum over taps at (r, c) of weight

    A separable term is two one-dimensional filters of k taps in place of one of k * k, a single tap is one
    multiplication: that is what makes a key of low rank cheap to convolve with. The constant, called box after the
    filter it is, is a separable term too, and one that the shift of a filter shares.

    Attributes:
        columns: The vertical factor of each term, (k, rank) float64.
        rows: The horizontal factor of each term, (rank, k) float64.
        taps: The single taps; `find` looks for at most one.
        residual: L2 norm of the key minus this sum.
        box: The constant in every tap, 0 where there is none.
    """

    columns: torch.Tensor
    rows: torch.Tensor
    taps: tuple[Tap, ...]
    residual: float
    box: float = 0.0

    @property
    def rank(self) -> int:
        """The number of separable terms; k where the key has no structure."""
        return self.rows.shape[0]

    @property
    def multiplications(self) -> int:
        """Multiplications per output pixel: 2 k for each term and for a box and 1 for each tap, at most k * k."""
        return multiplications(self.rows.shape[1], self.rank, self.box != 0, len(self.taps))

    def dense(self) -> torch.Tensor:
        """The sum written out, (k, k) float64."""
        key = self.columns @ self.rows + self.box
        for row, column, weight in self.taps:
            key[row, column] += weight
        return key

    def __repr__(self) -> str:
        taps = ", ".join(f"{weight:.4g} at ({row}, {column})" for row, column, weight in self.taps)
        box = f", box={self.box:.4g}" if self.box else ""
        return f"Structure(rank={self.rank}, taps=[{taps}]{box}, residual={self.residual:.1e})"


def multiplications(k: int, terms: int, box: bool, taps: int) -> int:
    """Multiplications per output pixel of a k x k key of that many parts: written out, it has never more than k * k."""
    return min(2 * k * (terms + box) + taps, k * k)


def find(key: NDArray[np.float64], tolerance: float = 0.0) -> Structure:
    """The cheapest description of one (k, k) key, in multiplications per pixel.

    Args:
        key: float64, finite.
        tolerance: The largest L2 norm of what a description may miss, relative to the norm of the key; exact, that is
            to float32 rounding, where that is less. A key that nothing cheaper than its k * k taps describes has as
            many separable terms as its rank, and `multiplications` is k * k.
    """
    k = len(key)
    exact = EXACT * float(np.linalg.norm(key))
    allowed = max(exact, tolerance * float(np.linalg.norm(key)))
    tails = np.append(_tails(np.linalg.svd(key, compute_uv=False)), 0.0)
    rank = int(np.sum(tails > exact))
    for terms, box, tap in _cheaper_than_taps(k):
        parts = terms + box + tap
        if tails[parts] > allowed:
            continue  # no matrix of so low a rank is close enough
        found = _reduced(key, terms, box, tap) if parts == rank else None
        if tolerance > 0 and (found is None or found.residual > allowed):
            found = _approximated(key, terms, box, tap)
        if found is not None and found.residual <= allowed:
            return found
    return _describe(key, rank)


def rank_residuals(keys: NDArray[np.float64]) -> NDArray[np.float64]:
    """The norm of what is left of each of (K, k, k) keys after its best approximation of rank 1 to k, (K, k)."""
    tails = _tails(np.linalg.svd(keys, compute_uv=False))
    return np.concatenate([tails[:, 1:], np.zeros((len(keys), 1))], axis=1)


def _cheaper_than_taps(k: int) -> list[tuple[int, bool, bool]]:
    """All (terms, box, tap) of fewer than k * k multiplications, the cheapest first; among equals those with a box."""
    every = [(terms, box, tap) for terms in range(k) for box in (True, False) for tap in (True, False)]
    cost = {parts: multiplications(k, *parts) for parts in every}
    return sorted((parts for parts in every if cost[parts] < k * k), key=lambda parts: (cost[parts], parts[0]))


def _reduced(key: NDArray[np.float64], terms: int, box: bool, tap: bool) -> Structure:
    """A key of rank terms + box + tap as exactly these parts, if it can be; if not, the residual is large.

    A matrix A of rank r can only get the rank r - 1 by subtracting a multiple of x y^T if that multiple is
    1 / (y^T A+ x), with A+ the pseudoinverse (Wedderburn's rank reduction); so each position of a tap, and the box,
    has one weight to try.
    """
    k = len(key)
    largest = float(np.linalg.norm(key)) / EXACT  # a greater weight would leave nothing but rounding
    taps, remaining = np.zeros((1, k, k)), key[None]
    if tap:
        weights = _weights(_pseudoinverse(key, terms + box + 1).T.ravel(), largest)
        taps = weights[:, None, None] * np.eye(k * k).reshape(k * k, k, k)
        remaining = key - taps
    boxes = np.zeros(len(taps))
    if box:
        boxes = _weights(_pseudoinverse(remaining, terms + 1).sum((1, 2)), largest)
        remaining = remaining - boxes[:, None, None]
    missed = _tails(np.linalg.svd(remaining, compute_uv=False))[:, terms]
    best = int(np.argmin(missed))
    return _describe(key, terms, float(boxes[best]), taps[best])


def _weights(inverse: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """1 / inverse, 0 where that is greater than `largest`."""
    weights: NDArray[np.float64] = np.divide(
        1, inverse, out=np.zeros_like(inverse), where=np.abs(inverse) * largest > 1
    )
    return weights


def _pseudoinverse(a: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """The pseudoinverse of matrices (..., k, k) that are taken to have that rank."""
    u, sigma, vt = np.linalg.svd(a)
    tiny = np.finfo(np.float64).tiny
    inverse: NDArray[np.float64] = np.swapaxes(vt[..., :rank, :], -1, -2) @ (
        np.swapaxes(u[..., :rank], -1, -2) / np.maximum(sigma[..., :rank, None], tiny)
    )
    return inverse


def _approximated(key: NDArray[np.float64], terms: int, box: bool, tap: bool) -> Structure:
    """A key as nearly these parts: each in turn as is best for the others, the tap where most is missed.

    It starts with the terms alone, and with the box and tap of `_reduced`, as if the key were exactly these parts.
    """
    best = _describe(key, terms)
    if not (box or tap):
        return best
    for found in (best, _reduced(key, terms, box, tap)):
        for _ in range(STEPS):
            best = min(best, found, key=lambda structure: structure.residual)
            missed = key - (found.columns @ found.rows).numpy()
            single = np.zeros_like(key)
            for row, column, weight in found.taps:
                single[row, column] = weight
            constant = float((missed - single).mean()) if box else 0.0
            if tap:
                where = np.unravel_index(np.argmax(np.abs(missed - constant)), key.shape)
                single = np.zeros_like(key)
                single[where] = missed[where] - constant
            found = _describe(key, terms, constant, single)
    return best


def _describe(
    key: NDArray[np.float64], terms: int, box: float = 0.0, tap: NDArray[np.float64] | None = None
) -> Structure:
    """The key with this box and this tap, a (k, k) of one entry, and as many separable terms as said for the rest."""
    remaining = key - box if tap is None else key - box - tap
    u, sigma, vt = np.linalg.svd(remaining)
    split = np.sqrt(sigma[:terms])  # shared evenly, so that both factors have the same size
    columns, rows = _evened((u[:, :terms] * split).T).T, _evened(split[:, None] * vt[:terms])
    taps = () if tap is None else tuple(Tap(int(r), int(c), float(tap[r, c])) for r, c in np.argwhere(tap))
    residual = float(np.linalg.norm(remaining - columns @ rows))
    return Structure(torch.from_numpy(columns), torch.from_numpy(rows), taps, residual, box)


def _evened(factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors (terms, k), with those that mirror themselves or their negative but for rounding made to do so exactly.

    Kernels add the inputs that meet equal taps before they multiply.
    """
    mirrored = factors[:, ::-1]
    size = NOISE * np.linalg.norm(factors, axis=1, keepdims=True)
    for other in (mirrored, -mirrored):
        close = np.linalg.norm(factors - other, axis=1, keepdims=True) <= size
        factors = np.where(close, (factors + other) / 2, factors)
    return factors


def _tails(sigma: NDArray[np.floating]) -> NDArray[np.float64]:
    """Entry r is the norm of the singular values from index r on: the error of the best approximation of rank r."""
    tails: NDArray[np.float64] = np.sqrt(np.cumsum(np.square(sigma)[..., ::-1], axis=-1))[..., ::-1]
    return tails
