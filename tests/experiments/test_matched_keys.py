"""The keys of two ways, matched."""

import sys

import numpy as np
import pytest
import torch

import mkf
from mkf.bank import FilterBank, Layer
from mkf.experiments.matched_keys import match_keys
from tests.search.conftest import one_thread  # noqa: F401
from tests.search.planted import plant

PLANTED = mkf.keys.paper8()[[0, 1, 2, 4]]


@pytest.fixture(scope="module")
def found():
    stronger = torch.where(PLANTED.filters < 0, 1.2, 1.0)
    stronger[:3] = 1  # of the last key the negative side is the stronger, so the clusters' key is turned
    filters, _ = plant(mkf.KeySet(PLANTED.filters * stronger), 800, seed=0, shares=[0.25] * 4, noise=0.05)
    return match_keys(FilterBank.from_layers([Layer("l", filters)], "m"), 4, steps=300)


def test_each_key_stands_under_its_partner(found):
    assert set(found.others) == {"autoencoder", "paper8"}
    for name, keys in found.others.items():
        cosines = (found.clusters.centred() * keys.centred()).sum((1, 2)).numpy()
        assert np.allclose(cosines, found.cosines[name], atol=1e-5), "in this order, turned to these signs"
    assert found.cosines["paper8"].min() > 0.98
    paper = mkf.keys.paper8()
    own = paper.centred()[[paper.names.index(name) for name in found.others["paper8"].names]]
    assert ((own * found.others["paper8"].centred()).sum((1, 2)) < 0).any(), "one of them had to be turned"
    assert found.others["paper8"].names != PLANTED.names, "the clusters' order is by share, not the paper's"
    assert set(found.others["paper8"].names) == set(PLANTED.names)
    assert found.cosines["autoencoder"].min() > 0.9


def test_the_lines_and_figures_tell_it(found, tmp_path):
    axis, ours, paper = found.lines()
    assert f"to {found.coder.occupancy:.3f}" in axis
    assert ours.startswith(f"clusters and autoencoder: mean |cos| {found.cosines['autoencoder'].mean():.2f} (")
    assert f"{found.cosines['paper8'][3]:.3f})" in paper
    assert [path.name for path in found.draw(tmp_path)] == ["search_keys.png", "code_axis.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch):
    filters = torch.randn(60, 5, 5, generator=torch.Generator().manual_seed(0))
    bank = FilterBank.from_layers([Layer("l", filters)], "m")
    told = []
    found = match_keys(bank, 2, steps=200, state=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert (4, 4) in told, "restarts of the clusters"
    assert (200, 200) in told, "steps of the autoencoder"
    assert told[-1] not in ((4, 4), (200, 200)), "and candidates judged"
    monkeypatch.setattr(sys.modules["mkf.search.autoencoder"]._Training, "round", None)
    again = match_keys(bank, 2, steps=200, state=tmp_path)
    assert torch.equal(again.others["autoencoder"].filters, found.others["autoencoder"].filters)


def test_other_sizes_are_matched_to_analytic_keys_and_nine_keys_to_none():
    filters = torch.randn(60, 5, 5, generator=torch.Generator().manual_seed(0))
    bank = FilterBank.from_layers([Layer("l", filters)], "m")
    assert list(match_keys(bank, 2, steps=1).others) == ["autoencoder", "analytic B"]
    with pytest.raises(ValueError, match="k=9: there are 8 known keys"):
        match_keys(bank, 9)
