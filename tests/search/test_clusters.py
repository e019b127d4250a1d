"""Clustering finds planted keys, and says what it cannot do."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mkf
from mkf.bank import FilterBank, Layer
from mkf.search import Clustering, clusters
from mkf.search.clusters import _halves, _leading, _moves, _passes, _scatter
from tests.kernels.affine_fit_float64 import line_of_best_key
from tests.search.planted import SHARES, matching, plant

PLANTED = {"paper8": mkf.keys.paper8(), "random": mkf.keys.random(7, 8, seed=3)}


def residuals(filters, keys):
    return line_of_best_key(filters, keys.filters)[2].min(1)


@pytest.mark.parametrize("keys", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("order", [0, 1])
def test_planted_keys_come_back_whatever_their_shares(keys, order):
    """Keys 7 and 8 of the paper correlate .90, and as the rarest two they share a cluster in most local minima."""
    shares = list(SHARES)
    if order:
        random.Random(order).shuffle(shares)
    filters, index = plant(keys, 10_000, shares=shares, seed=order)
    found = clusters(filters, 8, seed=order)
    assert matching(found.keys, keys).min() > 0.999
    true_shares = np.sort(np.bincount(index, minlength=8) / len(index))[::-1]
    np.testing.assert_allclose(found.share, true_shares, atol=3e-3)


def test_the_result_is_what_it_says():
    filters, _ = plant(PLANTED["random"], 3000)
    filters[7] = 2
    filters[8, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left out 1"):
        found = clusters(filters, 5, seed=1)
    live = torch.cat([filters[:7], filters[9:]])
    r = residuals(live, found.keys)
    assert found.inertia == pytest.approx((r**2).mean(), rel=1e-5)
    assert (found.filters, found.dead, found.not_finite) == (2998, 1, 1)
    assert found.history[-1] == found.inertia == min(found.history)
    assert min(found.restarts) >= found.inertia * (1 - 1e-6)
    assert len(found.restarts) == 4
    assert found.share.sum() == pytest.approx(1)
    assert (np.diff(found.share) <= 0).all()
    assert (found.keys.filters.flatten(1).amax(1) == found.keys.filters.flatten(1).abs().amax(1)).all()
    assert "k=5, seed=1, of 2,998 filters" in found.keys.provenance


def test_same_seed_same_keys_and_other_seeds_agree_on_a_clear_bank():
    filters, _ = plant(PLANTED["random"], 4000)
    first = clusters(filters, 8, seed=0)
    assert first.keys == clusters(filters, 8, seed=0).keys
    assert matching(clusters(filters, 8, seed=1).keys, first.keys).min() > 0.9999


def test_signs_scales_and_shifts_do_not_matter():
    filters, _ = plant(PLANTED["random"], 3000)
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3000, 1, 1, generator=rng) * 10).unbind()
    changed = clusters(a * filters + b, 8)
    assert matching(changed.keys, clusters(filters, 8).keys).min() > 0.99999


def test_more_filters_than_the_sample_are_streamed_from_disk(tmp_path):
    filters, _ = plant(PLANTED["paper8"], 12_000)
    FilterBank.from_layers([Layer("a", filters)], "m").save(tmp_path / "bank")
    bank = FilterBank.open(tmp_path / "bank")
    found = clusters(bank, 8, sample=4000, restarts=2)
    assert found.filters == 12_000
    assert matching(found.keys, PLANTED["paper8"]).min() > 0.999
    everything = clusters(filters, 8, restarts=2)
    assert found.inertia == pytest.approx(everything.inertia, rel=1e-4)
    assert clusters(bank, 8, sample=4000, restarts=2).keys == found.keys


def test_one_key_is_the_leading_eigenvector():
    filters, _ = plant(PLANTED["random"], 500)
    x = filters.flatten(1).double()
    x = x - x.mean(1, keepdim=True)
    x = x / x.norm(dim=1, keepdim=True)
    leading = np.linalg.eigh((x.T @ x).numpy())[1][:, -1]
    found = clusters(filters, 1).keys.filters[0].flatten().double().numpy()
    assert abs(found @ leading) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("k", [3, 11])
def test_other_kernel_sizes(k):
    filters, _ = plant(mkf.keys.random(k, 4, seed=1), 2000, shares=[0.25] * 4, noise=0.1)
    assert matching(clusters(filters, 4).keys, mkf.keys.random(k, 4, seed=1)).min() > 0.999


def test_exact_copies():
    keys = PLANTED["random"]
    filters, _ = plant(keys, 400, noise=0.0, shares=[1 / 8] * 8)
    found = clusters(filters, 8)
    assert found.inertia < 1e-10
    assert matching(found.keys, keys).min() > 0.999999
    with pytest.raises(ValueError, match="linear shifts of only 8 different ones: there are no 9 keys"):
        clusters(filters, 9)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 1000))
def test_it_never_does_worse_than_its_best_restart(count, k, seed):
    filters = torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(seed))
    if k > count:
        with pytest.raises(ValueError, match="need at least as many"):
            clusters(filters, k, seed)
        return
    found = clusters(filters, k, seed)
    assert len(found.keys) == k
    assert found.inertia <= min(found.restarts) * (1 + 1e-4) + 1e-7
    assert found.inertia == pytest.approx((residuals(filters, found.keys) ** 2).mean(), rel=1e-4, abs=1e-7)


def test_a_pass_gives_the_scatter_of_each_cluster():
    filters, _ = plant(PLANTED["random"], 300)
    x = mkf.search.sample.unit(filters).filters
    keys = PLANTED["random"].centred()[:3]
    scatter, count, mean, worst = _scatter([x[:100], x[100:]], keys, None)
    cosines = (x.flatten(1).double() @ keys.flatten(1).double().T).numpy()
    index = np.abs(cosines).argmax(1)
    left = 1 - np.abs(cosines).max(1) ** 2
    for j in range(3):
        members = x.flatten(1)[index == j].double().numpy()
        np.testing.assert_allclose(scatter[j], members.T @ members, atol=1e-4)
        assert count[j] == len(members)
        assert (
            abs(_leading(scatter, keys.shape)[j].flatten().double().numpy() @ np.linalg.svd(members)[2][0]) > 1 - 1e-6
        )
    assert mean == pytest.approx(left.mean(), rel=1e-5)
    assert torch.equal(worst, x[left.argmax()])


def test_a_key_without_filters_becomes_the_filter_that_is_fitted_worst():
    x = mkf.search.sample.unit(plant(PLANTED["random"], 300)[0]).filters
    keys = PLANTED["random"].centred()[[0, 1, 1, 2]]  # of two alike the first gets all
    _, count, _, worst = _scatter([x], keys, None)
    assert (count == 0).tolist() == [False, False, True, False]
    moved, history = _passes([x], keys, 2, 0.0, None)
    assert torch.equal(moved[2], worst)
    assert history[1] < history[0]


def test_a_cluster_of_two_similar_keys_is_split_between_them():
    q = mkf.keys.paper8().centred()[6:8]
    x = mkf.search.sample.unit(plant(mkf.keys.paper8()[[6, 7]], 2000, shares=[0.5, 0.5])[0]).filters
    both = q.mean(0, keepdim=True) / q.mean(0).norm()
    (halves,) = _halves(_scatter([x], both, None)[0])
    cosines = (halves @ q.flatten(1).T).abs()
    assert max(cosines.diagonal().min(), cosines.fliplr().diagonal().min()) > 0.99


def test_moves_change_one_key_and_keep_the_number():
    filters, _ = plant(PLANTED["random"], 500)
    x = mkf.search.sample.unit(filters).filters
    keys = PLANTED["random"].centred()
    for moved in _moves(x, keys, np.random.default_rng(0), None):
        assert moved.shape == keys.shape
        kept = (moved.flatten(1) @ keys.flatten(1).T > 0.999999).any(0).sum()
        assert kept in (6, 7)  # a swap keeps all but one, a split all but two


def test_what_is_refused():
    filters = torch.randn(20, 7, 7, generator=torch.Generator().manual_seed(0))
    for k in (0, -1, 257):
        with pytest.raises(ValueError, match="ask for 1 to 256 keys"):
            clusters(filters, k)
    with pytest.raises(ValueError, match="21 keys need at least as many filters"):
        clusters(filters, 21)
    with pytest.raises(ValueError, match="need at least as many filters that vary"):
        clusters(torch.ones(20, 7, 7), 8)
    alike = filters[:1] * torch.arange(1, 21)[:, None, None] - 3
    with pytest.raises(ValueError, match="linear shifts of only 1 different"):
        clusters(alike, 2)
    assert isinstance(clusters(alike, 1), Clustering)
    with pytest.raises(ValueError, match="restarts=0"):
        clusters(filters, 2, restarts=0)
    with pytest.raises(ValueError, match="shape"):
        clusters(torch.randn(20, 1, 1), 2)


def test_real_filters(data_dir):
    bank = FilterBank.from_checkpoint(data_dir / "filters" / "trained_k7.safetensors")
    found = clusters(bank, 8)
    fit = mkf.affine_fit(bank, found.keys)
    paper = mkf.affine_fit(bank, mkf.keys.paper8())
    assert float(fit.residual.mean()) < 0.8 * float(paper.residual.mean())
