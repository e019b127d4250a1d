"""What the filters of trained networks are: how many go to each key, how well they fit, and how alike they are.

Everything that is counted is additive, so a layer's `Tally` is built up batch by batch, a model's is the sum of its
layers', and a family's, a depth's and a bank's are sums of those. Residuals key by key are kept per model, as
`FitStatistics`: per layer they would be most of the memory. What is kept grows with layers and with models x keys,
never with the number of filters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from mkf import __version__
from mkf.analysis.similarity import participation
from mkf.bank import UNTRAINED
from mkf.ops.fit_statistics import FitStatistics, histogram_quantile

if TYPE_CHECKING:
    from mkf.keys import KeySet

Array = np.ndarray[Any, np.dtype[Any]]

QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
"""The residual quantiles that are reported."""

RESIDUAL_BINS = 1024
"""Residuals lie in [0, 1] and are counted in bins of width 1/1024, so a quantile is exact to half of that, .0005."""

_ROUNDING = float(np.finfo(np.float32).eps)

SCHEMA = "mkf.analysis/2"
"""Name and version of `Analysis.to_dict`; the number rises when a field changes its meaning or goes away."""


@dataclass(eq=False)
class Tally:
    """Additive counts over a set of filters that was fitted to K keys.

    A *dead* filter is constant; a *live* one is finite and not dead. Only live filters are counted under a key, enter
    the mean correlation, and have a residual.

    Attributes:
        filters: How many filters, of any sort.
        dead: How many of them are constant.
        non_finite: How many of them hold a NaN or an infinity.
        duplicates: How many live ones are near-duplicates of an earlier filter of their layer; see `duplicates`. None
            where they were not counted, in at least one layer of more than `counting.DUPLICATES_WITHIN` filters.
        counts: Live filters whose best key this is, int64 (K,).
        positive: Those of `counts` whose scale is positive, int64 (K,).
        correlation_sum: Sum over the live filters of |correlation| with the best key, sqrt(1 - residual^2).
        residuals: Histogram of the live filters' residuals over [0, 1], int64 (RESIDUAL_BINS,).
        control_residuals: The same for as many random keys.
    """

    filters: int
    dead: int
    non_finite: int
    duplicates: int | None
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
            None if self.duplicates is None or other.duplicates is None else self.duplicates + other.duplicates,
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
        source: Where the bank has it from.
        licence: Of its filters.
    """

    model: str
    layers: list[LayerStatistics]
    moment: Array
    source: str = ""
    licence: str = ""

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
        """Standard deviation of each key's share over the models (`ddof=1`), (K,); NaN for a single model."""
        shares = self.shares
        spread: Array = shares.std(0, ddof=1) if len(shares) > 1 else np.full(shares.shape[1], np.nan)
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
        left_out: Filters of another kernel size than the keys', which were not analyzed: kernel size -> number.
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
                # Depths are rounded to float32, which can put one that is a bin's edge just below it.
                part = min(int(layer.normalised_depth * bins * (1 + _ROUNDING)), bins - 1)
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
        """The analysis as JSON types, schema `mkf.analysis/2`: finite numbers, null where there is nothing to measure.

        ```
        schema                       "mkf.analysis/2"
        mkf                          the version of mkf that made it
        keys                         kernel_size, names [K], kinds [K], provenance, licence, filters [K][k][k]
        control                      the same without `filters`: the random keys
        quantiles [5]                the levels of every quantile list below
        residual_bin_width           quantiles are exact to half of it
        white_noise_mean_correlation mean best |correlation| of white-noise filters with the keys
        left_out                     {kernel size: number of filters not analyzed}
        effective_dimension          of all filters together
        key_residuals [K]            residual key by key: filters, mean, std, quantiles [5]
        control_residuals            the same fields over all random keys
        family_distance              {within, between}: mean distance of the shares of two models
        families []                  family, models [], the fields of a tally, spread [K], distance
        depths [10]                  the fields of a tally, by normalised depth
        total                        a tally
        models []                    model, source, licence, the fields of a tally, effective_dimension, layers []
        models [].layers []          layer, depth, normalised_depth, the fields of a tally, non_finite_channels []
        ```
        A tally is `filters`, `dead`, `non_finite`, `duplicates` (numbers of filters; the last is null where a layer was
        too large to count them), `counts` [K] and `shares` [K] of the live filters, `positive_share` (scale > 0),
        `mean_correlation`, `residual_quantiles` [5], `control_residual_quantiles` [5]. The `spread` of a family is the
        standard deviation of each key's share over its models (`ddof=1`), null for a single one.
        """
        keys, control = self.keys, self.control
        return {
            "schema": SCHEMA,
            "mkf": __version__,
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
                    "source": model.source,
                    "licence": model.licence,
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


def key_labels(keys: KeySet) -> list[str]:
    """What to print beside a key's number: its kind, or its name where no kind is known."""
    return [kind or name for kind, name in zip(keys.kinds, keys.names, strict=True)]


def family(model: str) -> str:
    """A model's architecture family: its name up to the first of `_ - . /` or space, untrained ones apart.

    `convnextv2_tiny.fcmae_ft_in1k` is of the family convnextv2, `convnext-cifar10-untrained` of convnext-untrained.
    Our rule; it suits the names of timm, once what is no architecture is gone from their beginning: `hf-hub:` with the
    owner's name, `tf_` of weights that were ported, and `test_` of small ones to test with.
    """
    architecture = re.sub(r"^(hf[-_]hub:([^/]*/)?)?(tf_|test_)?", "", model.strip())
    name = re.split(r"[_\-./ ]", architecture)[0] or model
    return name + UNTRAINED if model.endswith(UNTRAINED) else name


def share_distance(first: Array, second: Array) -> float:
    """Total variation distance of two distributions over the keys, sum |p - q| / 2: 0 for equal ones, 1 at most."""
    return float(np.abs(first - second).sum() / 2)


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
