"""Matching, dimension and duplicates against their definitions."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mkf
from mkf.analysis import duplicates, effective_dimension, match

from .banks import bank_of, noise

KEYS = mkf.keys.paper8()


def unit(filters: torch.Tensor) -> np.ndarray:
    flat = filters.double().flatten(1).numpy()
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_a_set_matches_itself_in_any_order_sign_scale_and_shift() -> None:
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    scale = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8])[:, None, None]
    found = match(KEYS, scale * KEYS.filters[order] + 3)
    assert [order[j] for j in found.second] == found.first.tolist() == list(range(8))
    assert found.similarity == pytest.approx(1, abs=1e-6)
    assert (np.sign(found.cosine) == np.sign(scale.flatten().numpy())[found.second]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5))
def test_no_pairing_is_better(seed: int, k: int, other: int) -> None:
    few, many = noise(k, 3, 3, seed=seed), noise(other, 3, 3, seed=seed + 1)
    found = match(few, many)
    cosines = np.abs(unit(few) @ unit(many).T)
    np.testing.assert_allclose(np.abs(found.cosines), cosines, atol=1e-12)
    if k > other:
        cosines = cosines.T
    best = max(
        sum(row[j] for row, j in zip(cosines, chosen, strict=True))
        for chosen in permutations(range(cosines.shape[1]), len(cosines))
    )
    assert np.abs(found.cosine).sum() == pytest.approx(best)
    assert len(found.first) == min(k, other)


def test_the_analytic_keys_match_the_published() -> None:
    found = match(KEYS, mkf.keys.analytic("B"))
    assert found.second.tolist() == list(range(8))
    assert found.cosine[6] == pytest.approx(0.997, abs=0.002)


def test_matching_refuses() -> None:
    with pytest.raises(ValueError, match="7x7 and 5x5 cannot be matched"):
        match(KEYS, mkf.keys.analytic("B", 5))
    with pytest.raises(ValueError, match="not constant"):
        match(KEYS, torch.zeros(1, 7, 7))
    with pytest.raises(ValueError, match="at least one"):
        match(KEYS, torch.zeros(0, 7, 7))


def test_effective_dimension() -> None:
    assert effective_dimension(KEYS.filters[:1].repeat(9, 1, 1) * 3 + 1) == pytest.approx(1)
    both = torch.cat([noise(40_000, 5, 5), -noise(3, 5, 5)])
    assert effective_dimension(both) == pytest.approx(24, abs=0.05)
    x = unit(noise(50, 7, 7))
    values = np.linalg.eigvalsh(x.T @ x / 50)
    expected = values.sum() ** 2 / (values**2).sum()
    broken = torch.cat([noise(50, 7, 7), torch.ones(2, 7, 7), torch.full((1, 7, 7), torch.nan)])
    assert effective_dimension(broken) == pytest.approx(expected)
    assert effective_dimension(bank_of(broken)) == pytest.approx(expected)
    assert np.isnan(effective_dimension(torch.ones(2, 7, 7)))


def test_duplicates_are_found_up_to_scale_and_shift() -> None:
    filters = noise(10, 7, 7)
    filters[4] = -3 * filters[1] + 7
    filters[7] = filters[1] + 0.01 * noise(7, 7, seed=5)
    filters[8] = filters[2] + 0.2 * noise(7, 7, seed=6)
    filters[5], filters[6], filters[9] = 1, 1, torch.nan
    assert duplicates(filters).tolist() == [-1, -1, -1, -1, 1, -1, -1, 1, -1, -1]
    assert duplicates(filters, cosine=0.9)[8] == 2
    with pytest.raises(ValueError, match="cosine"):
        duplicates(filters, cosine=0)


def test_duplicates_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = noise(60, 3, 3)
    filters[30:] = filters[:30].flip(0)
    wanted = [-1] * 30 + list(range(29, -1, -1))
    assert duplicates(filters).tolist() == wanted
    monkeypatch.setattr("mkf.analysis.similarity._ROWS", 7)
    assert duplicates(filters).tolist() == wanted


@pytest.mark.parametrize("scale", [1e-320, 1e-170, 1e160, 1e308])
def test_tiny_and_huge_filters(scale: float) -> None:
    keys = KEYS.filters.double()
    large = keys / keys.abs().amax((1, 2), keepdim=True) * scale
    rel = 1e-2 if scale < 1e-300 else 1e-12  # few digits are left below float64's least normal number
    assert match(large, KEYS).similarity == pytest.approx(1, rel=rel)
    assert effective_dimension(large) == pytest.approx(effective_dimension(keys), rel=rel)
    assert duplicates(torch.cat([large, 0.5 * large])).tolist() == [-1] * 8 + list(range(8))
