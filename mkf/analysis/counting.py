"""How a bank is counted: its filters are fitted batch by batch and added to the statistics of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mkf.analysis.similarity import duplicates, unit_filters
from mkf.analysis.statistics import (
    RESIDUAL_BINS,
    Analysis,
    Array,
    LayerStatistics,
    ModelStatistics,
    SampledFilters,
    Tally,
)
from mkf.bank import UNTRAINED
from mkf.ops.affine_fit import affine_fit
from mkf.ops.fit_statistics import FitTally

if TYPE_CHECKING:
    from mkf.bank import FilterBank
    from mkf.keys import KeySet

DUPLICATES_WITHIN = 20_000
"""In a layer of more filters near-duplicates are not counted: the time grows with the square of their number, and all
of them are in memory meanwhile."""

_BATCH_ROWS = 65_536
_NOISE_FILTERS = 4_096
_SAMPLE_PER_KEY = 256


def analyze(
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
    `control`, to show what any keys would have reached. The bank is read in batches, so it may be larger than memory:
    of its filters a batch and the layer being read are held, of a layer no more than `DUPLICATES_WITHIN`.

    Near-duplicates are counted in layers of at most `DUPLICATES_WITHIN` filters; see `Tally`.

    Args:
        bank: Filters of any kernel sizes; those of the keys' size are analyzed, the others are counted in `left_out`.
        keys: K keys of k x k.
        control: K' keys of k x k to compare with; without it `mkf.keys.random(k, K, seed=0)`.
        atlas: Keep a uniform random sample of so many filters of each layer and key, as `LayerStatistics.sample`.
        progress: Called as `progress(done, total)` with numbers of filters, after each batch.

    Returns:
        The statistics of the bank, its models and their layers.

    Raises:
        ValueError: The bank is empty, holds no filter of the keys' size, or `control` is of another size than the keys;
            or the filters of a layer do not follow one another, as when banks with models of one name are concatenated.
    """
    from mkf.keys import random

    k = keys.kernel_size
    if control is None:
        control = random(k, len(keys), seed=0)
    if control.kernel_size != k:
        raise ValueError(f"the control keys are {_size(control.kernel_size)} but the keys are {_size(k)}")
    if len(bank) == 0:
        raise ValueError("the bank is empty: it holds no filters to analyze")
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
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE_FILTERS, k, k, generator=rng, dtype=torch.float32, device="cpu")
    return float(_correlation(affine_fit(noise, keys).residual.numpy()).mean())


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
        self._origins: dict[str, tuple[str, str]] = {}
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
            if model not in self._layers:
                first = metadata.slice(int(rows[0]), 1).to_pylist()[0]
                self._origins[model] = first["source"], first["licence"]
            of_model = self._layers.setdefault(model, {})
            layer = of_model.setdefault(name, LayerStatistics(name, depth, normalised_depth, Tally.empty(keys)))
            if layer is not self._open:
                if layer.tally.filters:
                    raise ValueError(
                        f"the filters of layer {name!r} of model {model!r} do not follow one another in the bank: if "
                        "it was put together from banks that hold models of one name, give one of them another name"
                    )
                self._close()
                self._open = layer
            layer.tally += tally
            if layer.tally.filters <= DUPLICATES_WITHIN:
                self._of_open.append(filters[torch.from_numpy(rows)])
            else:
                layer.tally.duplicates, self._of_open = None, []
            layer.non_finite_channels += channel[rows[~finite[rows]]].tolist()
            if self._atlas is not None:
                self._atlas.add({(model, name, key): on[index[on] == key] for key in range(keys)}, sampled, priority)
            of_layer = unit[torch.from_numpy(rows)]
            self._moments[model] = self._moments.get(model, 0) + (of_layer.T @ of_layer).numpy()
            group[rows] = list(self._layers).index(model)
        groups = torch.from_numpy(group)
        self._residuals.add(fit, groups, len(self._layers))
        self._control_residuals.add(control_fit, groups, len(self._layers))

    def _close(self) -> None:
        """Count the near-duplicates of the layer whose filters have all come."""
        if self._open is not None and self._open.tally.duplicates is not None:
            self._open.tally.duplicates = int((duplicates(torch.cat(self._of_open)) >= 0).sum())
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
            models.append(ModelStatistics(model, by_depth, self._moments[model], *self._origins[model]))
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
    """Rows, model, layer, depth and normalised depth of each run of one layer's filters in a metadata table."""
    model, layer = (metadata[column].combine_chunks().dictionary_encode() for column in ("model", "layer"))
    code = model.indices.to_numpy().astype(np.int64) * len(layer.dictionary) + layer.indices.to_numpy()
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(code)) + 1), len(code)]):
        first = metadata.slice(int(start), 1).to_pylist()[0]
        yield np.arange(start, stop), first["model"], first["layer"], first["depth"], first["normalised_depth"]


def _correlation(residual: Array) -> Array:
    correlation: Array = np.sqrt(np.clip(1 - residual.astype(np.float64) ** 2, 0, 1))
    return correlation


def _histogram(residual: Array) -> Array:
    """Counts of numbers in [0, 1] over RESIDUAL_BINS equal bins; 1 itself belongs to the last."""
    bins = np.minimum((residual * RESIDUAL_BINS).astype(np.int64), RESIDUAL_BINS - 1)
    return np.bincount(bins, minlength=RESIDUAL_BINS)


def _size(k: int) -> str:
    return f"{k}x{k}"
