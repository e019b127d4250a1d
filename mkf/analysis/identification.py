"""What a filter is: the nearest member of the discrete Gaussian family, its kind and its scales."""

from __future__ import annotations

import functools
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mkf.analysis.similarity import scaled
from mkf.keys.family import KINDS, Kind, max_scale
from mkf.ops import stream
from mkf.ops.affine_fit import affine_fit
from mkf.ops.arguments import filters_tensor
from mkf.ops.fit_statistics import refuse_mixed_sizes

Floats = NDArray[np.float32]

CONSTANT = len(KINDS)
"""Index of a dead filter: all taps are equal."""

NAMES = (*(kind.name for kind in KINDS), "constant", "not finite")
"""The kinds in words, by index; the last, of index -1, for a filter that holds NaN or Inf."""

MARGIN = 0.05**2, 0.2
"""A difference of Gaussians must leave less of a filter's squared norm than any other kind does, by .05^2 or by a fifth
of what that kind leaves, whichever is less."""

_DOG = len(KINDS) - 1  # the difference of Gaussians is the last
_TIE = 1e-8  # kinds whose squared residuals differ by less are equally good
_POINTS = 32  # of the grid along each parameter
_ROWS = 16_384  # filters at a time
_ITERATIONS = 30
_STEP = 1e-5  # in variance and weight: a refinement ends with a step shorter than this

_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Identification:
    """The nearest member g of the discrete Gaussian family to each of N filters: f ~ amplitude * g + offset.

    All arrays are numpy's, of N entries. Where a filter is constant or holds NaN or Inf, what does not exist is NaN.

    Attributes:
        index: int32, the kind, an index into `NAMES`; -1 for a filter that is not finite.
        scale_x: float32, s_x in pixels, the standard deviation of the Gaussian along x.
        scale_y: float32, s_y; for a difference of Gaussians equal to s_x.
        alpha: float32, weight of the Laplacian in a difference of Gaussians; inf where it is the Laplacian alone (then
            g = -Laplacian). NaN for every other kind.
        amplitude: float32, of g as `mkf.keys.family` writes it; its sign is the filter's. One beyond float32's range,
            as float64 filters may have, is the range's end.
        offset: float32, held within its range likewise.
        residual: float32 in [0, 1], ||f - (amplitude * g + offset)|| / ||f - mean(f)||; 0 for a constant.
        moment_scale_x: float32, s_x from spatial moments; see `identify`.
        moment_scale_y: float32, s_y from spatial moments.
    """

    index: NDArray[np.int32]
    scale_x: Floats
    scale_y: Floats
    alpha: Floats
    amplitude: Floats
    offset: Floats
    residual: Floats
    moment_scale_x: Floats
    moment_scale_y: Floats

    @property
    def sign(self) -> NDArray[np.int8]:
        """+1 or -1, the sign of the amplitude; 0 for a constant or not finite filter."""
        return np.sign(np.nan_to_num(self.amplitude)).astype(np.int8)

    @property
    def kind(self) -> NDArray[np.str_]:
        """The kind in words, one of `NAMES`: what the filter is apart from its sign."""
        return np.array(NAMES)[self.index]

    @property
    def name(self) -> NDArray[np.str_]:
        """The kind with its sign in words, as `mkf.keys.paper8().kinds` has it: "central difference in x, + left"."""
        words = np.array([[kind.negative, kind.positive] for kind in KINDS] + [[name] * 2 for name in NAMES[CONSTANT:]])
        name: NDArray[np.str_] = words[self.index, (self.sign > 0).astype(int)]
        return name

    def __len__(self) -> int:
        return len(self.index)


