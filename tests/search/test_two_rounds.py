"""Two rounds refuse up front what the second could not begin with."""

import numpy as np
import pytest

from mkf.search import Residual, autoencoder, two_rounds
from mkf.search.autoencoder import with_neighbours
from mkf.search.two_rounds import check_rounds
from tests.search.planted import plant
from tests.search.test_autoencoder import KEYS


def test_too_many_keys_are_refused_before_the_first_round():
    filters = plant(KEYS, 200, shares=[0.25] * 4)[0]
    coder = autoencoder(filters, steps=10, batch_size=32)

    def progress(done, total):
        pytest.fail("a round has begun")

    for k, candidates, said in (
        (60, 60, r"second round would have up to 298 candidates, and 256 are the most: ask for 1 to 51 keys"),
        (9, 8, "there are 8 candidates"),
        (0, 8, "ask for 1 to 8 keys"),
        (8, 257, "1 to 256"),
    ):
        with pytest.raises(ValueError, match=said):
            two_rounds(coder, k, Residual(filters), candidates=candidates, progress=progress)


@pytest.mark.parametrize("candidates", [1, 8, 50, 51, 60, 125, 200, 250, 256])
def test_what_is_let_through_always_fits(candidates):
    rng = np.random.default_rng(0)
    codes = [float(f"{i / candidates:.6g}") for i in range(1, candidates + 1)]
    for k in range(1, candidates + 1):
        try:
            check_rounds(k, candidates)
        except ValueError:
            assert k > 51
            continue
        best = min(max(k, 10), candidates)
        for chosen in (codes[:best], codes[-best:], rng.choice(codes, best, replace=False)):
            assert len(with_neighbours(chosen)) <= 256
