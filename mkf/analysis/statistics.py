"""What the filters of trained networks are: how many go to each key, how well they fit, and how alike they are.

Everything that is counted is additive, so a layer's `Tally` is built up batch by batch, a model's is the sum of its
layers', and a family's, a depth's and a bank's are sums of those. Residuals key by key are kept per model, as
`FitStatistics`: per layer they would be most of the memory. Memory grows with layers and with models x keys, never with
the number of filters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mkf.analysis.similarity import duplicates, participation, unit_filters
from mkf.bank import UNTRAINED
from mkf.ops.affine_fit import affine_fit
from mkf.ops.fit_statistics import FitStatistics, FitTally, histogram_quantile

if TYPE_CHECKING:
    from mkf.bank import FilterBank
    from mkf.keys import KeySet

Array = np.ndarray[Any, np.dtype[Any]]

QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
"""The residual quantiles that are reported."""

RESIDUAL_BINS = 1024
"""Residuals lie in [0, 1] and are counted in bins of width 1/1024, so a quantile is exact to half of that, .0005."""

SCHEMA = "mkf.analysis/1"
"""Name and version of `Analysis.to_dict`; the number rises when a field changes its meaning or goes away."""

_BATCH_ROWS = 65_536
_NOISE_FILTERS = 4_096
_SAMPLE_PER_KEY = 256


@dataclass(eq=False)
class Tally:
    """Additive counts over a set of filters that was fitted to K keys.

    A *dead* filter is constant; a *live* one is finite and not dead. Only live filters are counted under a key, enter
    the mean correlation, and have a residual.

    Attributes:
        filters: How many filters, of any sort.
        dead: How many of them are constant.
        non_finite: How many of them hold a NaN or an infinity.
        duplicates: How many live ones are near-duplicates of an earlier filter of their layer; see `duplicates`.
        counts: Live filters whose best key this is, int64 (K,).
        positive: Those of `counts` whose scale is positive, int64 (K,).
        correlation_sum: Sum over the live filters of |correlation| with the best key, sqrt(1 - residual^2).
        residuals: Histogram of the live filters' residuals over [0, 1], int64 (RESIDUAL_BINS,).
        control_residuals: The same for as many random keys.
    """

    filters: int
    dead: int
    non_finite: int
    duplicates: int
    counts: Array
    positive: Array
    correlation_sum: float
    residuals: Array
    control_residuals: Array

    @classmethod
    def empty(cls, keys: int) -> Tally:
        """The tally of no filters."""
        counts, positive = np.zeros((2, keys), np.int64)
        residuals, control_residuals = np.zeros((2, RESIDUAL_BINS), np.int64)
        return cls(0, 0, 0, 0, counts, positive, 0.0, residuals, control_residuals)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.filters + other.filters,
            self.dead + other.dead,
            self.non_finite + other.non_finite,
            self.duplicates + other.duplicates,
            self.counts + other.counts,
            self.positive + other.positive,
            self.correlation_sum + other.correlation_sum,
            self.residuals + other.residuals,
            self.control_residuals + other.control_residuals,
        )

    @property
    def live(self) -> int:
        """How many filters are finite and not constant."""
        return self.filters - self.dead - self.non_finite

    @property
    def shares(self) -> Array:
        """Each key's share of the live filters, float64 (K,), of sum 1; NaN where no filter is live."""
        return self.counts / self.live if self.live else np.full(len(self.counts), np.nan)

    @property
    def positive_share(self) -> float:
        """Share of the live filters whose scale is positive; NaN where no filter is live."""
        return int(self.positive.sum()) / self.live if self.live else float("nan")

    @property
    def mean_correlation(self) -> float:
        """Mean |correlation| of the live filters with their best key; NaN where no filter is live."""
        return self.correlation_sum / self.live if self.live else float("nan")

    @property
    def residual_quantiles(self) -> Array:
        """Quantiles `QUANTILES` of the live filters' residuals, float64 (5,); NaN where no filter is live."""
        return histogram_quantile(self.residuals, QUANTILES)

    @property
    def control_quantiles(self) -> Array:
        """The same for the random keys."""
        return histogram_quantile(self.control_residuals, QUANTILES)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types; see `Analysis.to_dict`."""
        return {
            "filters": self.filters,
            "dead": self.dead,
            "non_finite": self.non_finite,
            "duplicates": self.duplicates,
            "counts": self.counts.tolist(),
            "shares": _finite(self.shares),
            "positive_share": _finite(self.positive_share),
            "mean_correlation": _finite(self.mean_correlation),
            "residual_quantiles": _finite(self.residual_quantiles),
            "control_residual_quantiles": _finite(self.control_quantiles),
        }


@dataclass(frozen=True, eq=False)
class SampledFilters:
    """M live filters with their fits, as numpy arrays.

    Attributes:
        filters: float32 (M, k, k).
        channel: int32 (M,), in their layer.
        index: int32 (M,), their key.
        scale: float32 (M,).
        residual: float32 (M,).
    """

    filters: Array
    channel: Array
    index: Array
    scale: Array
    residual: Array

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: Array) -> SampledFilters:
        """Some of them, copied."""
        return SampledFilters(*(getattr(self, name.name)[rows] for name in fields(self)))

    @classmethod
    def join(cls, parts: Iterable[SampledFilters]) -> SampledFilters:
        """All of them, one after the other."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, name.name) for part in parts]) for name in fields(cls)))