def identify(filters: Any, *, progress: stream.Progress | None = None) -> Identification:
    """Find the nearest member of the discrete Gaussian family to every filter, its kind and its scales.

    The family (`mkf.keys.family`) has eleven kinds: the Gaussian, one-sided first differences along y and x to either
    side, central first differences, second differences along x, along y and mixed, and the difference of Gaussians
    delta - alpha Laplacian. Each has a scale s_x along x and s_y along y (a difference of Gaussians one for both and
    alpha), 0 <= s <= max(2, (k + 1) / 4). For every kind the least-squares problem

        minimise ||f - (amplitude * g(s_x, s_y) + offset)|| over amplitude, offset and scales

    is started from the best of a grid of 32 x 32 members, which `affine_fit` finds, and solved in float64 by a damped
    Gauss-Newton iteration in the variances s^2. A kind is passed over only if the grid shows that it cannot win: the
    angle between filters obeys the triangle inequality, and no member is far from the grid.

    The kind of least residual wins. Where the answer is ambiguous, our rule is: of kinds that leave as much to within
    1e-8 of the squared norm, the first in `NAMES` (in 3 x 3 several kinds hold the same filters); and a difference of
    Gaussians is called so only if every other kind leaves more by `MARGIN`, because with alpha near 0 it is a single
    tap, which is the Gaussian of s = 0, and which of the two comes a little nearer is a matter of noise.

    3 x 3 is too small for all names. A filter that is symmetric about both axes has four different taps there, and two
    numbers once amplitude and offset are taken out; Gaussian, second difference in x or y and difference of Gaussians
    have two parameters each, so they overlap: about half of all differences of Gaussians are Gaussians exactly, and so
    are some second differences. The name is then that of the first in `NAMES`, whatever the filter was made as; the
    other kinds keep theirs. A central difference has the taps -1, 0, 1 along its axis at any scale, so that what is
    told of its scale there means nothing.

    Of planted filters, s from .3 to 1.3 and for differences of Gaussians s from .3 to 1 and alpha from .25 to 2, 100 %
    get their kind back in 7 x 7 and 5 x 5 and 94 % in 3 x 3; with noise of a tenth of the norm it is 99, 98 and 92 %,
    but of the differences of Gaussians alone 94, 83 and 32 %, and fewer still where alpha is smaller.

    The second estimate of the scales needs no fit, only the kind: the energy e = (f - m)^2, m the median of the
    window's outermost taps, has a variance along each axis, sum(e (c - mean(c))^2) / sum(e), which for a separable kind
    depends on that axis' scale alone. It is looked up in the same window. That is exact for a filter that fades out
    before the border (s up to about 1 in 7 x 7), rough for wider ones and for noisy small scales, and does not exist
    (NaN) where the variance does not grow with the scale: along the axis of a second difference, where it first
    shrinks, and of a central difference in 3 x 3, where it is always 1; nor for the difference of Gaussians,
    whose alpha it cannot tell from s.

    Args:
        filters: (N, k, k) or (N, k * k), k odd, 3 to 11: a tensor, a numpy array, a `KeySet` or a `FilterBank` of one
            kernel size, which is read in pieces. Work is done where the filters are.
        progress: Called as `progress(done, N)` after each piece.

    Returns:
        An `Identification`. A constant filter has the kind "constant", one with NaN or Inf "not finite".

    Raises:
        ValueError: Shapes that are no filters, an empty bank or one of several kernel sizes.
        TypeError: A dtype that is no floating-point number.

    Source: the family and its use for the keys are Lindeberg, Babaiee, Kiasari, arXiv 2509.12746; second and mixed
    differences, signs and this way of fitting are ours.
    """
    refuse_mixed_sizes(filters)
    source = filters if hasattr(filters, "batches") else filters_tensor(filters)
    parts, done = [], 0
    with closing(stream.pieces(source, _ROWS)) as pieces, torch.no_grad():
        for piece in pieces:
            parts.append(_identify(filters_tensor(piece)))
            done += len(piece)
            if progress is not None:
                progress(done, len(source))
    return Identification(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Identification)))


