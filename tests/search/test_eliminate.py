"""Greedy elimination against its definition; killed and resumed; what it refuses."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import mkf
from mkf.search import Accuracy, OutputError, Residual, elbow, eliminate
from tests.kernels.affine_fit_float64 import line_of_best_key
from tests.search.networks import images, learnable, network
from tests.search.planted import SHARES, plant

ROOT = Path(__file__).parent.parent.parent


def with_distractors(keys, seed=0):
    """50 candidates in random order: the keys, as they are named; 26 noisy copies of them; 16 of white noise."""
    rng = torch.Generator().manual_seed(seed)
    q = keys.centred()
    near = q.repeat(4, 1, 1)[:26]
    noise = torch.randn(near.shape, generator=rng)
    near = near + 0.3 * noise / noise.flatten(1).norm(dim=1)[:, None, None]
    filters = torch.cat([q, near, torch.randn(16, 7, 7, generator=rng)])
    order = torch.randperm(50, generator=rng).tolist()
    names = [*keys.names, *(f"distractor {i}" for i in range(42))]
    return mkf.KeySet(filters[order], [names[i] for i in order])


@pytest.mark.parametrize("keys", [mkf.keys.paper8(), mkf.keys.random(7, 8, seed=3)], ids=["paper8", "random"])
def test_of_50_candidates_exactly_the_planted_eight_stay(keys):
    filters, _ = plant(keys, 20_000, shares=SHARES[::-1])
    found = eliminate(with_distractors(keys), 8, Residual(filters))
    assert set(found.keys.names) == set(keys.names)
    losses = [step.loss for step in found.curve]
    assert [step.keys for step in found.curve] == list(range(50, 0, -1))
    assert max(losses[:43]) < 0.082
    assert losses[43] > losses[42] + 0.001
    assert found.elbow in (6, 7, 8)


def greedy(filters, candidates):
    """Names in the order in which they go, by the definition, in float64."""
    r = line_of_best_key(filters, candidates.filters)[2] ** 2
    left, gone, losses = list(range(len(candidates))), [], [r.min(1).mean()]
    while len(left) > 1:
        loss, key = min((r[:, [i for i in left if i != j]].min(1).mean(), j) for j in left)
        left.remove(key)
        gone.append(candidates.names[key])
        losses.append(loss)
    return gone, losses


def test_against_the_definition():
    filters = torch.randn(150, 5, 5, generator=torch.Generator().manual_seed(0))
    candidates = mkf.keys.random(5, 12, seed=2)
    found = eliminate(candidates, 3, Residual(filters))
    gone, losses = greedy(filters, candidates)
    assert [step.removed for step in found.curve] == [None, *gone]
    assert [step.loss for step in found.curve] == pytest.approx(losses, rel=1e-5)
    assert set(found.keys.names) == set(candidates.names) - set(gone[:9])
    assert found.at(12).names == candidates.names
    assert found.at(3) == found.keys
    assert set(found.at(1).names) == set(candidates.names) - set(gone)
    assert "from 12 candidates to 3 by mean squared residual of 150 5x5 filters" in found.keys.provenance
    assert "white noise, seed 2" in found.keys.provenance
    for i, name in enumerate(found.keys.names):
        assert torch.equal(found.keys.filters[i], candidates.filters[candidates.names.index(name)])
    with pytest.raises(ValueError, match="there were 12"):
        found.at(13)


def test_k_of_none_is_the_elbow():
    keys = mkf.keys.random(7, 4, seed=3)
    filters, _ = plant(keys, 2000, shares=[0.25] * 4)
    found = eliminate(
        mkf.KeySet(torch.cat([keys.filters, mkf.keys.random(7, 26, seed=4).filters])), None, Residual(filters)
    )
    assert found.elbow == len(found.keys) == 4


def test_elbow():
    assert elbow({n: max(0.0, 8 - n) for n in range(1, 51)}) == 8
    assert elbow({n: 1 / n for n in range(1, 50)}) == 7
    assert elbow(dict.fromkeys(range(1, 10), 0.5)) == 1
    assert elbow({1: 0.3}) == 1
    assert elbow({1: 0.2, 2: 0.3}) == 1


def test_killed_ten_times_it_ends_with_the_same_keys(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.search.killed", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{name} 10 True" for name in ("by_residual", "by_accuracy", "by_autoencoder")]


def test_resumption_does_not_begin_anew(tmp_path):
    model = network()
    state = tmp_path / "new folder" / "state.json"
    candidates = mkf.keys.random(7, 8, seed=5)
    objective = Accuracy(model, list(learnable(model, 8)), split="train")
    whole = eliminate(candidates, 3, objective)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eliminate(candidates, 3, objective, state=state, progress=stop)
    content = json.loads(state.read_text())
    assert len(content["removed"]) == 2  # 8 + 7 of 20 were judged in whole steps
    assert seen[-1] == (20, 35)
    again = []
    resumed = eliminate(candidates, 3, objective, state=state, progress=lambda done, total: again.append(done))
    assert again == list(range(16, 36))
    assert resumed.keys == whole.keys
    assert resumed.curve == whole.curve
    again.clear()
    assert eliminate(
        candidates, 2, objective, state=state, progress=lambda done, _: again.append(done)
    ).keys == whole.at(2)
    assert again == []


def test_a_state_of_another_search_or_a_damaged_one_is_refused(tmp_path):
    filters = torch.randn(50, 5, 5, generator=torch.Generator().manual_seed(0))
    candidates = mkf.keys.random(5, 6)
    state = tmp_path / "state.json"
    eliminate(candidates, 2, Residual(filters), state=state)
    with pytest.raises(ValueError, match=r"another search \(candidates, names differ\)"):
        eliminate(mkf.keys.random(5, 7), 2, Residual(filters), state=state)
    with pytest.raises(ValueError, match=r"another search \(judged differ\)"):
        eliminate(candidates, 2, Residual(filters + torch.arange(25.0).view(5, 5)), state=state)
    model, other = network(), tmp_path / "other.json"
    seven, x = mkf.keys.random(7, 3), images(8)
    eliminate(seven, 2, OutputError(model, [x], split="train"), state=other)
    model[3] = torch.nn.Sigmoid()  # the same weights put out something else
    with pytest.raises(ValueError, match="resume it with the same filters, network and images"):
        eliminate(seven, 2, OutputError(model, [x], split="train"), state=other)
    with pytest.raises(ValueError, match="this is a folder; name a file"):
        eliminate(candidates, 2, Residual(filters), state=tmp_path)
    for damage in ("", "{}", "[]", state.read_text()[:-20]):
        state.write_text(damage)
        with pytest.raises(ValueError, match="damaged"):
            eliminate(candidates, 2, Residual(filters), state=state)


@pytest.mark.parametrize("kind", [Accuracy, OutputError])
def test_a_state_is_of_these_images_in_whatever_order(tmp_path, kind):
    model, state = network(), tmp_path / "state.json"
    x, labels = learnable(model, 8).dataset.tensors
    keys = mkf.keys.random(7, 3)

    def search(x, labels, size=8):
        batches = list(zip(x.split(size), labels.split(size), strict=True))
        return eliminate(keys, 2, kind(model, batches, split="train"), state=state).curve

    search(x, labels)
    search(x.flip(0), labels.flip(0), size=3)
    for other in (x * (1 + 1e-6), x[:7], torch.cat([x, x[:1]])):
        with pytest.raises(ValueError, match=r"another search \(judged differ\)"):
            search(other, labels[torch.arange(len(other)) % 8])
    labelled = (
        pytest.raises(ValueError, match=r"another search \(judged differ\)") if kind is Accuracy else nullcontext()
    )
    with labelled:
        search(x, labels + 9)


def test_what_is_refused():
    filters = torch.randn(50, 7, 7, generator=torch.Generator().manual_seed(0))
    candidates = mkf.keys.random(7, 6)
    for k in (0, -1, 7):
        with pytest.raises(ValueError, match="there are 6 candidates, so ask for 1 to 6"):
            eliminate(candidates, k, Residual(filters))
    for objective in (None, "residual"):
        with pytest.raises(ValueError, match=r"objective=mkf.search.Residual\(filters\)"):
            eliminate(candidates, 2, objective)
    with pytest.raises(ValueError, match="filters are 5x5 but keys are 7x7"):
        eliminate(candidates, 2, Residual(torch.randn(50, 5, 5)))
    with pytest.raises(ValueError, match="there are 0"):
        Residual(torch.ones(50, 7, 7))
    by_tensor, by_set = (eliminate(given, 2, Residual(filters)).keys for given in (candidates.filters, candidates))
    assert torch.equal(by_tensor.filters, by_set.filters)
    assert len(eliminate(candidates[:1], 1, Residual(filters)).keys) == 1
