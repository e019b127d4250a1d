"""PCA, and the comparison on held-out models."""

import numpy as np
import pytest
import torch

import mkf
from mkf.bank import FilterBank, Layer
from mkf.search import METHODS, clusters, compare, pca
from tests.kernels.affine_fit_float64 import line_of_best_key
from tests.search.planted import plant

SIZES = {"a": 120, "b": 60, "c": 50, "d": 7, "d-untrained": 40}


@pytest.fixture(scope="module")
def bank():
    banks = []
    for seed, (name, count) in enumerate(SIZES.items()):
        filters, _ = plant(mkf.keys.random(5, 3, seed=1), count, seed=seed, shares=[0.5, 0.3, 0.2])
        filters[2] = 1
        banks.append(FilterBank.from_layers([Layer("l", filters)], name))
    return FilterBank.concat(banks)


def test_pca_against_numpy():
    filters = torch.randn(300, 5, 5, generator=torch.Generator().manual_seed(0)).cumsum(1)
    filters[4] = 0
    x = filters.double().flatten(1).numpy()
    x = x - x.mean(1, keepdims=True)
    x = np.delete(x, 4, 0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    components = np.linalg.svd(x)[2][:6]
    found = pca(filters, 6).centred().flatten(1).double().numpy()
    np.testing.assert_allclose(np.abs((found * components).sum(1)), 1, atol=1e-5)
    with pytest.raises(ValueError, match="span 24 dimensions"):
        pca(filters, 25)
    with pytest.raises(ValueError, match="3 filters that vary span 3"):
        pca(filters[:3], 4)
    with pytest.raises(ValueError, match="0 filters that vary span 0"):
        pca(torch.ones(3, 5, 5), 1)
    with pytest.raises(ValueError, match="1 to 256"):
        pca(filters, 0)


def test_every_filter_is_fitted_to_keys_found_without_its_model(bank):
    seen = []

    def search(train, k, seed):
        seen.append((train.models, seed))
        return clusters(train, k, seed).keys

    def chance(train, k, seed):
        return mkf.keys.random(5, k, seed)

    given = mkf.keys.random(5, 3, seed=9)
    result = compare(bank, 3, keys={"given": given}, methods={"own": search, "chance": chance}, seeds=(3, 4), folds=3)
    assert [set(fold) for fold in result.folds] == [{"a"}, {"b"}, {"c", "d"}]
    assert result.filters == {"a": 119, "b": 59, "c": 49, "d": 6}
    assert [seed for _, seed in seen] == [3, 4] * 3
    for fold, (models, _) in zip(result.folds, seen[::2], strict=True):
        assert set(models) == {"a", "b", "c", "d"} - set(fold)

    rows = {row.method: row for row in result.rows}
    live = {m: np.delete(bank.select(model=m).filters.numpy(), 2, 0) for m in result.filters}
    everything = np.concatenate(list(live.values()))
    assert rows["given"].residual == pytest.approx(
        line_of_best_key(everything, given.filters)[2].min(1).mean(), abs=1e-6
    )
    assert np.isnan(rows["given"].spread)
    means = []
    for seed in (3, 4):
        residuals = []
        for fold in result.folds:
            train = FilterBank.concat(bank.select(model=m) for m in "abcd" if m not in fold)
            keys = clusters(train, 3, seed).keys
            residuals += [line_of_best_key(live[m], keys.filters)[2].min(1) for m in fold]
        means.append(np.concatenate(residuals).mean())
    assert rows["own"].residual == pytest.approx(np.mean(means), abs=1e-6)
    assert rows["own"].spread == pytest.approx(np.std(means, ddof=1), abs=1e-6)
    by_chance = [line_of_best_key(everything, chance(None, 3, seed).filters)[2].min(1).mean() for seed in (3, 4)]
    assert rows["chance"].spread == pytest.approx(np.std(by_chance, ddof=1), abs=1e-6)
    assert np.std(by_chance) > 1e-4  # a spread that can be told from another
    assert rows["own"].residual < 0.35 < rows["given"].residual
    assert result.rows[0].method == "own"
    table = result.markdown().splitlines()
    assert table[0] == "| K = 3 | all held-out filters | a | b | c | d |"
    assert table[2] == "| filters | 233 | 119 | 59 | 49 | 6 |"
    assert len({line.count("|") for line in table}) == 1
    assert "nan" not in result.markdown()


def test_the_plain_methods_run(bank):
    plain = {name: METHODS[name] for name in ("clusters", "PCA", "random")}
    done = []
    result = compare(bank, 3, methods=plain, seeds=[0], folds=2, progress=lambda *x: done.append(x))
    assert [row.method for row in result.rows] == ["clusters", "PCA", "random"]
    assert done == [(i, 6) for i in range(1, 7)]


def test_what_is_refused(bank):
    with pytest.raises(ValueError, match="1 trained models"):
        compare(bank.select(model=["a", "d-untrained"]), 3)
    with pytest.raises(ValueError, match="0 seeds"):
        compare(bank, 3, seeds=())
    with pytest.raises(ValueError, match="folds=1"):
        compare(bank, 3, folds=1)
    with pytest.raises(ValueError, match="1 to 256"):
        compare(bank, 0)
