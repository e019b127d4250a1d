"""Filters as a search sees them: live ones, centred, of norm 1, and no more of them than fit into memory."""

import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mkf.ops import stream
from mkf.ops.arguments import KERNEL_SIZES
from mkf.ops.fit_statistics import refuse_mixed_sizes

SAMPLE = 1 << 16
"""Filters that a search looks at many times over; of more filters a random sample is drawn, 13 MB of 7x7."""

CONSTANT = 1e-6
"""A filter whose variation is a smaller part of it than this is dead: float32 keeps nothing of its shape."""

NOISE = 1e-4
"""A residual below this is rounding."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Live filters and what was left out.

    Attributes:
        filters: (M, k, k) float32, each of mean 0 and L2 norm 1, in the order of the source.
        total: Filters in the source.
        dead: Those that are constant, or so nearly that float32 cannot hold their variation.
        not_finite: Those that hold NaN or Inf.
    """

    filters: Tensor
    total: int
    dead: int
    not_finite: int

    @property
    def live(self) -> int:
        """Filters of the source that a search can use: all but the dead and those that are not finite."""
        return self.total - self.dead - self.not_finite

    def describe(self) -> str:
        """How many filters these are, in words, for a key set's provenance."""
        k, drawn = self.filters.shape[-1], len(self.filters)
        some = "" if drawn == self.live else f"{drawn:,} of "
        return f"{some}{self.live:,} {k}x{k} filters"


class Units(NamedTuple):
    """Filters centred and scaled.

    Attributes:
        filters: (M, k, k) float32, the live ones, of mean 0 and L2 norm 1.
        live: (N,) bool, which they are.
        not_finite: How many hold NaN or Inf.
    """

    filters: Tensor
    live: Tensor
    not_finite: int


def unit(filters: Any) -> Units:
    """Centre filters and scale them to norm 1, in float64.

    Args:
        filters: (N, k, k) or (N, k * k) tensor or array, or a bank in memory.

    Raises:
        ValueError: A shape that is no filter's.
        TypeError: No floating-point numbers.
    """
    x = getattr(filters, "filters", filters)
    x = torch.as_tensor(np.asarray(x)) if isinstance(x, np.ndarray) else x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"filters: expected floating-point numbers, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim == 2 and x.shape[1] in [k * k for k in KERNEL_SIZES]:
        k = KERNEL_SIZES[[k * k for k in KERNEL_SIZES].index(x.shape[1])]
        x = x.unflatten(1, (k, k))
    if x.ndim != 3 or x.shape[1] != x.shape[2] or x.shape[1] not in KERNEL_SIZES:
        raise ValueError(
            f"filters have shape {tuple(x.shape)}: expected (N, k, k) or (N, k*k) with k one of {KERNEL_SIZES}"
        )
    flat = x.detach().flatten(1).double()
    finite = flat.isfinite().all(1)
    flat = torch.where(finite[:, None], flat, 0)
    size = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    flat = flat / size  # so that no square overflows
    centred = flat - flat.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    live = norm[:, 0] > CONSTANT
    return Units((centred[live] / norm[live]).float().unflatten(1, x.shape[1:]), live, int((~finite).sum()))


def units(filters: Any) -> Iterator[Units]:
    """`unit` of any number of filters, a piece at a time: a bank, an array (also memory-mapped) or a tensor."""
    refuse_mixed_sizes(filters)
    with closing(stream.pieces(filters)) as pieces:
        for piece in pieces:
            yield unit(piece)


def draw(filters: Any, rows: int = SAMPLE, seed: int = 0, least: int = 1) -> Sample:
    """Read filters once and keep all live ones, or a uniform random sample of `rows` of them.

    The sample depends on the filters, `rows` and `seed` alone, not on how the source is cut into pieces.

    Args:
        filters: A `FilterBank` of one kernel size, a tensor, or an array, also memory-mapped.
        rows: Filters to keep at most.
        seed: Of the draw.
        least: How many live filters the search needs.

    Raises:
        ValueError: A bank of several kernel sizes, a shape that is no filter's, or fewer live filters than `least`.
        TypeError: No floating-point numbers.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: give a whole number from 0")
    if rows < max(least, 1):
        raise ValueError(f"sample={rows}: this search needs at least {max(least, 1)}")
    total = len(filters)
    rng = np.random.default_rng(seed)
    kept: list[Tensor] = []
    priorities: list[np.ndarray[Any, Any]] = []
    held = dead = not_finite = 0
    for piece in units(filters):
        live = len(piece.filters)
        dead += len(piece.live) - live - piece.not_finite
        not_finite += piece.not_finite
        kept.append(piece.filters)
        held += live
        if total > rows:
            priorities.append(rng.random(live))
            if held > 2 * rows:
                kept, priorities = _lowest(kept, priorities, rows)
                held = rows
    if total > rows and held > rows:
        kept, _ = _lowest(kept, priorities, rows)
    sample = Sample(torch.cat(kept), total, dead, not_finite)
    if sample.live < least:
        counted = f"{total} filters, {dead} constant and {not_finite} not finite"
        raise ValueError(
            f"{least} keys need at least as many filters that vary, and there are {sample.live} ({counted})"
        )
    if not_finite:
        warnings.warn(f"left out {not_finite} filters that hold NaN or Inf", stacklevel=3)
    return sample


def _lowest(
    kept: list[Tensor], priorities: list[np.ndarray[Any, Any]], rows: int
) -> tuple[list[Tensor], list[np.ndarray[Any, Any]]]:
    """The filters of the lowest priorities, in their order."""
    priority = np.concatenate(priorities)
    chosen = np.sort(np.argpartition(priority, rows - 1)[:rows])
    filters = torch.cat(kept)
    return [filters[torch.from_numpy(chosen).to(filters.device)]], [priority[chosen]]


def positive(keys: Tensor) -> Tensor:
    """Keys (K, k, k) turned so that the tap of largest magnitude is positive; a fit does not see the sign of a key."""
    flat = keys.flatten(1)
    largest = flat.gather(1, flat.abs().argmax(1, keepdim=True))
    turned: Tensor = (flat * largest.sign()).view(keys.shape)
    return turned