@dataclass(eq=False)
class LayerStatistics:
    """One layer: where it sits, what its filters are, which channels are not finite, and a sample if asked for."""

    layer: str
    depth: int
    normalised_depth: float
    tally: Tally
    non_finite_channels: list[int] = field(default_factory=list)
    sample: SampledFilters | None = None


@dataclass(eq=False)
class ModelStatistics:
    """One model: its layers in order of depth.

    Attributes:
        model: Its name.
        layers: In order of depth.
        moment: Sum of x x^T over the live filters x, centred and of norm 1, float64 (k * k, k * k).
    """

    model: str
    layers: list[LayerStatistics]
    moment: Array

    @cached_property
    def tally(self) -> Tally:
        """The sum of the layers."""
        return _total(layer.tally for layer in self.layers)

    @property
    def effective_dimension(self) -> float:
        """How many dimensions the filters spread over, 1 to k^2 - 1; see `mkf.analysis.effective_dimension`."""
        return participation(self.moment)


@dataclass(eq=False)
class FamilyStatistics:
    """Models of one architecture, in sizes and trainings of all sorts.

    Attributes:
        family: Its name, as `family` has it.
        models: Those with at least one live filter.
    """

    family: str
    models: list[ModelStatistics]

    @cached_property
    def tally(self) -> Tally:
        """The sum of the models."""
        return _total(model.tally for model in self.models)

    @property
    def shares(self) -> Array:
        """Each model's share of each key, float64 (models, K)."""
        return np.stack([model.tally.shares for model in self.models])

    @property
    def spread(self) -> Array:
        """Standard deviation of each key's share over the models (`ddof=0`), (K,); 0 for a single model."""
        spread: Array = self.shares.std(0)
        return spread

    @property
    def distance(self) -> float:
        """Mean distance of two of its models, as `share_distance` has it; NaN for a single model."""
        pairs = [share_distance(one, other) for one, other in combinations(self.shares, 2)]
        return float(np.mean(pairs)) if pairs else float("nan")


