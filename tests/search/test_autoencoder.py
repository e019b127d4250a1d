"""The autoencoder learns, repeats itself, resumes, and says what it cannot do."""

import sys

import numpy as np
import pytest
import torch

import mkf
from mkf.search import Residual, autoencoder, eliminate
from mkf.search.autoencoder import _cosine_loss, _haar, _Network, _unevenness
from tests.search.planted import plant

KEYS = mkf.keys.paper8()[[0, 4, 5, 7]]


@pytest.fixture(scope="module")
def filters():
    return plant(KEYS, 1500, shares=[0.25] * 4)[0]


@pytest.fixture(scope="module")
def coder(filters):
    torch.set_num_threads(1)
    return autoencoder(filters, steps=600, batch_size=64, patience=100)


def test_planted_keys_are_among_its_candidates(coder, filters):
    candidates = coder.candidates(50)
    assert candidates.names == tuple(f"{i / 50:.6g}" for i in range(1, 51))
    cosines = (candidates.centred().flatten(1) @ KEYS.centred().flatten(1).T).abs().amax(0)
    assert cosines.min() > 0.9
    four = eliminate(candidates, 4, Residual(filters)).keys
    assert (four.centred().flatten(1) @ KEYS.centred().flatten(1).T).abs().amax(0).min() > 0.9
    told = f"autoencoder with a 1-D code, seed 0, step {coder.best.step} as the best of 600, of 1,500 7x7 filters"
    assert told in four.provenance


def test_loss_falls_and_codes_are_used_evenly(coder, filters):
    assert [entry.step for entry in coder.history] == list(range(100, 601, 100))
    assert coder.history[-1].held_out < 0.07  # noise alone leaves .04
    assert coder.history[-1].train < 0.2 < coder.history[0].train
    assert coder.histogram.sum() == coder.filters == 1500
    assert coder.occupancy > 0.8
    shares = coder.histogram[coder.histogram > 0] / 1500
    assert coder.occupancy == pytest.approx(-(shares * np.log(shares)).sum() / np.log(50))
    codes = coder.encode(filters)
    assert np.array_equal(np.histogram(codes.numpy(), 50, (0, 1))[0], coder.histogram)


def test_without_evenness_codes_crowd(filters, coder):
    crowded = autoencoder(filters, steps=600, batch_size=64, patience=100, evenness=0)
    assert crowded.occupancy < coder.occupancy - 0.05


def test_codes_do_not_depend_on_sign_scale_and_shift(coder, filters):
    x = filters[:20].clone()
    codes = coder.encode(x)
    torch.testing.assert_close(coder.encode(-3 * x + 2), codes, atol=1e-4, rtol=0)
    x[3], x[4, 0, 0] = 1, torch.nan
    assert coder.encode(x).isnan().nonzero().flatten().tolist() == [3, 4]
    decoded = coder.decode(codes).flatten(1)
    assert decoded.mean(1).abs().max() < 1e-6
    assert (decoded.norm(dim=1) - 1).abs().max() < 1e-6
    assert (decoded.amax(1) == decoded.abs().amax(1)).all()
    x = filters[:200]
    units = mkf.search.sample.unit(x).filters.flatten(1)
    loss = 1 - (coder.decode(coder.encode(x)).flatten(1) * units).sum(1).abs().mean()
    assert float(loss) == pytest.approx(coder.best.held_out, abs=0.1)


def test_neighbours(coder):
    some = coder.candidates(50)[[0, 9, 49]]
    around = coder.around(some)
    expected = "0.012 0.016 0.02 0.024 0.028 0.192 0.196 0.2 0.204 0.208 0.992 0.996 1"
    assert around.names == tuple(expected.split())
    torch.testing.assert_close(around.filters[7], some.filters[1])
    assert coder.around(some[:1], n=1, spacing=0.01).names == ("0.02", "0.03")
    assert coder.around(some[:1], n=0).names == ("0.02",)
    with pytest.raises(ValueError, match="names are no codes"):
        coder.around(mkf.KeySet(some.filters, ["a", "b", "c"]))
    with pytest.raises(ValueError, match="1 to 256"):
        coder.around(coder.candidates(100), n=4)
    for n in (0, 257):
        with pytest.raises(ValueError, match="1 to 256"):
            coder.candidates(n)
    assert len(coder.candidates(1)) == 1
    with pytest.raises(ValueError, match="trained on 7x7"):
        coder.encode(torch.randn(3, 5, 5))


def test_the_seed_decides(filters):
    def run(seed):
        return autoencoder(filters, seed=seed, steps=30, batch_size=32).candidates(8)

    before = torch.get_rng_state()
    assert run(1) == run(1)
    assert not torch.equal(run(1).filters, run(2).filters)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("k", [3, 7])