def _identify(filters: Tensor) -> Identification:
    """One piece of filters (N, k, k)."""
    k = filters.shape[-1]
    filters, size = scaled(filters)
    residual, start, constant, finite = _search(filters)
    live = finite & ~constant
    flat = torch.where(live[:, None], filters.flatten(1).double(), 0)
    mean = flat.mean(1, keepdim=True)
    norm = (flat - mean).norm(dim=1, keepdim=True)
    unit = (flat - mean) / torch.where(norm > 0, norm, 1)

    score, parameters = _refine_kinds(unit, residual, start, live, k)
    others, dog = score[:, :_DOG], score[:, _DOG]
    least = others.amin(1)
    best = (others <= least[:, None] + _TIE).int().argmax(1)  # the first of equals
    best = torch.where(dog < _less_margin(least), _DOG, best)
    index = torch.where(live, best, CONSTANT)
    index[~finite] = -1

    nothing = unit.new_full((len(filters),), torch.nan)
    out = {f.name: nothing.clone() for f in fields(Identification)}
    for number, kind in enumerate(KINDS):
        rows = (index == number).nonzero().flatten()
        if not len(rows):
            continue
        p = parameters[rows, number]
        g = kind.members(p, k)[:, 0].flatten(1)
        centred = g - g.mean(1, keepdim=True)
        amplitude = (unit[rows] * centred).sum(1) / centred.square().sum(1)
        out["residual"][rows] = (unit[rows] - amplitude[:, None] * centred).norm(dim=1)
        amplitude = amplitude * norm[rows, 0]
        out["offset"][rows] = (mean[rows, 0] - amplitude * g.mean(1)) * size[rows]
        if kind.separable:
            out["scale_x"][rows], out["scale_y"][rows] = p.sqrt().T
            for axis, profile in (("x", kind.columns), ("y", kind.rows)):
                spread = _spread(filters[rows].double(), axis)
                out[f"moment_scale_{axis}"][rows] = _scale_of_spread(spread, profile, k)
        else:
            t, w = p.T
            out["scale_x"][rows] = out["scale_y"][rows] = t.sqrt()
            w = torch.where(w > 1 - _STEP, 1, w)  # the Laplacian alone, to within the steps' end
            out["alpha"][rows] = w / (1 - w)
            amplitude = torch.where(w < 1, amplitude * (1 - w), amplitude)
        amplitude = amplitude * size[rows]
        out["amplitude"][rows] = amplitude.abs().clamp(min=_LEAST).copysign(amplitude)  # one of 0 would lose its sign
    dead = finite & constant
    out["amplitude"][dead], out["residual"][dead] = 0, 0
    out["offset"][dead] = filters[dead].double().flatten(1)[:, 0] * size[dead]
    for name in ("amplitude", "offset"):
        out[name] = out[name].clamp(-_MOST, _MOST)
    arrays: dict[str, Any] = {name: x.numpy(force=True).astype(np.float32) for name, x in out.items()}
    return Identification(**arrays | {"index": index.numpy(force=True).astype(np.int32)})


