"""A bank's keys by two ways, clusters and autoencoder, matched to each other and to the paper's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mkf.analysis import figures, match
from mkf.keys import KeySet, analytic, paper8
from mkf.search import Autoencoder, Residual, autoencoder, clusters, two_rounds

if TYPE_CHECKING:
    from mkf.bank import FilterBank

Cosines = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class MatchedKeys:
    """Key sets of equal length, the first key of one matched to the first of the others.

    Attributes:
        clusters: The keys by clusters, to which the others are matched.
        others: The other ways' keys by name, in the order of `clusters` and turned to its signs.
        cosines: |correlation| of each of their keys with its partner, (K,).
        coder: The autoencoder, for its code axis.
    """

    clusters: KeySet
    others: dict[str, KeySet]
    cosines: dict[str, Cosines]
    coder: Autoencoder

    def lines(self) -> list[str]:
        """The numbers in words."""
        last = self.coder.history[-1]
        told = [
            f"autoencoder: {last.step} steps, loss {last.train:.3f}, on held-out filters {last.held_out:.3f}; "
            f"code axis used evenly to {self.coder.occupancy:.3f} (entropy of its histogram; 1 is level)"
        ]
        for name, cosines in self.cosines.items():
            each = ", ".join(f"{cosine:.3f}" for cosine in cosines)
            told.append(f"clusters and {name}: mean |cos| {cosines.mean():.2f} ({each})")
        return told

    def draw(self, out: Path) -> list[Path]:
        """Write `search_keys.png`, the sets under each other, and `code_axis.png` into a folder that exists."""
        axis = figures.code_axis(self.coder.candidates(), self.coder.histogram)
        return [
            figures.save(figures.keys_rows({"clusters": self.clusters, **self.others}), out / "search_keys.png"),
            figures.save(axis, out / "code_axis.png"),
        ]


def match_keys(
    bank: FilterBank,
    k: int = 8,
    seed: int = 0,
    *,
    steps: int = 3000,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MatchedKeys:
    """Search a bank's k keys by clusters and by autoencoder, and match the latter, and known keys, to the former.

    The known keys are the paper's eight for 7 x 7 and parameter set B of the analytic ones for other sizes. Matching is
    `mkf.analysis.match`: one to one, by |cos|, the best in sum.

    Args:
        bank: Filters of one kernel size.
        k: Number of keys, 1 to 8.
        seed: Of both searches.
        steps: Training steps of the autoencoder at most.
        state: A folder from which a search that was killed goes on.
        progress: Called as `progress(done, total)`, in restarts of the clusters, steps of the autoencoder and
            candidates left out and judged, in each round anew.

    Raises:
        ValueError: k is more than there are known keys, and what the searches refuse.
    """
    size = bank.kernel_sizes[0]
    known = {"paper8": paper8()} if size == 7 else {"analytic B": analytic("B", size)}
    if k > len(next(iter(known.values()))):
        raise ValueError(f"k={k}: there are 8 known keys to match, so ask for 1 to 8")
    by_clusters = clusters(bank, k, seed, progress=progress).keys
    coder = autoencoder(bank, seed=seed, steps=steps, state=state and state / "autoencoder.pt", progress=progress)
    _, second = two_rounds(coder, k, Residual(bank), state=state, progress=progress)
    others, cosines = {}, {}
    for name, keys in {"autoencoder": second.keys, **known}.items():
        pairs = match(by_clusters, keys)
        turned = keys.centred()[pairs.second] * torch.from_numpy(np.sign(pairs.cosine)).float()[:, None, None]
        others[name] = KeySet(turned, [keys.names[i] for i in pairs.second], provenance=keys.provenance)
        cosines[name] = np.abs(pairs.cosine)
    return MatchedKeys(by_clusters, others, cosines, coder)
