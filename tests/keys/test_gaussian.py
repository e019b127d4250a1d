"""The analytic keys against SciPy's Bessel functions and the published keys."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import ive

from mkf.keys import KeySet, analytic

# (s_x, s_y) of keys 1 to 8, or one s for both, in the layout of the publication.
PUBLISHED_SCALES = """
A  .580,.558 .559,.580 .617,.601 .642,.424 1.075,.800 .771,1.003 .675 .552,.545
B  .644,.583 .586,.644 .690,.674 .756,.460 1.107,.945 .900,.889 .675 .609,.601
C1 .360,.510 .555,.453 .701,.655 .563,.384 1.309,.875 .973,1.171 .654 .637,.587
C2 .458 .448 .671 .420 1.387 1.090 .654 .611
D1 .491,.722 .581,.519 .483,.503 .500,0 1.300,1.004 .984,1.074 .675 .615,.608
D2 .644 .558 .495 .380 1.193 1.038 .675 .612
"""
SCALES = {
    method: [tuple(map(float, (f"{s},{s}" if "," not in s else s).split(","))) for s in scales]
    for method, *scales in map(str.split, PUBLISHED_SCALES.strip().splitlines())
}
METHODS = tuple(SCALES)

# Cosine with the published keys 1 to 8.
COSINES = {
    "A": (0.842, 0.944, 0.914, 0.904, 0.942, 0.944, 0.997, 0.994),
    "B": (0.837, 0.939, 0.910, 0.906, 0.946, 0.954, 0.997, 0.997),
    "D2": (0.837, 0.944, 0.911, 0.884, 0.926, 0.939, 0.997, 0.997),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [3, 7, 11])
def test_keys_follow_the_formulas(method: str, k: int) -> None:
    keys = analytic(method, k)
    for i, (s_x, s_y) in enumerate(SCALES[method]):
        expected = np.array([[formula(i + 1, r, c, s_x, s_y) for c in span(k)] for r in span(k)])
        expected /= np.linalg.norm(expected - expected.mean())
        np.testing.assert_allclose(keys.filters[i], expected, rtol=1e-7, atol=1e-15)


def span(k: int) -> range:
    return range(-(k // 2), k // 2 + 1)


def formula(key: int, r: int, c: int, s_x: float, s_y: float) -> float:
    """One value of one key, r and c counted from the centre, with SciPy's Bessel function."""

    def x(n: int) -> float:
        return float(ive(abs(n), s_x**2))

    def y(n: int) -> float:
        return float(ive(abs(n), s_y**2))

    laplacian = (y(r + 1) - 2 * y(r) + y(r - 1)) * x(c) + y(r) * (x(c + 1) - 2 * x(c) + x(c - 1))
    return (
        (y(r - 1) - y(r)) * x(c),
        y(r) * (x(c - 1) - x(c)),
        (y(r + 1) - y(r)) * x(c),
        y(r) * (x(c + 1) - x(c)),
        y(r) * (x(c + 1) - x(c - 1)) / 2,
        (y(r - 1) - y(r + 1)) / 2 * x(c),
        (r == c == 0) - 0.5256 * laplacian,
        y(r) * x(c),
    )[key - 1]


@pytest.mark.parametrize("method", COSINES)
def test_cosines_with_the_published_keys(method: str, data_dir: Path) -> None:
    published = KeySet.load(data_dir / "keys" / "paper8.txt").centred().double()
    cosines = (analytic(method).centred().double() * published).sum((1, 2))
    np.testing.assert_allclose(cosines, COSINES[method], atol=6e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
def test_all_are_separable_but_the_seventh(method: str, k: int) -> None:
    structure = analytic(method, k).structure
    assert [(key.rank, key.taps) for i, key in enumerate(structure) if i != 6] == [(1, ())] * 7
    seventh = structure[6]
    assert seventh.rank == (2 if k > 3 else 1)  # in 3 x 3 a tap leaves rank 1
    assert [(tap.row, tap.column) for tap in seventh.taps] == [(k // 2, k // 2)]
    assert all(key.residual < 1e-7 for key in structure)


def test_the_tap_of_the_seventh_key_is_its_delta() -> None:
    values = np.array([[formula(7, r, c, 0.675, 0.675) for c in span(7)] for r in span(7)])
    (tap,) = analytic("B").structure[6].taps
    assert tap.weight == pytest.approx(1 / np.linalg.norm(values - values.mean()), rel=1e-5)


def test_keys_of_other_sizes_are_the_same_functions() -> None:
    large, small = analytic("D1", 11).filters.double(), analytic("D1", 7).filters.double()
    cropped = large[:, 2:-2, 2:-2]
    ratio = (cropped * small).sum((1, 2), keepdim=True) / (small * small).sum((1, 2), keepdim=True)
    np.testing.assert_allclose(cropped, ratio * small, atol=1e-7)


def test_the_same_names_and_kinds_as_the_published() -> None:
    keys = analytic("C2")
    assert keys.names == tuple("12345678")
    assert "method C2" in keys.provenance
    assert keys.kinds[6:] == ("difference of Gaussians", "Gaussian")


@pytest.mark.parametrize("method", ["E", "b", "", "A "])
def test_unknown_method(method: str) -> None:
    with pytest.raises(ValueError, match="the methods are A, B, C1, C2, D1, D2"):
        analytic(method)


@pytest.mark.parametrize("k", [1, 4, 13])
def test_bad_kernel_size(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k}x{k}: the kernel size must be"):
        analytic("B", k)
