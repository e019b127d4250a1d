"""Random keys."""

import numpy as np
import pytest
import torch

from mkf.keys import random


def test_same_seed_same_keys_whatever_the_global_state() -> None:
    torch.manual_seed(1)
    first = random(7, 8, seed=3)
    torch.manual_seed(2)
    assert random(k=7, n=8, seed=3) == first
    assert random(7, 8, seed=4) != first
    torch.manual_seed(1)
    undisturbed = torch.rand(1)
    torch.manual_seed(1)
    random()
    assert torch.equal(torch.rand(1), undisturbed)


def test_the_values_themselves() -> None:
    """Another platform or version of torch that draws other numbers is noticed here."""
    expected = [[0.5318, -0.0104, -0.5677], [0.2443, -0.2442, -0.3371], [0.1955, 0.3240, -0.1363]]
    np.testing.assert_allclose(random(3, 1, seed=0).filters[0], expected, atol=6e-5)


def test_centred_unit_white_noise() -> None:
    keys = random(7, 256)
    flat = keys.filters.double().flatten(1)
    assert keys.filters.shape == (256, 7, 7)
    assert flat.mean(1).abs().max() < 1e-8
    assert (flat.norm(dim=1) - 1).abs().max() < 1e-7
    # no tap stands out: each has a share of 1/49 of the energy, and the 256 directions are independent
    assert (flat.square().mean(0) * 49 - 1).abs().max() < 0.5
    cosines = flat @ flat.T - torch.eye(256)
    assert cosines.square().sum() / (256 * 255) == pytest.approx(1 / 48, rel=0.1)


def test_labels() -> None:
    keys = random(5, 2, seed=9)
    assert keys.names == ("random 1", "random 2")
    assert keys.kinds == ("white noise", "white noise")
    assert keys.provenance == "Gaussian white noise, seed 9"


@pytest.mark.parametrize(
    ("k", "n", "message"),
    [
        (4, 8, "4x4: the kernel size"),
        (-3, 8, "the kernel size"),
        (7, 0, "got 0"),
        (7, -1, "got -1"),
        (7, 257, "got 257"),
    ],
)
def test_bad_sizes(k: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random(k, n)
