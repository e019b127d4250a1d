"""All ways to keys side by side, on filters of models that none of them has seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mkf.bank import UNTRAINED, FilterBank
from mkf.keys import KeySet, random
from mkf.ops import stream
from mkf.ops.fit_statistics import fit_statistics, refuse_mixed_sizes
from mkf.search.autoencoder import autoencoder
from mkf.search.clusters import check_count, clusters
from mkf.search.objectives import Residual
from mkf.search.pca import pca
from mkf.search.two_rounds import two_rounds

Search = Callable[[FilterBank, int, int], KeySet]
"""Keys from filters, their number and a seed."""


@dataclass(frozen=True)
class Row:
    """How one way to keys does on held-out models.

    Attributes:
        method: Its name.
        residual: Mean residual of all held-out filters, and over the seeds.
        spread: Standard deviation over the seeds (`ddof=1`); NaN for one seed and for keys that are given.
        by_model: The mean residual of each model's filters, and over the seeds.
    """

    method: str
    residual: float
    spread: float
    by_model: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        k: Number of keys.
        seeds: Of the searches.
        folds: The models held out together.
        filters: Live filters of each model.
        rows: A row a method, the lowest residual first.
    """

    k: int
    seeds: tuple[int, ...]
    folds: tuple[tuple[str, ...], ...]
    filters: dict[str, int]
    rows: tuple[Row, ...]

    def markdown(self) -> str:
        """The rows as a Markdown table."""
        models = list(self.filters)
        lines = [
            "| K = " + " | ".join([str(self.k), "all held-out filters", *models]) + " |",
            "|---" * (2 + len(models)) + "|",
            "| filters | " + " | ".join(f"{n:,}" for n in [sum(self.filters.values()), *self.filters.values()]) + " |",
        ]
        for row in self.rows:
            spread = f" ± {row.spread:.3f}" if row.spread > 0 else ""
            cells = [f"{row.residual:.3f}{spread}", *(f"{row.by_model[model]:.3f}" for model in models)]
            lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


METHODS: dict[str, Search] = {
    "clusters": lambda filters, k, seed: clusters(filters, k, seed).keys,
    "autoencoder": lambda filters, k, seed: two_rounds(autoencoder(filters, seed=seed), k, Residual(filters))[1].keys,
    "PCA": lambda filters, k, seed: pca(filters, k),
    "random": lambda filters, k, seed: random(filters.kernel_sizes[0], k, seed),
}
"""The ways that `compare` tries if it is not told others."""


def compare(
    bank: FilterBank,
    k: int = 8,
    *,
    keys: Mapping[str, KeySet] | None = None,
    methods: Mapping[str, Search] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    folds: int = 6,
    progress: stream.Progress | None = None,
) -> Comparison:
    """Search keys in some models' filters, fit the filters of the other models to them, and do so for all models.

    The models are dealt into `folds` groups of about equal numbers of filters, and each group is held out in turn, so
    that every filter is fitted once, to keys found without its model. What is compared is the mean residual of
    `affine_fit` over all live filters. Untrained models (`...-untrained`) take no part.

    Args:
        bank: Filters of one kernel size and at least two trained models.
        k: Number of keys.
        keys: Key sets to fit all filters to beside, by name, such as `{"paper8": mkf.keys.paper8()}`.
        methods: Searches, by name.
        seeds: Each method searches once with each.
        folds: Groups at most; with as many as models, each is held out by itself.
        progress: Called as `progress(done, total)` with numbers of searches.

    Raises:
        ValueError: k out of 1 to 256, fewer than two trained models or folds, no seeds, several kernel sizes, and what
            the methods refuse.
    """
    check_count(k)
    refuse_mixed_sizes(bank)
    models = [model for model in bank.models if not model.endswith(UNTRAINED)]
    if len(models) < 2 or folds < 2 or not seeds:
        raise ValueError(
            f"{len(models)} trained models, folds={folds}, {len(seeds)} seeds: to hold models out there must be at "
            "least 2 models, 2 folds and a seed"
        )
    banks = {model: bank.select(model=model) for model in models}
    groups = _deal({model: len(part) for model, part in banks.items()}, folds)
    total, done = len(groups) * len(methods) * len(seeds), 0
    tally = _Residuals()
    for group in groups:
        train = FilterBank.concat(part for model, part in banks.items() if model not in group)
        for name, given in (keys or {}).items():
            tally.add(name, 0, banks, group, given)
        for name, search in methods.items():
            for seed in seeds:
                tally.add(name, seed, banks, group, search(train, k, seed))
                done += 1
                if progress is not None:
                    progress(done, total)
    return Comparison(k, tuple(seeds), groups, {model: tally.live[model] for model in models}, tally.rows(models))


def _deal(sizes: dict[str, int], folds: int) -> tuple[tuple[str, ...], ...]:
    """Deal models to the group that has fewest filters so far, the largest model first."""
    groups: list[list[str]] = [[] for _ in range(min(folds, len(sizes)))]
    for model in sorted(sizes, key=lambda model: -sizes[model]):
        min(groups, key=lambda group: sum(sizes[member] for member in group)).append(model)
    return tuple(tuple(group) for group in groups if group)


class _Residuals:
    """Mean residuals by method, seed and model."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self._means: dict[str, dict[int, dict[str, float]]] = {}

    def add(self, method: str, seed: int, banks: Mapping[str, FilterBank], group: Sequence[str], keys: KeySet) -> None:
        for model in group:
            statistics = fit_statistics(banks[model], keys).over_keys()
            self.live[model] = int(statistics.count[0, 0])
            mean = float(statistics.mean[0, 0]) if self.live[model] else 0.0
            self._means.setdefault(method, {}).setdefault(seed, {})[model] = mean

    def rows(self, models: Sequence[str]) -> tuple[Row, ...]:
        weights = np.array([self.live[model] for model in models])
        rows = []
        for method, of_seed in self._means.items():
            means = np.array([[of_model[model] for model in models] for of_model in of_seed.values()])
            overall = means @ weights / weights.sum()
            by_model = dict(zip(models, means.mean(0).tolist(), strict=True))
            spread = float(overall.std(ddof=1)) if len(overall) > 1 else math.nan
            rows.append(Row(method, float(overall.mean()), spread, by_model))
        return tuple(sorted(rows, key=lambda row: row.residual))
