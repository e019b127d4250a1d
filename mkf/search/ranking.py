"""Which of the kept keys each filter has, which it would have without it, and what that costs."""

import torch
from torch import Tensor

NONE = float("inf")


class Ranking:
    """N filters and K candidates, of which some are kept; every filter has the kept key that ranks first with it.

    The order of the candidates with each filter is computed once. When a key is dropped only the filters whose first
    or second key it was are looked at again.

    Args:
        order: (N, K) uint8, the candidates from a filter's best to its worst.
        cost: (N, K) float32, what each of them costs, in this order.
    """

    def __init__(self, order: Tensor, cost: Tensor):
        self._order, self._cost = order, cost
        self._kept = torch.ones(order.shape[1], dtype=torch.bool, device=order.device)
        rows = torch.arange(len(order), device=order.device)
        self._first = torch.zeros_like(rows)
        self._second = torch.ones_like(rows)

    @property
    def kept(self) -> list[int]:
        """The candidates that are left, ascending."""
        return self._kept.nonzero().flatten().tolist()

    @property
    def first(self) -> Tensor:
        """(N,) int64, the rank of each filter's key among all candidates."""
        return self._first

    @property
    def second(self) -> Tensor:
        """(N,) int64, the rank of the key that comes after it; K where there is none."""
        return self._second

    @property
    def index(self) -> Tensor:
        """(N,) int64, each filter's key."""
        return _at(self._order, self._first).long()

    def total(self) -> float:
        """The sum of all costs."""
        return float(_at(self._cost, self._first).double().sum())

    def totals_without(self) -> Tensor:
        """(K,) float64, the sum of all costs without each kept key; infinite for those that are not kept."""
        candidates = self._order.shape[1]
        totals = torch.full((candidates,), NONE, dtype=torch.float64, device=self._order.device)
        if int(self._kept.sum()) == 1:
            return totals
        more = (_at(self._cost, self._second) - _at(self._cost, self._first)).double()
        totals[self._kept] = self.total()
        return totals.index_add(0, self.index, more)

    def drop(self, key: int) -> None:
        """Give up a kept key: its filters go to their second key, and theirs to the next."""
        candidates = self._order.shape[1]
        lost = self.index == key
        beyond = self._second >= candidates
        second_lost = ~beyond & (_at(self._order, self._second.clamp(max=candidates - 1)) == key)
        self._kept[key] = False
        self._first = torch.where(lost, self._second, self._first)
        rows = (lost | second_lost).nonzero().flatten()
        rank = self._second[rows] + 1
        while len(rows):
            at_end = rank >= candidates
            found = at_end | self._kept[self._order[rows, rank.clamp(max=candidates - 1)].long()]
            self._second[rows[found]] = rank[found]
            rows, rank = rows[~found], rank[~found] + 1


def _at(table: Tensor, rank: Tensor) -> Tensor:
    return table.gather(1, rank[:, None])[:, 0]