@dataclass(eq=False)
class Analysis:
    """A bank fitted to a set of keys and to a random control.

    Attributes:
        keys: The keys, K of k x k.
        control: As many random keys of the same size.
        models: One entry per model, in the bank's order.
        left_out: Filters of another kernel size than the keys', which were not analysed: kernel size -> number.
        noise_correlation: Mean |correlation| of white-noise filters with their best key: what chance alone gives.
        sample: Live filters for the figures, a uniform random sample of at most 256 for each key, key after key.
            Models that are controls, by a name that ends in `-untrained`, give none unless all models are such.
        key_residuals: Residuals key by key, the groups being the models.
        control_residuals: The same for the control keys.
    """

    keys: KeySet
    control: KeySet
    models: list[ModelStatistics]
    left_out: dict[int, int]
    noise_correlation: float
    sample: SampledFilters
    key_residuals: FitStatistics
    control_residuals: FitStatistics

    @cached_property
    def tally(self) -> Tally:
        """The sum of the models."""
        return _total(model.tally for model in self.models)

    @cached_property
    def trained(self) -> Analysis:
        """The same without the models that are controls, by a name that ends in `-untrained`, unless all are."""
        rows = [row for row, model in enumerate(self.models) if not model.model.endswith(UNTRAINED)]
        if len(rows) in (0, len(self.models)):
            return self
        return replace(
            self,
            models=[self.models[row] for row in rows],
            key_residuals=self.key_residuals.pick(rows),
            control_residuals=self.control_residuals.pick(rows),
        )

    @property
    def effective_dimension(self) -> float:
        """That of all models' filters together."""
        return participation(np.sum([model.moment for model in self.models], 0))

    @cached_property
    def families(self) -> list[FamilyStatistics]:
        """The models that have live filters by family, in the order in which the families first appear."""
        families: dict[str, list[ModelStatistics]] = {}
        for model in self.models:
            if model.tally.live:
                families.setdefault(family(model.model), []).append(model)
        return [FamilyStatistics(name, models) for name, models in families.items()]

    @property
    def family_distance(self) -> tuple[float, float]:
        """Mean distance of the shares of two models of one family, and of two different ones; NaN without such pairs.

        The shares are stable within families as far as the first is the smaller.
        """
        labelled = [(family.family, model.tally.shares) for family in self.families for model in family.models]
        within: list[float] = []
        between: list[float] = []
        for (one, first), (other, second) in combinations(labelled, 2):
            (within if one == other else between).append(share_distance(first, second))
        mean_within, mean_between = (float(np.mean(x)) if x else float("nan") for x in (within, between))
        return mean_within, mean_between

    def over_depth(self, bins: int = 10) -> list[Tally]:
        """The layers of all models by normalised depth, in so many equal parts of [0, 1]."""
        tallies = [Tally.empty(len(self.keys)) for _ in range(bins)]
        for model in self.models:
            for layer in model.layers:
                part = min(int(layer.normalised_depth * bins), bins - 1)
                tallies[part] += layer.tally
        return tallies

    @property
    def non_finite(self) -> list[tuple[str, str, int]]:
        """Model, layer and channel of every filter that holds a NaN or an infinity."""
        return [
            (model.model, layer.layer, channel)
            for model in self.models
            for layer in model.layers
            for channel in layer.non_finite_channels
        ]

    def to_dict(self) -> dict[str, Any]:
        """The analysis as JSON types, schema `mkf.analysis/1`: finite numbers, null where there is nothing to measure.

        ```
        schema                       "mkf.analysis/1"
        keys                         kernel_size, names [K], kinds [K], provenance, licence, filters [K][k][k]
        control                      the same without `filters`: the random keys
        quantiles [5]                the levels of every quantile list below
        residual_bin_width           quantiles are exact to half of it
        white_noise_mean_correlation mean best |correlation| of white-noise filters with the keys
        left_out                     {kernel size: number of filters not analysed}
        effective_dimension          of all filters together
        key_residuals [K]            residual key by key: filters, mean, std, quantiles [5]
        control_residuals            the same fields over all random keys
        family_distance              {within, between}: mean distance of the shares of two models
        families []                  family, models [], the fields of a tally, spread [K], distance
        depths [10]                  the fields of a tally, by normalised depth
        total                        a tally
        models []                    model, the fields of a tally, effective_dimension, layers []
        models [].layers []          layer, depth, normalised_depth, the fields of a tally, non_finite_channels []
        ```
        A tally is `filters`, `dead`, `non_finite`, `duplicates` (numbers of filters), `counts` [K] and `shares` [K] of
        the live filters, `positive_share` (scale > 0), `mean_correlation`, `residual_quantiles` [5],
        `control_residual_quantiles` [5].
        """
        keys, control = self.keys, self.control
        return {
            "schema": SCHEMA,
            "keys": {**_describe(keys), "filters": keys.filters.tolist()},
            "control": _describe(control),
            "quantiles": list(QUANTILES),
            "residual_bin_width": 1 / RESIDUAL_BINS,
            "white_noise_mean_correlation": self.noise_correlation,
            "left_out": {str(k): number for k, number in self.left_out.items()},
            "effective_dimension": _finite(self.effective_dimension),
            "key_residuals": _by_key(self.key_residuals),
            "control_residuals": _by_key(self.control_residuals.over_keys())[0],
            "family_distance": dict(zip(("within", "between"), map(_finite, self.family_distance), strict=True)),
            "families": [
                {
                    "family": family.family,
                    "models": [model.model for model in family.models],
                    **family.tally.to_dict(),
                    "spread": _finite(family.spread),
                    "distance": _finite(family.distance),
                }
                for family in self.families
            ],
            "depths": [tally.to_dict() for tally in self.over_depth()],
            "total": self.tally.to_dict(),
            "models": [
                {
                    "model": model.model,
                    **model.tally.to_dict(),
                    "effective_dimension": _finite(model.effective_dimension),
                    "layers": [
                        {
                            "layer": layer.layer,
                            "depth": layer.depth,
                            "normalised_depth": _finite(layer.normalised_depth),
                            **layer.tally.to_dict(),
                            "non_finite_channels": layer.non_finite_channels,
                        }
                        for layer in model.layers
                    ],
                }
                for model in self.models
            ],
        }


