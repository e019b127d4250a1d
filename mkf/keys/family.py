"""The discrete Gaussian family: every filter that is a Gaussian or a low difference of one, and its slopes.

With T(n; t) = exp(-t) I_n(t) the discrete Gaussian of variance t = s^2 (I_n the modified Bessel function; t = 0 is a
single tap), a member of a separable kind is

    g[r, c] = u(r; t_y) v(c; t_x),   u and v each one of the profiles

    smooth   T(n)                       ahead   T(n-1) - T(n)        central   [T(n-1) - T(n+1)] / 2
    second   T(n-1) - 2 T(n) + T(n+1)   behind  T(n+1) - T(n)

rows r counted downwards and columns c to the right from the centre. A difference of Gaussians is

    g = (1 - w) delta - w Laplacian = (1 - w) [delta - alpha Laplacian],   alpha = w / (1 - w) >= 0,
    Laplacian = second(r; t) smooth(c; t) + smooth(r; t) second(c; t),

key 7 of arXiv 2509.12746 with a weight that may also be infinite. The discrete Gaussian solves the diffusion equation
dT/dt = second(T) / 2 exactly, which gives the slopes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_STENCILS = {  # weights of T(n-1), T(n) and T(n+1)
    "smooth": (0.0, 1.0, 0.0),
    "ahead": (1.0, -1.0, 0.0),
    "behind": (0.0, -1.0, 1.0),
    "central": (0.5, 0.0, -0.5),
    "second": (1.0, -2.0, 1.0),
}
_PERIOD = 32
"""T is the inverse Fourier transform of exp(t (cos w - 1)), sampled at this many frequencies: wrong by T(32 - n), below
1e-17 for k = 7 and s <= 2, below 1e-11 for k = 11 and s <= 3."""


@dataclass(frozen=True)
class Kind:
    """One kind of filter.

    Attributes:
        name: The kind in words, without a sign.
        positive: The name of a member with positive amplitude.
        negative: The name of a member with negative amplitude.
        rows: The profile u along y; empty for the difference of Gaussians.
        columns: The profile v along x; empty for the difference of Gaussians.
    """

    name: str
    positive: str
    negative: str
    rows: str = ""
    columns: str = ""

    @property
    def separable(self) -> bool:
        """Whether a member is one outer product, of parameters (t_x, t_y), and not one of (t, w)."""
        return bool(self.rows)

    def upper(self, k: int) -> tuple[float, float]:
        """The largest value of each of the two parameters; the least is 0."""
        t = max_scale(k) ** 2
        return (t, t) if self.separable else (t, 1.0)

    def members(self, parameters: Tensor, k: int) -> Tensor:
        """Members with their derivatives with respect to the two parameters.

        Args:
            parameters: (N, 2) float64, the variances (t_x, t_y), or (t, w) for the difference of Gaussians.
            k: Kernel size, odd, 3 to 11.

        Returns:
            (N, 3, k, k) float64: g, dg/dp1, dg/dp2; not centred, not scaled.
        """
        first, second = parameters.unbind(1)
        if self.separable:
            v, u = _profile(self.columns, first, k), _profile(self.rows, second, k)
            return torch.stack([_outer(u[:, 0], v[:, 0]), _outer(u[:, 0], v[:, 1]), _outer(u[:, 1], v[:, 0])], 1)
        smooth, sharp = _profile("smooth", first, k), _profile("second", first, k)
        laplacian = _outer(sharp[:, 0], smooth[:, 0])
        laplacian = laplacian + laplacian.mT
        slope = _outer(sharp[:, 1], smooth[:, 0]) + _outer(sharp[:, 0], smooth[:, 1])
        slope = slope + slope.mT
        delta = torch.zeros(k, k, dtype=parameters.dtype, device=parameters.device)
        delta[k // 2, k // 2] = 1
        w = second[:, None, None]
        return torch.stack([(1 - w) * delta - w * laplacian, -w * slope, -delta - laplacian], 1)

    def grid(self, points: int, k: int) -> Tensor:
        """Parameters (points^2, 2) of a grid over all members: even in s, and for w in the angle to the single tap.

        The middles between its points are the points of `grid(2 * points - 1, k)` with odd numbers.
        """
        s = torch.linspace(0, max_scale(k), points, dtype=torch.float64)
        if self.separable:
            return torch.cartesian_prod(s.square(), s.square())
        t, angle = torch.cartesian_prod(s.square(), torch.linspace(0, math.pi / 2, points, dtype=torch.float64)).T
        flat = self.members(torch.stack([t, torch.ones_like(t)], 1), k)[:, 0].flatten(1)
        norm = (flat - flat.mean(1, keepdim=True)).norm(dim=1)
        laplacian, tap = angle.sin() / norm, angle.cos() / math.sqrt(1 - 1 / k**2)
        return torch.stack([t, laplacian / (laplacian + tap)], 1)


KINDS = (
    Kind("Gaussian", "Gaussian", "negative Gaussian", "smooth", "smooth"),
    *(
        Kind(
            f"one-sided difference in {axis}, {side}",
            f"one-sided difference in {axis}, + {side}",
            f"one-sided difference in {axis}, - {side}",
            *(profile, "smooth") if axis == "y" else ("smooth", profile),
        )
        for axis, side, profile in (
            ("y", "below", "ahead"),
            ("x", "right", "ahead"),
            ("y", "above", "behind"),
            ("x", "left", "behind"),
        )
    ),
    Kind(
        "central difference in x", "central difference in x, + right", "central difference in x, + left",
        "smooth", "central",
    ),
    Kind(
        "central difference in y", "central difference in y, + below", "central difference in y, + above",
        "central", "smooth",
    ),
    Kind(
        "second difference in x", "second difference in x, + flanks", "second difference in x, + centre",
        "smooth", "second",
    ),
    Kind(
        "second difference in y", "second difference in y, + flanks", "second difference in y, + centre",
        "second", "smooth",
    ),
    Kind(
        "mixed second difference", "mixed second difference, + falling diagonal",
        "mixed second difference, + rising diagonal", "central", "central",
    ),
    Kind("difference of Gaussians", "difference of Gaussians", "negative difference of Gaussians"),
)  # fmt: skip
"""All kinds; where a filter is several of them, it is called the first."""


def max_scale(k: int) -> float:
    """The largest s in pixels that a k x k window can tell: 2, or (k + 1) / 4 if that is more. Our choice."""
    return max(2.0, (k + 1) / 4)


def profile_values(name: str, s: float, k: int) -> Tensor:
    """The k values, float64, of one profile at scale s."""
    return _profile(name, torch.tensor([s], dtype=torch.float64).square(), k)[0, 0]


def _profile(name: str, t: Tensor, k: int) -> Tensor:
    """A profile and its derivative with respect to t, (N, 2, k), at N variances."""
    cosines, basis = (x.to(t.device) for x in _basis(name, k))
    return (torch.exp(t[:, None] * (cosines - 1)) @ basis).view(len(t), 2, k)


@functools.cache
def _basis(name: str, k: int) -> tuple[Tensor, Tensor]:
    """Cosines of the frequencies, and what each adds to a profile and to its derivative, (frequencies, 2 k)."""
    w = 2 * math.pi * torch.arange(_PERIOD // 2 + 1, dtype=torch.float64) / _PERIOD
    weight = torch.full_like(w, 2 / _PERIOD)
    weight[[0, -1]] = 1 / _PERIOD
    n = torch.arange(k) - k // 2
    waves = sum(a * torch.cos(w[:, None] * (n + step)) for a, step in zip(_STENCILS[name], (-1, 0, 1), strict=True))
    values = weight[:, None] * waves
    return torch.cos(w), torch.cat([values, (torch.cos(w) - 1)[:, None] * values], 1)


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u[:, :, None] * v[:, None, :]
