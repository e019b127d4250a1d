"""Separable terms, boxes and single taps, found in keys that were built from known ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mkf.keys import KeySet, analytic, random


def built(k: int, rank: int, seed: int) -> np.ndarray:
    """A well-conditioned k x k matrix of the given rank with entries of about 1."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((k, k)))
    v, _ = np.linalg.qr(rng.standard_normal((k, k)))
    return k * (u[:, :rank] * rng.uniform(0.5, 2, rank)) @ v[:, :rank].T


def scale(key: np.ndarray) -> float:
    return 1 / float(np.linalg.norm(key - key.mean()))


@given(st.sampled_from([(5, 1), (5, 2), (7, 1), (7, 2), (7, 3), (11, 4)]), st.integers(0, 2**32 - 1))
def test_rank_is_found(size: tuple[int, int], seed: int) -> None:
    k, rank = size
    key = built(k, rank, seed)
    (found,) = KeySet(key[None]).structure
    assert (found.rank, found.taps) == (rank, ())
    assert found.multiplications == 2 * k * rank
    assert found.columns.shape == (k, rank)
    assert found.rows.shape == (rank, k)
    assert found.residual < 1e-6
    np.testing.assert_allclose(found.dense(), scale(key) * key, atol=1e-6)


@given(
    st.sampled_from([(5, 1), (7, 1), (7, 2), (11, 3)]),
    st.integers(0, 10),
    st.integers(0, 10),
    st.floats(0.5, 20),
    st.integers(0, 2**32 - 1),
)
def test_a_single_tap_is_found(size: tuple[int, int], row: int, column: int, weight: float, seed: int) -> None:
    k, rank = size
    row, column = row % k, column % k
    smooth = built(k, rank, seed)
    key = smooth.copy()
    key[row, column] += weight
    (found,) = KeySet(key[None]).structure
    # another tap is as good where the smooth part has a row or column that is nearly zero beside it, so what counts is
    # that a description this cheap is found and is the key
    assert found.multiplications <= 2 * k * rank + 1
    assert found.residual < 2e-6
    np.testing.assert_allclose(found.dense(), scale(key) * key, atol=2e-6)


def test_where_the_tap_is() -> None:
    key = built(7, 2, seed=1)
    key[5, 1] -= 3
    (found,) = KeySet(key[None]).structure
    (tap,) = found.taps
    assert (found.rank, tap.row, tap.column) == (2, 5, 1)
    assert tap.weight == pytest.approx(-3 * scale(key), rel=1e-5)
    assert found.multiplications == 29
    assert repr(found).startswith(f"Structure(rank=2, taps=[{tap.weight:.4g} at (5, 1)], residual=")


def test_a_delta_is_a_tap_and_nothing_else() -> None:
    key = np.zeros((7, 7))
    key[2, 4] = 1
    (found,) = KeySet(key[None]).structure
    assert (found.rank, found.taps, found.multiplications) == (0, ((2, 4, found.taps[0].weight),), 1)
    assert found.residual == 0
    assert found.taps[0].weight == pytest.approx(scale(key), rel=1e-7)


def test_products_that_were_computed_in_float32_are_separable() -> None:
    rng = np.random.default_rng(0)
    columns, rows = rng.standard_normal((2, 200, 11)).astype(np.float32)
    keys = KeySet(columns[:, :, None] * rows[:, None, :])
    assert {(key.rank, key.taps) for key in keys.structure} == {(1, ())}


def test_noise_has_no_structure() -> None:
    for k in (3, 5, 7, 9, 11):
        for key in random(k, 16).structure:
            assert (key.rank, key.taps, key.multiplications) == (k, (), k * k)


def test_nearly_separable_is_not_separable() -> None:
    key = built(7, 1, seed=3) + 1e-4 * built(7, 7, seed=4)
    (found,) = KeySet(key[None]).structure
    assert found.rank == 7


@given(
    st.sampled_from([(5, 1), (7, 1), (7, 2), (11, 3)]),
    st.booleans(),
    st.tuples(st.integers(0, 10), st.integers(0, 10)),
    st.floats(0.3, 20),
    st.integers(0, 2**32 - 1),
)
def test_a_box_is_found(size: tuple[int, int], tap: bool, at: tuple[int, int], weight: float, seed: int) -> None:
    k, rank = size
    key = built(k, rank, seed) + weight
    if tap:
        key[at[0] % k, at[1] % k] -= 2 * weight
    (found,) = KeySet(key[None]).structure
    assert found.multiplications <= min(2 * k * (rank + 1) + tap, k * k)
    assert found.residual < 3e-6
    np.testing.assert_allclose(found.dense(), scale(key) * key, atol=3e-6)


def test_an_offset_is_a_box() -> None:
    for key, plain in zip(KeySet(analytic("B").filters + 1).structure, analytic("B").structure, strict=True):
        assert (key.rank, len(key.taps)) == (plain.rank, len(plain.taps))
        assert key.box == pytest.approx(1, rel=1e-5)
        assert key.multiplications == plain.multiplications + 14
        assert "box=1, " in repr(key)


def test_centred_analytic_keys_are_one_term_and_a_box() -> None:
    *separable, seventh, eighth = KeySet(analytic("A").centred()).structure
    assert [(key.rank, key.taps) for key in (*separable, eighth)] == [(1, ())] * 7
    assert [key.box == 0 for key in (*separable, eighth)] == [False] * 4 + [True] * 2 + [False]
    assert (seventh.rank, seventh.taps[0][:2], seventh.multiplications) == (2, (3, 3), 43)
    assert seventh.box == pytest.approx(-float(analytic("A").filters[6].mean()), rel=1e-4)


def test_rank_residuals_are_those_of_the_truncated_svd() -> None:
    keys = random(5, 3)
    residuals = keys.rank_residuals()
    for key, row in zip(keys.filters.double().numpy(), residuals, strict=True):
        u, sigma, vt = np.linalg.svd(key)
        for rank in range(1, 6):
            best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
            assert float(row[rank - 1]) == pytest.approx(np.linalg.norm(key - best), abs=1e-12)
    assert float(analytic("B").rank_residuals()[:6, 0].max()) < 1e-7


def test_it_is_computed_once() -> None:
    keys = analytic("A")
    assert keys.structure is keys.structure
