"""What the filters of trained networks are: how many go to each key, and how well they fit.

Everything that is counted is additive, so a layer's `Tally` is built up batch by batch, a model's is the sum of its
layers' and a bank's the sum of its models'. Memory grows with layers x keys, never with the number of filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mkf.bank import UNTRAINED
from mkf.ops.affine_fit import affine_fit
from mkf.ops.fit_statistics import histogram_quantile

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
        counts: Live filters whose best key this is, int64 (K,).
        positive: Those of `counts` whose scale is positive, int64 (K,).
        correlation_sum: Sum over the live filters of |correlation| with the best key, sqrt(1 - residual^2).
        residuals: Histogram of the live filters' residuals over [0, 1], int64 (RESIDUAL_BINS,).
        control_residuals: The same for as many random keys.
    """

    filters: int
    dead: int
    non_finite: int
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
        return cls(0, 0, 0, counts, positive, 0.0, residuals, control_residuals)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.filters + other.filters,
            self.dead + other.dead,
            self.non_finite + other.non_finite,
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
            "counts": self.counts.tolist(),
            "shares": _finite(self.shares),
            "positive_share": _finite(self.positive_share),
            "mean_correlation": _finite(self.mean_correlation),
            "residual_quantiles": _finite(self.residual_quantiles),
            "control_residual_quantiles": _finite(self.control_quantiles),
        }


@dataclass(eq=False)
class LayerStatistics:
    """One layer: where it sits, what its filters are, and which channels are not finite."""

    layer: str
    depth: int
    normalised_depth: float
    tally: Tally
    non_finite_channels: list[int] = field(default_factory=list)


@dataclass(eq=False)
class ModelStatistics:
    """One model: its layers in order of depth."""

    model: str
    layers: list[LayerStatistics]

    @cached_property
    def tally(self) -> Tally:
        """The sum of the layers."""
        return _total(layer.tally for layer in self.layers)


@dataclass(eq=False)
class Analysis:
    """A bank fitted to a set of keys and to a random control.

    Attributes:
        keys: The keys, K of k x k.
        control: As many random keys of the same size.
        models: One entry per model, in the bank's order.
        left_out: Filters of another kernel size than the keys', which were not analysed: kernel size -> number.
        noise_correlation: Mean |correlation| of white-noise filters with their best key: what chance alone gives.
        sample: Live filters for the figures, float32 (M, k, k): a uniform random sample of at most 256 for each key.
            Models that are controls, by a name that ends in `-untrained`, give none unless all models are such.
    """

    keys: KeySet
    control: KeySet
    models: list[ModelStatistics]
    left_out: dict[int, int]
    noise_correlation: float
    sample: torch.Tensor

    @cached_property
    def tally(self) -> Tally:
        """The sum of the models."""
        return _total(model.tally for model in self.models)

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
        total                        a tally
        models []                    model, the fields of a tally, layers []
        models [].layers []          layer, depth, normalised_depth, the fields of a tally, non_finite_channels []
        ```
        A tally is `filters`, `dead`, `non_finite` (numbers of filters), `counts` [K] and `shares` [K] of the live
        filters, `positive_share` (scale > 0), `mean_correlation`, `residual_quantiles` [5],
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
            "total": self.tally.to_dict(),
            "models": [
                {
                    "model": model.model,
                    **model.tally.to_dict(),
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
        raise ValueError(
            f"the keys are {_size(k)} but the bank holds only other sizes ({found}): choose keys of that size, "
            "as analytic:B:5 (mkf.keys.analytic('B', 5)) are 5x5"
        )
    if left_out:
        bank = bank.select(k=k)

    layers: dict[str, dict[str, LayerStatistics]] = {}
    sample = _Sample(len(keys), k)
    done = 0
    shown = [model for model in bank.models if not model.endswith(UNTRAINED)] or bank.models
    for batch in bank.batches(_BATCH_ROWS):
        _count(layers, sample, shown, batch, keys, control)
        done += len(batch)
        if progress is not None:
            progress(done, len(bank))
    models = [
        ModelStatistics(model, sorted(of_model.values(), key=lambda layer: layer.depth))
        for model, of_model in layers.items()
    ]
    return Analysis(keys, control, models, left_out, noise_correlation(keys), sample.filters())


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


class _Sample:
    """A uniform random sample of each key's filters: those of the smallest of random numbers drawn once per filter.

    The numbers are drawn in the bank's order, so the sample does not depend on how the bank was cut into batches.
    """

    def __init__(self, keys: int, k: int):
        self._rng = np.random.default_rng(0)
        self._kept = [(np.empty(0), torch.empty(0, k, k)) for _ in range(keys)]

    def add(self, filters: torch.Tensor, index: Array) -> None:
        """Offer live filters (N, k, k) with the index (N,) of their key."""
        priority = self._rng.random(len(index))
        for key, (kept_priority, kept) in enumerate(self._kept):
            rows = np.flatnonzero(index == key)
            together = np.concatenate([kept_priority, priority[rows]])
            best = np.argsort(together, kind="stable")[:_SAMPLE_PER_KEY]
            self._kept[key] = together[best], torch.cat([kept, filters[torch.from_numpy(rows)]])[torch.from_numpy(best)]

    def filters(self) -> torch.Tensor:
        """The sample, float32 (M, k, k), key after key."""
        return torch.cat([filters for _, filters in self._kept])


def _count(
    layers: dict[str, dict[str, LayerStatistics]],
    sample: _Sample,
    shown: Sequence[str],
    batch: FilterBank,
    keys: KeySet,
    control: KeySet,
) -> None:
    """Add the filters of one batch to the tallies of their layers and offer the live ones of `shown` to the sample."""
    fit = affine_fit(batch.filters, keys)
    index, scale, residual = fit.index.numpy(), fit.scale.numpy(), fit.residual.numpy()
    control_residual = affine_fit(batch.filters, control).residual.numpy()
    finite = index >= 0
    live = finite & ~((scale == 0) & (residual == 0))
    metadata = batch.metadata
    sampled = live & np.isin(metadata["model"].to_numpy(), shown)
    sample.add(batch.filters[torch.from_numpy(sampled)], index[sampled])

    channel = metadata["channel"].to_numpy()
    for rows, model, name, depth, normalised_depth in _by_layer(metadata):
        on = rows[live[rows]]
        tally = Tally(
            filters=len(rows),
            dead=int((finite[rows] & ~live[rows]).sum()),
            non_finite=int((~finite[rows]).sum()),
            counts=np.bincount(index[on], minlength=len(keys)),
            positive=np.bincount(index[on][scale[on] > 0], minlength=len(keys)),
            correlation_sum=float(_correlation(residual[on]).sum()),
            residuals=_histogram(residual[on]),
            control_residuals=_histogram(control_residual[on]),
        )
        of_model = layers.setdefault(model, {})
        layer = of_model.setdefault(name, LayerStatistics(name, depth, normalised_depth, Tally.empty(len(keys))))
        layer.tally += tally
        layer.non_finite_channels += channel[rows[~finite[rows]]].tolist()


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


def _finite(value: Any) -> Any:
    """A float or an array of floats as JSON: null for NaN."""
    values = [number if np.isfinite(number) else None for number in np.atleast_1d(value).tolist()]
    return values if np.ndim(value) else values[0]


def _size(k: int) -> str:
    return f"{k}x{k}"