def analyse(
    bank: FilterBank,
    keys: KeySet,
    *,
    control: KeySet | None = None,
    atlas: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Count, per model and layer, which key each filter is a linear shift of, and how far it is from it.

    Every filter f goes to the key x of largest |correlation|; its residual is `||f - (a x + b)|| / ||f - mean(f)||`
    with the best a and b (A, eq. 1-3), and `|correlation| = sqrt(1 - residual^2)`. The same filters are fitted to
    `control`, to show what any keys would have reached. The bank is read in batches, so it may be larger than memory.

    Args:
        bank: Filters of any kernel sizes; those of the keys' size are analysed, the others are counted in `left_out`.
        keys: K keys of k x k.
        control: K' keys of k x k to compare with; without it `mkf.keys.random(k, K, seed=0)`.
        atlas: Keep a uniform random sample of so many filters of each layer and key, as `LayerStatistics.sample`.
        progress: Called as `progress(done, total)` with numbers of filters, after each batch.

    Returns:
        The statistics of the bank, its models and their layers.

    Raises:
        ValueError: The bank is empty, holds no filter of the keys' size, or `control` is of another size than the keys.
    """
    from mkf.keys import random

    k = keys.kernel_size
    if control is None:
        control = random(k, len(keys), seed=0)
    if control.kernel_size != k:
        raise ValueError(f"the control keys are {_size(control.kernel_size)} but the keys are {_size(k)}")
    if len(bank) == 0:
        raise ValueError("the bank is empty: it holds no filters to analyse")
    left_out = {other: len(bank.select(k=other)) for other in bank.kernel_sizes if other != k}
    if k not in bank.kernel_sizes:
        found = ", ".join(f"{number} of {_size(other)}" for other, number in left_out.items())
        most = max(left_out, key=lambda other: left_out[other])
        raise ValueError(
            f"the keys are {_size(k)} but the bank holds only other sizes ({found}): choose keys of that size, "
            f"as analytic:B:{most} (mkf.keys.analytic('B', {most})) are {_size(most)}"
        )
    if left_out:
        bank = bank.select(k=k)

    shown = [model for model in bank.models if not model.endswith(UNTRAINED)] or bank.models
    counter = _Counter(keys, control, shown, atlas)
    done = 0
    for batch in bank.batches(_BATCH_ROWS):
        counter.add(batch)
        done += len(batch)
        if progress is not None:
            progress(done, len(bank))
    return counter.result(left_out)


def noise_correlation(keys: KeySet) -> float:
    """Mean |correlation| of white-noise filters with their best key: what chance alone gives.

    Measured on 4 096 filters of independent normal numbers (seed 0); about .24 for the eight published keys.
    """
    k = keys.kernel_size
    noise = torch.randn(_NOISE_FILTERS, k, k, generator=torch.Generator().manual_seed(0))
    return float(_correlation(affine_fit(noise, keys).residual.numpy()).mean())


def key_labels(keys: KeySet) -> list[str]:
    """What to print beside a key's number: its kind, or its name where no kind is known."""
    return [kind or name for kind, name in zip(keys.kinds, keys.names, strict=True)]


def family(model: str) -> str:
    """A model's architecture family: its name up to the first of `_ - . /` or space, untrained ones apart.

    `convnextv2_tiny.fcmae_ft_in1k` is of the family convnextv2, `convnext-cifar10-untrained` of convnext-untrained.
    Our rule; it suits the names of timm.
    """
    name = re.split(r"[_\-./ ]", model.strip())[0] or model
    return name + UNTRAINED if model.endswith(UNTRAINED) else name


def share_distance(first: Array, second: Array) -> float:
    """Total variation distance of two distributions over the keys, sum |p - q| / 2: 0 for equal ones, 1 at most."""
    return float(np.abs(first - second).sum() / 2)


class _Sample:
    """A uniform random sample of the filters of each cell: those of the smallest of random numbers, one per filter.

    The numbers are drawn in the bank's order, so the sample does not depend on how the bank was cut into batches.

    Args:
        size: How many filters of a cell to keep.
    """

    def __init__(self, size: int):
        self._size = size
        self._kept: dict[Any, tuple[Array, SampledFilters]] = {}

    def add(self, cells: dict[Any, Array], filters: SampledFilters, priority: Array) -> None:
        """Offer filters, which have a random number each; `cells` tells which rows go to which cell."""
        for cell, rows in cells.items():
            first = rows[np.argsort(priority[rows], kind="stable")[: self._size]]
            numbers, kept = priority[first], filters.take(first)
            if cell in self._kept:
                before, there = self._kept[cell]
                numbers, kept = np.concatenate([before, numbers]), SampledFilters.join([there, kept])
                best = np.argsort(numbers, kind="stable")[: self._size]
                numbers, kept = numbers[best], kept.take(best)
            self._kept[cell] = numbers, kept

    def of(self, cell: Any) -> SampledFilters | None:
        """What was kept of a cell."""
        return self._kept[cell][1] if cell in self._kept else None


class _Counter:
    """Takes the batches of a bank in order; `result` is its analysis."""

    def __init__(self, keys: KeySet, control: KeySet, shown: Sequence[str], atlas: int):
        self._keys, self._control, self._shown = keys, control, shown
        self._layers: dict[str, dict[str, LayerStatistics]] = {}
        self._moments: dict[str, Array] = {}
        self._residuals, self._control_residuals = FitTally(len(keys)), FitTally(len(control))
        self._atlas, self._sample = _Sample(atlas) if atlas else None, _Sample(_SAMPLE_PER_KEY)
        self._random = np.random.default_rng(0)
        self._open: LayerStatistics | None = None  # the layer that the last batch ended in, and its filters
        self._of_open: list[torch.Tensor] = []

    def add(self, batch: FilterBank) -> None:
        """Count the filters of one batch."""
        filters, metadata, keys = batch.filters, batch.metadata, len(self._keys)
        fit, control_fit = affine_fit(filters, self._keys), affine_fit(filters, self._control)
        index, scale, residual = fit.index.numpy(), fit.scale.numpy(), fit.residual.numpy()
        control_residual = control_fit.residual.numpy()
        finite = index >= 0
        live = finite & ~((scale == 0) & (residual == 0))
        channel = metadata["channel"].to_numpy()
        sampled = SampledFilters(filters.numpy(), channel, index, scale, residual)
        priority = self._random.random(len(filters))
        shown = live & np.isin(metadata["model"].to_numpy(), self._shown)
        self._sample.add({key: np.flatnonzero(shown & (index == key)) for key in range(keys)}, sampled, priority)

        unit = unit_filters(filters)[0]
        group = np.zeros(len(filters), np.int64)
        for rows, model, name, depth, normalised_depth in _by_layer(metadata):
            on = rows[live[rows]]
            tally = Tally(
                filters=len(rows),
                dead=int((finite[rows] & ~live[rows]).sum()),
                non_finite=int((~finite[rows]).sum()),
                duplicates=0,  # counted once all of the layer's filters are there
                counts=np.bincount(index[on], minlength=keys),
                positive=np.bincount(index[on][scale[on] > 0], minlength=keys),
                correlation_sum=float(_correlation(residual[on]).sum()),
                residuals=_histogram(residual[on]),
                control_residuals=_histogram(control_residual[on]),
            )
            of_model = self._layers.setdefault(model, {})
            layer = of_model.setdefault(name, LayerStatistics(name, depth, normalised_depth, Tally.empty(keys)))
            layer.tally += tally
            layer.non_finite_channels += channel[rows[~finite[rows]]].tolist()
            if self._atlas is not None:
                self._atlas.add({(model, name, key): on[index[on] == key] for key in range(keys)}, sampled, priority)
            of_layer = unit[torch.from_numpy(rows)]
            self._moments[model] = self._moments.get(model, 0) + (of_layer.T @ of_layer).numpy()
            group[rows] = list(self._layers).index(model)
            if layer is not self._open:
                self._close()
                self._open = layer
            self._of_open.append(filters[torch.from_numpy(rows)])
        groups = torch.from_numpy(group)
        self._residuals.add(fit, groups, len(self._layers))
        self._control_residuals.add(control_fit, groups, len(self._layers))

    def _close(self) -> None:
        """Count the near-duplicates of the layer whose filters have all come."""
        if self._open is not None:
            self._open.tally.duplicates += int((duplicates(torch.cat(self._of_open)) >= 0).sum())
        self._open, self._of_open = None, []

    def result(self, left_out: dict[int, int]) -> Analysis:
        """The analysis of all batches."""
        self._close()
        keys = range(len(self._keys))
        models = []
        for model, layers in self._layers.items():
            if self._atlas is not None:
                for layer in layers.values():
                    parts = [self._atlas.of((model, layer.layer, key)) for key in keys]
                    layer.sample = SampledFilters.join(part for part in parts if part is not None)
            by_depth = sorted(layers.values(), key=lambda layer: layer.depth)
            models.append(ModelStatistics(model, by_depth, self._moments[model]))
        labels = tuple(self._layers)
        return Analysis(
            self._keys,
            self._control,
            models,
            left_out,
            noise_correlation(self._keys),
            SampledFilters.join(part for key in keys if (part := self._sample.of(key)) is not None),
            self._residuals.result(labels),
            self._control_residuals.result(labels),
        )


def _by_layer(metadata: Any) -> Iterator[tuple[Array, str, str, int, float]]:
    """Rows, model, layer, depth and normalised depth of each layer of a metadata table, in order of appearance."""
    model, layer = (metadata[column].combine_chunks().dictionary_encode() for column in ("model", "layer"))
    code = model.indices.to_numpy().astype(np.int64) * len(layer.dictionary) + layer.indices.to_numpy()
    order = np.argsort(code, kind="stable")
    bounds = [0, *(np.flatnonzero(np.diff(code[order])) + 1), len(order)]
    groups = [order[start:stop] for start, stop in pairwise(bounds)]
    for rows in sorted(groups, key=lambda rows: int(rows[0])):
        first = metadata.slice(int(rows[0]), 1).to_pylist()[0]
        yield rows, first["model"], first["layer"], first["depth"], first["normalised_depth"]


def _correlation(residual: Array) -> Array:
    correlation: Array = np.sqrt(np.clip(1 - residual.astype(np.float64) ** 2, 0, 1))
    return correlation


def _histogram(residual: Array) -> Array:
    """Counts of numbers in [0, 1] over RESIDUAL_BINS equal bins; 1 itself belongs to the last."""
    bins = np.minimum((residual * RESIDUAL_BINS).astype(np.int64), RESIDUAL_BINS - 1)
    return np.bincount(bins, minlength=RESIDUAL_BINS)


def _total(tallies: Iterator[Tally]) -> Tally:
    total = next(tallies)
    for tally in tallies:
        total += tally
    return total


def _describe(keys: KeySet) -> dict[str, Any]:
    return {
        "kernel_size": keys.kernel_size,
        "names": list(keys.names),
        "kinds": list(keys.kinds),
        "provenance": keys.provenance,
        "licence": keys.licence,
    }


def _by_key(statistics: FitStatistics) -> list[dict[str, Any]]:
    """Residuals of each key over all groups."""
    total = statistics.over_groups()
    quantiles = total.quantile(QUANTILES)[:, 0]
    return [
        {
            "filters": int(total.count[0, key]),
            "mean": _finite(total.mean[0, key]),
            "std": _finite(total.std[0, key]),
            "quantiles": _finite(quantiles[:, key]),
        }
        for key in range(total.count.shape[1])
    ]


def _finite(value: Any) -> Any:
    """A float or an array of floats as JSON: null for NaN."""
    values = [number if np.isfinite(number) else None for number in np.atleast_1d(value).tolist()]
    return values if np.ndim(value) else values[0]


def _size(k: int) -> str:
    return f"{k}x{k}"