def _search(filters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best member of each kind's grid.

    Returns:
        Residuals (N, kinds) and numbers of the grid's members (N, kinds); which filters are constant, and finite, (N,).
    """
    residuals, numbers = [], []
    for grid in _grids(filters.shape[-1]):
        fits = [affine_fit(filters, members) for members in grid.members.split(256)]
        residual, part = torch.stack([fit.residual for fit in fits], 1).min(1)
        index = torch.stack([fit.index for fit in fits], 1).gather(1, part[:, None])[:, 0]
        residuals.append(residual.double())
        numbers.append(part * 256 + index.clamp(min=0))
    finite = fits[0].index >= 0
    constant = (fits[0].scale == 0) & (fits[0].residual == 0)
    return torch.stack(residuals, 1), torch.stack(numbers, 1), constant, finite


def _refine_kinds(unit: Tensor, residual: Tensor, start: Tensor, live: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Solve every kind that can win; the others keep their grid's residual.

    Returns:
        Squared residuals (N, kinds), inf for the kinds passed over, and parameters (N, kinds, 2).
    """
    grids = _grids(k)
    reach = torch.tensor([grid.reach for grid in grids], dtype=torch.float64, device=unit.device)
    least, most = (residual.clamp(0, 1).asin() - reach).clamp(min=0).sin().square(), residual.square()
    most_others, most_dog = most[:, :_DOG].amin(1, keepdim=True), most[:, _DOG:]
    possible = least <= _less_margin(most_others)
    possible[:, :_DOG] = (least <= most_others + _TIE)[:, :_DOG] & (_less_margin(least) <= most_dog)[:, :_DOG]
    possible &= live[:, None]
    score = torch.full_like(residual, torch.inf)
    parameters = residual.new_zeros(*residual.shape, 2)
    for number, (kind, grid) in enumerate(zip(KINDS, grids, strict=True)):
        rows = possible[:, number].nonzero().flatten()
        if len(rows):
            p = grid.parameters.to(unit.device)[start[rows, number]]
            score[rows, number], parameters[rows, number] = _refine(kind, unit[rows], p, k)
    return score, parameters


def _less_margin(squared: Tensor) -> Tensor:
    """What the difference of Gaussians may leave at most to win against a kind that leaves `squared`."""
    absolute, relative = MARGIN
    return squared - (relative * squared).clamp(max=absolute) - _TIE


def _refine(kind: Kind, unit: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Damped Gauss-Newton steps on ||f - a g(p)||^2 with a eliminated, within the bounds of p.

    A variable at its bound whose gradient points outwards is held for the step. A step that does not lessen the
    residual is taken back and the damping grows.

    Args:
        kind: What g is.
        unit: (M, k * k) centred filters of norm 1.
        p: (M, 2) where to start.
        k: Kernel size.

    Returns:
        The squared residuals (M,) and the parameters (M, 2).
    """
    upper = torch.tensor(kind.upper(k), dtype=p.dtype, device=p.device)
    p, products = p.clone(), _products(kind, unit, p, k)
    damping = torch.full((len(p),), 1e-3, dtype=p.dtype, device=p.device)
    active = torch.arange(len(p), device=p.device)
    for _ in range(_ITERATIONS):
        now = products[active]
        step = _step(now, p[active], upper, damping[active])
        moved = torch.minimum((p[active] + step).clamp(min=0), upper)
        length = (moved - p[active]).abs().amax(1)
        there = _products(kind, unit[active], moved, k)
        better = _explained(there) >= _explained(now)
        p[active[better]], products[active[better]] = moved[better], there[better]
        damping[active] *= torch.where(better, 0.2, 10.0)
        active = active[length > _STEP]
        if not len(active):
            break
    return (1 - _explained(products)).clamp(min=0), p


def _products(kind: Kind, unit: Tensor, p: Tensor, k: int) -> Tensor:
    """Inner products of the centred g, dg/dp1, dg/dp2 with f and with one another, (M, 3, 4)."""
    g = kind.members(p, k).flatten(2)
    g = g - g.mean(2, keepdim=True)
    return torch.cat([(g * unit[:, None]).sum(2, keepdim=True), g @ g.mT], 2)


def _explained(products: Tensor) -> Tensor:
    """Squared correlation of g with f."""
    return products[:, 0, 0].square() / products[:, 0, 1]


def _step(products: Tensor, p: Tensor, upper: Tensor, damping: Tensor) -> Tensor:
    """The damped Gauss-Newton step of the two parameters, (M, 2), once g itself is projected out of its slopes."""
    a = products[:, 0, 0] / products[:, 0, 1]
    ratio = products[:, 1:, 1] / products[:, :1, 1]
    matrix = products[:, 1:, 2:] - ratio[:, :, None] * products[:, None, 0, 2:]
    gradient = a[:, None] * (products[:, 1:, 0] - ratio * products[:, :1, 0])  # of the explained part, halved
    h11, h22 = (a.square() * matrix[:, i, i] * (1 + damping) + 1e-14 for i in (0, 1))
    h12 = a.square() * matrix[:, 0, 1]
    held = ((p <= 0) & (gradient < 0)) | ((p >= upper) & (gradient > 0))
    h12 = torch.where(held.any(1), 0, h12)  # then the step of the other is its own, and that of the held one is clamped
    determinant = h11 * h22 - h12.square()
    g1, g2 = gradient.T
    return torch.stack([h22 * g1 - h12 * g2, h11 * g2 - h12 * g1], 1) / determinant[:, None]


@dataclass(frozen=True, eq=False)
class _Grid:
    """Members of one kind: their parameters (1024, 2), themselves (1024, k, k), and the largest angle to the next."""

    parameters: Tensor
    members: Tensor
    reach: float


@functools.cache
def _grids(k: int) -> tuple[_Grid, ...]:
    """A grid for each kind."""
    return tuple(_grid(kind, k) for kind in KINDS)


def _grid(kind: Kind, k: int) -> _Grid:
    parameters = kind.grid(_POINTS, k)
    members = kind.members(parameters, k)[:, 0]
    fine = 2 * _POINTS - 1
    every = kind.members(kind.grid(fine, k), k)[:, 0].flatten(1)
    every = every - every.mean(1, keepdim=True)
    every = (every / every.norm(dim=1, keepdim=True)).view(fine, fine, -1)
    corners = (every[0::2, 0::2][i : i + _POINTS - 1, j : j + _POINTS - 1] for i in (0, 1) for j in (0, 1))
    nearest = torch.stack([(corner * every[1::2, 1::2]).sum(2).abs() for corner in corners]).amax(0)
    return _Grid(parameters, members, float(nearest.min().clamp(max=1).acos()))


def _spread(filters: Tensor, axis: str) -> Tensor:
    """Variance along an axis of the energy of (N, k, k) filters about the median of their outermost taps, (N,)."""
    k = filters.shape[-1]
    border = torch.ones(k, k, dtype=torch.bool, device=filters.device)
    border[1:-1, 1:-1] = False
    energy = (filters - filters[:, border].median(1).values[:, None, None]).square().sum(1 if axis == "x" else 2)
    return _variance(energy)


def _variance(energy: Tensor) -> Tensor:
    """Variance of the position n - k // 2 under the weights (N, k)."""
    n = torch.arange(energy.shape[1], dtype=energy.dtype, device=energy.device) - energy.shape[1] // 2
    energy = energy / energy.sum(1, keepdim=True)
    mean = energy @ n
    return energy @ n.square() - mean.square()


def _scale_of_spread(spread: Tensor, profile: str, k: int) -> Tensor:
    """The scale whose profile has that variance of energy, by linear interpolation in a table; within its range.

    NaN where the variance does not grow with the scale, so that it tells none.
    """
    scales, variances = _spreads(profile, k)
    if len(scales) == 1:
        return torch.full_like(spread, torch.nan)
    return torch.from_numpy(np.interp(spread.numpy(force=True), variances, scales)).to(spread.device)


@functools.cache
def _spreads(profile: str, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales from 0 to the largest at which the variance still grows, and the variance of the profile's energy."""
    from mkf.keys.family import profile_values

    scales = np.linspace(0, max_scale(k), 401)
    variances = np.array([_variance(profile_values(profile, s, k).square()[None])[0].item() for s in scales])
    variances = variances.round(12)  # so that rounding is no growth where the variance is the same at all scales
    grows = np.append(np.maximum.accumulate(variances)[:-1] < variances[1:], False)
    until = int(np.argmin(grows)) + 1
    return scales[:until], variances[:until]
