"""The family against SciPy's Bessel functions, and its slopes against finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ive

from mkf.keys.family import KINDS, max_scale, profile_values

SHIFTS = {  # profiles as sums of weight * T(n + step)
    "smooth": {0: 1},
    "ahead": {-1: 1, 0: -1},
    "behind": {1: 1, 0: -1},
    "central": {-1: 0.5, 1: -0.5},
    "second": {-1: 1, 0: -2, 1: 1},
}


def bessel(profile: str, s: float, k: int) -> np.ndarray:
    n = np.arange(k) - k // 2
    return sum(weight * ive(np.abs(n + step), s**2) for step, weight in SHIFTS[profile].items())


@pytest.mark.parametrize("profile", SHIFTS)
@pytest.mark.parametrize("k", [3, 7, 11])
@pytest.mark.parametrize("s", [0.0, 0.01, 0.38, 0.675, 1.0, 1.387, 2.0])
def test_profiles_are_differences_of_bessel_functions(profile: str, s: float, k: int) -> None:
    np.testing.assert_allclose(profile_values(profile, s, k), bessel(profile, s, k), rtol=0, atol=1e-15)


def test_the_widest_profile() -> None:
    np.testing.assert_allclose(profile_values("smooth", 3.0, 11), bessel("smooth", 3.0, 11), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS[:-1], ids=lambda kind: kind.name)
def test_separable_members(kind) -> None:
    (member,) = kind.members(torch.tensor([[0.8**2, 0.45**2]], dtype=torch.float64), 7)[:, 0]
    expected = np.outer(bessel(kind.rows, 0.45, 7), bessel(kind.columns, 0.8, 7))
    np.testing.assert_allclose(member, expected, atol=1e-15)


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_the_difference_of_gaussians(w: float) -> None:
    (member,) = KINDS[-1].members(torch.tensor([[0.7**2, w]], dtype=torch.float64), 5)[:, 0]
    smooth, second = bessel("smooth", 0.7, 5), bessel("second", 0.7, 5)
    expected = -w * (np.outer(second, smooth) + np.outer(smooth, second))
    expected[2, 2] += 1 - w
    np.testing.assert_allclose(member, expected, atol=1e-15)


@given(st.sampled_from(KINDS), st.sampled_from([3, 7, 11]), st.floats(0, 1), st.floats(0, 1))
def test_slopes_are_derivatives(kind, k: int, first: float, second: float) -> None:
    p = torch.tensor([[first, second]], dtype=torch.float64) * torch.tensor(kind.upper(k))
    slopes = kind.members(p, k)[0, 1:]
    for i, slope in enumerate(slopes):
        step = torch.zeros(1, 2, dtype=torch.float64)
        step[0, i] = 1e-5
        numeric = (kind.members(p + step, k) - kind.members(p - step, k))[0, 0] / 2e-5
        np.testing.assert_allclose(slope, numeric, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_grid_covers_the_parameters(kind) -> None:
    grid = kind.grid(9, 7)
    assert grid.shape == (81, 2)
    torch.testing.assert_close(grid.amax(0), torch.tensor(kind.upper(7), dtype=torch.float64))
    assert grid.amin() == 0
    torch.testing.assert_close(kind.grid(17, 7).view(17, 17, 2)[::2, ::2], grid.view(9, 9, 2))
    # No two neighbours are far from each other.
    members = kind.members(grid, 7)[:, 0].flatten(1)
    members = members - members.mean(1, keepdim=True)
    members = (members / members.norm(dim=1, keepdim=True)).view(9, 9, -1)
    for one, other in ((members[1:], members[:-1]), (members[:, 1:], members[:, :-1])):
        assert (one * other).sum(2).abs().min() > 0.92


@pytest.mark.parametrize(("k", "s"), [(3, 2), (7, 2), (9, 2.5), (11, 3)])
def test_max_scale(k: int, s: float) -> None:
    assert max_scale(k) == s
