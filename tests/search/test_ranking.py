"""Dropping keys one at a time gives what looking at all filters anew would."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkf.search.ranking import Ranking


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 1000))
def test_against_brute_force(count, candidates, seed):
    rng = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(candidates, generator=rng) for _ in range(count)] or [torch.zeros(0)])
    order = order.reshape(count, candidates).to(torch.uint8)
    cost = torch.rand(count, candidates, generator=rng)
    ranking = Ranking(order, cost)
    kept = list(range(candidates))

    def best(left):
        """Rank of the first of `left` with each filter."""
        return [next(r for r in range(candidates) if int(row[r]) in left) for row in order]

    def total(left):
        return sum(float(cost[i, r]) for i, r in enumerate(best(left)))

    for key in torch.randperm(candidates, generator=rng).tolist()[:-1]:
        assert ranking.kept == kept
        assert ranking.first.tolist() == best(kept)
        assert ranking.index.tolist() == [int(order[i, r]) for i, r in enumerate(best(kept))]
        assert abs(ranking.total() - total(kept)) < 1e-5
        without = ranking.totals_without()
        for j in range(candidates):
            if j in kept:
                assert abs(float(without[j]) - total([i for i in kept if i != j])) < 1e-5
            else:
                assert without[j] == float("inf")
        ranking.drop(key)
        kept.remove(key)
    assert ranking.kept == kept
    assert ranking.first.tolist() == best(kept)
    assert (ranking.totals_without() == float("inf")).all()


def test_256_candidates_fit_a_byte():
    order = torch.arange(255, -1, -1).to(torch.uint8)[None]
    ranking = Ranking(order, torch.arange(256.0)[None])
    for key in range(255, 0, -1):
        assert ranking.index.tolist() == [key]
        ranking.drop(key)
    assert (ranking.index.tolist(), ranking.total()) == ([0], 255.0)
