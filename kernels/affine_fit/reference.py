"""The affine fit in PyTorch, a line for a formula: what every other implementation is compared with."""

import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys

ROWS = 1 << 16  # filters at a time, so that the (filters, keys) products stay small whatever N is


def why_not(device: torch.device) -> str | None:
    """It runs everywhere."""
    return None


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Computes in float64 for float64 filters, otherwise in float32."""
    outputs = (index, scale, shift, residual)
    pieces = filters.flatten(1).split(ROWS) if filters.is_contiguous() else filters.split(ROWS)
    for f, *out in zip(pieces, *(o.split(ROWS) for o in outputs), strict=True):
        for o, value in zip(out, _fit(f.flatten(1), keys, positive, index.shape[1]), strict=True):
            o.copy_(value)


def _fit(f: Tensor, keys: FitKeys, positive: bool, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    q = keys.unit.to(f.dtype)

    finite = f.isfinite().all(1, keepdim=True)
    first = f[:, :1]
    dead = finite & (f == first).all(1, keepdim=True)
    f = torch.where(finite, f, 0)

    # The mean leaves twice: once roughly, and then what its rounding left behind. Dividing by the largest deviation keeps
    # the squares of tiny and of huge filters in range.
    rough = f.mean(1, keepdim=True)
    y = f - rough
    rest = y.mean(1, keepdim=True)
    y = y - rest
    mean = rough + rest
    unit = y.abs().amax(1, keepdim=True)
    y = torch.where(dead, 0, y / unit)

    dot = y @ q.T
    score = dot if positive else dot.abs()
    # A stable sort, because equal scores go to the lowest index.
    j = score.argmax(1, keepdim=True) if best == 1 else score.argsort(1, descending=True, stable=True)[:, :best]
    a = dot.gather(1, j)
    if positive:
        a = a.clamp(min=0)
    error = (y[:, None] - a[:, :, None] * q[j]).norm(dim=2)
    r = (error / y.norm(dim=1, keepdim=True)).clamp(max=1)
    a = a * unit * keys.inverse_norm[j].to(f.dtype)
    b = mean - a * keys.mean[j].to(f.dtype)

    j = torch.where(finite, torch.where(dead, torch.arange(best, device=j.device), j), -1)
    a, b, r = torch.where(dead, 0, a), torch.where(dead, first, b), torch.where(dead, 0, r)
    a, b, r = (torch.where(finite, value, torch.nan) for value in (a, b, r))
    return j, a, b, r