def test_torchs_default_dtype_does_not_matter(k):
    filters, _ = plant(mkf.keys.analytic("B", k), 100)

    def run():
        coder = autoencoder(filters, steps=30, batch_size=32)
        return coder.candidates(8), coder.history, coder.encode(filters).tolist()

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        assert run() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_interrupted_it_ends_as_if_it_had_not_been(filters, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mkf.search.autoencoder"], "ROUND", 10)
    whole = autoencoder(filters, steps=45, batch_size=32)
    state = tmp_path / "state.pt"

    def stop(done, steps):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autoencoder(filters, steps=45, batch_size=32, state=state, progress=stop)
    seen = []
    resumed = autoencoder(filters, steps=45, batch_size=32, state=state, progress=lambda *done: seen.append(done))
    assert seen == [(30, 45), (40, 45), (45, 45), (45, 45)]
    assert resumed.history == whole.history
    assert resumed.candidates(9) == whole.candidates(9)
    assert autoencoder(filters, steps=45, batch_size=32, state=state).candidates(9) == whole.candidates(9)
    with pytest.raises(ValueError, match=r"another training \(seed differ\)"):
        autoencoder(filters, steps=45, batch_size=32, state=state, seed=1)
    with pytest.raises(ValueError, match=r"another training \(filters differ\)"):
        autoencoder(filters[1:], steps=45, batch_size=32, state=state)
    complete = state.read_bytes()
    for size in (0, *range(1000, len(complete), 20_000)):  # to torch some of them are OSErrors
        state.write_bytes(complete[:size])
        with pytest.raises(ValueError, match=r"is damaged or no training's state"):
            autoencoder(filters, steps=45, batch_size=32, state=state)


def test_it_stops_early_with_the_best_weights(filters, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["mkf.search.autoencoder"], "ROUND", 5)
    state, weights = tmp_path / "state.pt", {}

    def remember(step, _):
        weights.setdefault(step, torch.load(state)["network"])

    few = autoencoder(filters[:30], steps=2000, batch_size=32, patience=3, state=state, progress=remember)
    losses = [entry.held_out + entry.unevenness for entry in few.history]
    assert len(losses) < 400
    assert min(losses) == losses[-4]
    assert all(loss >= losses[-4] for loss in losses[-3:])
    assert few.best == few.history[-4]
    assert f"step {few.best.step} as the best of {few.history[-1].step}" in few.provenance
    best, last = (weights[entry.step] for entry in (few.best, few.history[-1]))
    own = few._network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in best.items())
    assert not all(torch.equal(own[name], value) for name, value in last.items())


def test_3x3_filters_are_seen_through_haar_wavelets():
    basis = _haar(3)
    assert basis.shape == (9, 16)
    for window in basis.T.view(4, 4, 9):
        torch.testing.assert_close(window @ window.T, torch.eye(4))
    assert _Network(3).encoder[0].in_features == 25
    assert _Network(5).encoder[0].in_features == 25
    assert _Network(7).encoder[0].in_features == 49
    keys = mkf.keys.analytic("B", 3)[[0, 3, 4, 7]]
    small, _ = plant(keys, 1000, noise=0.1, shares=[0.25] * 4)
    coder = autoencoder(small, steps=400, batch_size=64, patience=100)
    assert coder.candidates(10).kernel_size == 3
    assert coder.history[-1].held_out < 0.2


def test_losses():
    x = torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(0))
    assert float(_cosine_loss(x, -2 * x)) == pytest.approx(0, abs=1e-6)
    y = torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(1))
    u, v = x.flatten(1).double().numpy(), y.flatten(1).double().numpy()
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    assert float(_cosine_loss(x, y)) == pytest.approx(1 - np.abs(cosines).mean(), rel=1e-5)
    assert float(_unevenness((torch.randperm(100) + 0.5) / 100)) < 1e-12
    assert float(_unevenness(torch.full((1000,), 0.5))) == pytest.approx(1, rel=1e-3)
    assert float(_unevenness(torch.zeros(1000))) == pytest.approx(4, rel=1e-3)


def test_what_is_refused(filters):
    with pytest.raises(ValueError, match="shifts of a single one"):
        autoencoder(filters[:1] * torch.randn(50, 1, 1) + torch.randn(50, 1, 1))
    with pytest.raises(ValueError, match="2 keys need at least"):
        autoencoder(torch.ones(10, 7, 7))
    for wrong in ({"steps": 0}, {"batch_size": 1}, {"patience": 0}, {"evenness": -1}, {"evenness": torch.nan}):
        with pytest.raises(ValueError, match="use at least"):
            autoencoder(filters, **wrong)
    broken = filters[:100].clone()
    broken[5, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match="left out 1"):
        assert autoencoder(broken, steps=2, batch_size=8).filters == 99
    assert len(autoencoder(filters[:2], steps=2, batch_size=2).candidates(3)) == 3
