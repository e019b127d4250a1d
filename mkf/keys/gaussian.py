"""The eight keys as derivatives of discrete Gaussians."""

import torch

from mkf.keys.family import KINDS as FAMILY
from mkf.keys.key_set import KeySet, check_size
from mkf.keys.published import KINDS, NAMES

# Standard deviations in pixels of keys 1 to 8, first s_x and then s_y, for each method of fitting them to the published
# keys. Methods C2 and D2, and key 7 in all of them, use one value for both axes.
SCALES = {
    "A": (
        (0.580, 0.559, 0.617, 0.642, 1.075, 0.771, 0.675, 0.552),
        (0.558, 0.580, 0.601, 0.424, 0.800, 1.003, 0.675, 0.545),
    ),
    "B": (
        (0.644, 0.586, 0.690, 0.756, 1.107, 0.900, 0.675, 0.609),
        (0.583, 0.644, 0.674, 0.460, 0.945, 0.889, 0.675, 0.601),
    ),
    "C1": (
        (0.360, 0.555, 0.701, 0.563, 1.309, 0.973, 0.654, 0.637),
        (0.510, 0.453, 0.655, 0.384, 0.875, 1.171, 0.654, 0.587),
    ),
    "C2": ((0.458, 0.448, 0.671, 0.420, 1.387, 1.090, 0.654, 0.611),) * 2,
    "D1": (
        (0.491, 0.581, 0.483, 0.500, 1.300, 0.984, 0.675, 0.615),
        (0.722, 0.519, 0.503, 0.000, 1.004, 1.074, 0.675, 0.608),
    ),
    "D2": ((0.644, 0.558, 0.495, 0.380, 1.193, 1.038, 0.675, 0.612),) * 2,
}

ALPHA = 0.5256  # weight of the Laplacian in key 7

# Kind and sign of keys 1 to 8.
_MEMBERS = (
    ("one-sided difference in y, below", 1),
    ("one-sided difference in x, right", 1),
    ("one-sided difference in y, above", 1),
    ("one-sided difference in x, left", 1),
    ("central difference in x", -1),
    ("central difference in y", 1),
    ("difference of Gaussians", 1),
    ("Gaussian", 1),
)


def analytic(method: str, k: int = 7) -> KeySet:
    """The eight keys as scale-space derivatives, (8, k, k).

    With T(n; s) = exp(-s^2) I_n(s^2) the discrete Gaussian (I_n the modified Bessel function, s = 0 a single tap), rows
    r and columns c counted from the centre, r downwards, and Y = T(.; s_y), X = T(.; s_x):

        key 1 = [Y(r-1) - Y(r)] X(c)          key 5 = Y(r) [X(c+1) - X(c-1)] / 2
        key 2 = Y(r) [X(c-1) - X(c)]          key 6 = [Y(r-1) - Y(r+1)] / 2 X(c)
        key 3 = [Y(r+1) - Y(r)] X(c)          key 7 = delta - .5256 [Y''(r) X(c) + Y(r) X''(c)]
        key 4 = Y(r) [X(c+1) - X(c)]          key 8 = Y(r) X(c)

    with T''(n) = T(n+1) - 2 T(n) + T(n-1). They are computed in float64 and not centred: all are separable but key 7,
    which is a tap plus two separable terms.

    Args:
        method: Which of the published fits gives s_x and s_y: "A", "B", "C1", "C2", "D1" or "D2".
        k: Kernel size, odd, 3 to 11; the fits were made at 7.

    Raises:
        ValueError: Another method or kernel size.

    Source: Lindeberg, Babaiee, Kiasari, arXiv 2509.12746.
    """
    if method not in SCALES:
        raise ValueError(f"no analytic keys called {method!r}: the methods are {', '.join(SCALES)}")
    check_size(len(NAMES), k)
    kinds = {kind.name: kind for kind in FAMILY}
    keys = []
    for (name, sign), s_x, s_y in zip(_MEMBERS, *SCALES[method], strict=True):
        second = s_y**2 if kinds[name].separable else ALPHA / (1 + ALPHA)
        parameters = torch.tensor([[s_x**2, second]], dtype=torch.float64, device="cpu")
        keys.append(sign * kinds[name].members(parameters, k)[0, 0])
    return KeySet(
        torch.stack(keys),
        NAMES,
        KINDS,
        provenance=f"discrete Gaussian derivatives, method {method} of Lindeberg, Babaiee, Kiasari, arXiv 2509.12746",
    )
