"""The affine fit in PyTorch, a line for a formula: what every other implementation is compared with."""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys

MOST = 2.0**1021  # beyond it the difference of two taps may overflow
ROWS = 1 << 14  # filters at a time, so that the (keys, filters) products stay small whatever N is


def why_not(device: torch.device) -> str | None:
    """It runs everywhere."""
    return None


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Computes in float64 whatever the filters are."""
    for f, *out in zip(filters.split(ROWS), *(o.split(ROWS) for o in (index, scale, shift, residual)), strict=True):
        for o, value in zip(out, _fit(f, keys, positive, index.shape[1]), strict=True):
            o.copy_(value.T)


def _sum(rows: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, rows)


def _fit(f: Tensor, keys: FitKeys, positive: bool, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four outputs, (best, N).

    Taps come first here: a sum over them is a chain of additions of whole rows, whose rounding is the same for a filter
    wherever it stands and for a key wherever it stands.
    """
    f, q = f.flatten(1).T.double(), keys.unit.T.double()
    taps, first = len(f), f[0]
    finite = f.isfinite().all(0)
    dead = finite & (f == first).all(0)

    shrink = torch.where(f.abs().amax(0) > MOST, 0.25, 1.0).double()
    mean = _sum(f * shrink / taps)
    y = f * shrink - mean
    spread = y.abs().amax(0)  # dividing by it keeps the squares in range
    y = y / spread
    dot = _sum(y[t] * q[t][:, None] for t in range(taps))  # (K, N)
    score = dot if positive else dot.abs()
    # A stable sort, because equal scores go to the lowest index.
    j = score.argsort(dim=0, descending=True, stable=True)[:best]
    a = dot.gather(0, j)
    if positive:
        a = a.clamp(min=0)
    error = _sum((y[t] - a * q[t][j]).square() for t in range(taps))
    r = (error / _sum(y.square())).sqrt().clamp(max=1)
    a = a * spread * keys.inverse_norm[j]
    b = (mean - a * keys.mean[j]) / shrink
    a = a / shrink

    rank = torch.arange(best, device=f.device)[:, None]
    zero, nan = torch.zeros_like(a), torch.full_like(a, torch.nan)
    for case, values in ((dead, (rank, zero, first, zero)), (~finite, (torch.full_like(j, -1), nan, nan, nan))):
        j, a, b, r = (torch.where(case, v, o) for v, o in zip(values, (j, a, b, r), strict=True))
    return j, a, b, r
