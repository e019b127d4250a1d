"""The keys as printed against the authors' six decimals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mkf.keys import KeySet, paper8

# Relative residual of the published keys after their best approximation of rank 1, 2, 3, 4.
RANK_RESIDUALS = [
    [0.164, 0.052, 0.018, 0.009],
    [0.150, 0.058, 0.029, 0.015],
    [0.135, 0.032, 0.018, 0.005],
    [0.110, 0.063, 0.032, 0.020],
    [0.129, 0.053, 0.036, 0.016],
    [0.142, 0.080, 0.040, 0.024],
    [0.126, 0.022, 0.009, 0.005],
    [0.227, 0.023, 0.008, 0.005],
]


@pytest.fixture(scope="module")
def six_decimals(data_dir: Path) -> KeySet:
    return KeySet.load(data_dir / "keys" / "paper8.txt")


def test_agrees_with_the_six_decimals(six_decimals: KeySet) -> None:
    cosines = (paper8().centred().double() * six_decimals.centred().double()).sum((1, 2))
    assert cosines.min() > 0.9997
    assert (paper8().filters - six_decimals.filters).abs().max() < 0.0075  # half a digit, and the scaling


def test_is_centred_and_of_norm_one() -> None:
    keys = paper8().filters.double()
    assert keys.shape == (8, 7, 7)
    assert keys.mean((1, 2)).abs().max() < 1e-8
    assert (torch.linalg.vector_norm(keys, dim=(1, 2)) - 1).abs().max() < 1e-7
    torch.testing.assert_close(paper8().centred(), paper8().filters, rtol=0, atol=1e-7)


def test_kinds_tell_where_the_positive_lobe_is() -> None:
    """Independently of the order of the keys: the largest tap, as (row, column) from the centre, and the words."""
    where = {"below": (1, 0), "right": (0, 1), "above": (-1, 0), "left": (0, -1)}
    keys = paper8()
    assert keys.names == ("1", "2", "3", "4", "5", "6", "7", "8")
    for key, kind in zip(keys.filters.numpy(), keys.kinds, strict=True):
        peak = tuple(int(i) - 3 for i in np.unravel_index(key.argmax(), key.shape))
        assert peak == where.get(kind.split()[-1], (0, 0)), kind
        # a central difference is odd about the centre, a one-sided one is not
        flipped = float((key * key[::-1, ::-1]).sum())
        assert (flipped < -0.9) == kind.startswith("central")


def test_rank_residuals_of_the_six_decimals(six_decimals: KeySet) -> None:
    residuals = six_decimals.rank_residuals()
    assert residuals.shape == (8, 7)
    np.testing.assert_allclose(residuals[:, :4], RANK_RESIDUALS, atol=6e-4)
    assert (residuals.diff(dim=1) <= 0).all()
    assert (residuals[:, -1] == 0).all()


def test_has_no_structure(six_decimals: KeySet) -> None:
    assert [key.rank for key in six_decimals.structure] == [7] * 8
    # two decimals make rows of key 8 equal, which does not make it cheaper
    for key in (*six_decimals.structure, *paper8().structure):
        assert (key.taps, key.multiplications) == ((), 49)
        assert key.residual < 1e-12


def test_says_where_it_comes_from() -> None:
    assert "Figure 9" in paper8().provenance
