"""How well filters fit, without keeping their fits: counts, mean, spread and quantiles of the residual."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mkf.ops import stream
from mkf.ops.affine_fit import AffineFit, affine_fit
from mkf.ops.arguments import INTEGERS

BINS = 1024
UNIT_BITS = 24
"""Residuals are added up as whole multiples of 2^-24, the spacing of float32 below 1, so no order of adding matters."""

LARGEST = 4 << 30
"""Bytes of histograms beyond which group labels are taken for something else than small numbers."""

BLOCK = 32_000
"""Fits counted at a time on the CPU: torch uses one thread below 2^15, and what follows stays in cache."""


@dataclass(frozen=True, eq=False)
class FitStatistics:
    """What a fit of any number of filters to K keys was like, in G groups.

    A *dead* filter is constant, one that is not finite holds NaN or Inf: they are counted apart, under no key, and have
    no part in the statistics of the residual. Dead ones are told by a scale and a residual that are both 0; so are
    those of an exact copy so tiny that float32 does not reach its scale. All arrays are numpy's.

    Attributes:
        groups: The G groups' labels: a number, the column's value, or a tuple of values for several columns.
        dead: (G,) int64, constant filters.
        not_finite: (G,) int64, filters that hold NaN or Inf.
        positive: (G, K) int64, filters of `count` whose scale is positive.
        histogram: (G, K, bins) int64, filters by key and residual: bin i of width 1 / bins starts at i / bins, and a
            residual of 1 belongs to the last.
        sums: (G, K) int64, sum of the residuals in units of 2^-24.
        squares: (G, K) Python integers, sum of the squared residuals in units of 2^-48.
    """

    groups: tuple[Any, ...]
    dead: NDArray[np.int64]
    not_finite: NDArray[np.int64]
    positive: NDArray[np.int64] = field(repr=False)
    histogram: NDArray[np.int64] = field(repr=False)
    sums: NDArray[np.int64] = field(repr=False)
    squares: NDArray[np.object_] = field(repr=False)

    @property
    def count(self) -> NDArray[np.int64]:
        """(G, K) filters whose best key this is."""
        count: NDArray[np.int64] = self.histogram.sum(2)
        return count

    @property
    def filters(self) -> NDArray[np.int64]:
        """(G,) filters of any sort."""
        filters: NDArray[np.int64] = self.count.sum(1) + self.dead + self.not_finite
        return filters

    @property
    def share(self) -> NDArray[np.float64]:
        """(G, K) of the group's filters that have a key, the share with this one; NaN where there are none."""
        return _divide(self.count, self.count.sum(1, keepdims=True))

    @property
    def positive_share(self) -> NDArray[np.float64]:
        """(G, K) share of the filters whose scale is positive; NaN where there are none."""
        return _divide(self.positive, self.count)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(G, K) mean residual, exact to 2^-25; NaN where there are no filters."""
        return _divide(self.sums, self.count * 2.0**UNIT_BITS)

    @property
    def std(self) -> NDArray[np.float64]:
        """(G, K) standard deviation of the residual, that of the filters themselves (numpy's `ddof=0`)."""
        count, sums = self.count.astype(object), self.sums.astype(object)
        variance = count * self.squares - sums * sums  # in whole numbers, so nothing cancels
        return np.sqrt(_divide(variance.astype(float), (count * count).astype(float))) / 2.0**UNIT_BITS

    def quantile(self, q: ArrayLike) -> NDArray[np.float64]:
        """Quantiles of the residual, (G, K), or (*q.shape, G, K) for an array of levels; see `histogram_quantile`."""
        return histogram_quantile(self.histogram, q)

    def over_keys(self) -> "FitStatistics":
        """The same with the keys added up: K = 1."""
        return self._add(axis=1)

    def over_groups(self) -> "FitStatistics":
        """The same with the groups added up: G = 1, its label None."""
        total = self._add(axis=0)
        dead, not_finite = (x.sum(keepdims=True) for x in (self.dead, self.not_finite))
        return replace(total, groups=(None,), dead=dead, not_finite=not_finite)

    def pick(self, rows: Sequence[int]) -> "FitStatistics":
        """The same of some groups, by their places in `groups`."""
        names = ("dead", "not_finite", "positive", "histogram", "sums", "squares")
        groups = tuple(self.groups[row] for row in rows)
        return replace(self, groups=groups, **{name: getattr(self, name)[list(rows)] for name in names})

    def _add(self, axis: int) -> "FitStatistics":
        names = ("positive", "histogram", "sums", "squares")
        return replace(self, **{name: getattr(self, name).sum(axis, keepdims=True) for name in names})


def fit_statistics(
    filters: Any,
    keys: Any,
    groups: Any = None,
    *,
    bins: int = BINS,
    sign: Literal["any", "positive"] = "any",
    backend: str | None = None,
    progress: stream.Progress | None = None,
) -> FitStatistics:
    """Fit filters as `affine_fit` does and keep only how many go to each key, and how far they are from it.

    The filters are fitted a piece at a time, and a bank on disk or a memory-mapped file is read one piece ahead, so
    memory is that of some thousand filters and of the result, 8 * G * K * bins bytes, whatever N. The result is the
    same to the bit however the filters are cut into pieces and with any number of threads: residuals are added up as
    whole multiples of 2^-24, in 64 bits (N < 2^39). It has no gradients.

    Args:
        filters: As `affine_fit` takes them: a tensor, a numpy array (also `numpy.load(file, mmap_mode="r")`), or a
            `FilterBank` of one kernel size, in memory or on disk.
        keys: A `KeySet`, or an array (K, k, k), 1 <= K <= 256.
        groups: None for a single group, labelled None; N integers >= 0, a filter's group, for the groups 0 to their
            maximum; or, for a bank, a column of its metadata ("model") or several (("model", "layer")), for a group of
            each combination, in the order in which they first appear.
        bins: Of the histogram over residuals from 0 to 1. A quantile is exact to half a bin's width, 1 / (2 * bins).
        sign: As `affine_fit` has it.
        backend: As `affine_fit` has it.
        progress: Called as `progress(done, N)` after each piece.

    Raises:
        ValueError: What `affine_fit` refuses, groups that do not go with the filters, or `bins` out of 1 to 2^24.
        TypeError: A dtype that is no floating-point number, or groups that are no integers.
        BackendError: The implementation asked for cannot run there.
    """
    if not (isinstance(bins, int) and 1 <= bins <= 1 << UNIT_BITS):
        raise ValueError(f"bins={bins!r}: use a whole number from 1 to {1 << UNIT_BITS}")
    refuse_mixed_sizes(filters)
    total = len(filters)
    device = filters.device if isinstance(filters, Tensor) else torch.device("cpu")
    grouping = _grouping(groups, filters)
    tally = FitTally(len(keys), bins, device)
    done = 0
    with closing(stream.pieces(filters, metadata=grouping.columns)) as pieces, torch.no_grad():
        for piece in pieces:
            fit = affine_fit(piece, keys, sign=sign, backend=backend)
            rows = grouping.rows(piece, done)
            tally.add(fit, rows, len(grouping.labels))
            done += len(piece)
            if progress is not None:
                progress(done, total)
    return tally.result(tuple(grouping.labels))


class FitTally:
    """Adds up fits; `result` is their statistics.

    Args:
        keys: K.
        bins: Of the histogram of residuals.
        device: Where the fits are.
    """

    def __init__(self, keys: int, bins: int = BINS, device: torch.device | None = None):
        self._keys, self._bins = keys, bins
        counts = {"dead": (), "not_finite": (), "histogram": (keys, bins)}
        sums = dict.fromkeys(("positive", "sums", "squares_high", "squares_low"), (keys,))
        # One row more than there are groups, for room to grow.
        self._table = {
            name: torch.zeros(1, *shape, dtype=torch.int64, device=device) for name, shape in (counts | sums).items()
        }

    def add(self, fit: AffineFit, group: Tensor | None = None, groups: int = 1) -> None:
        """Count a fit of N filters.

        Args:
            fit: Of one key a filter.
            group: (N,) int64, each filter's group, below `groups`; None for all in group 0.
            groups: How many groups there are by now.
        """
        self._grow(groups)
        best = [torch.as_tensor(x) for x in (fit.index, fit.scale, fit.residual)]
        if group is None:
            group = torch.zeros((), dtype=torch.int64, device=best[0].device).expand(len(best[0]))
        block = BLOCK if group.device.type == "cpu" else max(len(group), 1)
        for part in zip(*(x.split(block) for x in (*best, group)), strict=True):
            self._add_block(*part)

    def _add_block(self, index: Tensor, scale: Tensor, residual: Tensor, group: Tensor) -> None:
        if not (scale.abs() > 0).all():  # most often none is dead or not finite, and to see that is cheaper
            finite = index >= 0
            live = finite & ~((scale == 0) & (residual == 0))
            self._add("dead", group[finite & ~live])
            self._add("not_finite", group[~finite])
            index, scale, residual, group = (x[live] for x in (index, scale, residual, group))
        cell = group * self._keys + index
        units = (residual * (1 << UNIT_BITS)).round().long().clamp(0, 1 << UNIT_BITS)
        bins = (units * self._bins >> UNIT_BITS).clamp(max=self._bins - 1)
        squares = units * units  # up to 2^48: in two halves, for 64 bits to hold their sum
        self._add("histogram", cell * self._bins + bins)
        self._add("positive", cell, (scale > 0).long())
        self._add("sums", cell, units)
        self._add("squares_high", cell, squares >> UNIT_BITS)
        self._add("squares_low", cell, squares & ((1 << UNIT_BITS) - 1))

    def result(self, labels: tuple[Any, ...] = (None,)) -> FitStatistics:
        """The statistics of what was added, with the groups' labels."""
        self._grow(len(labels))
        table = {name: values[: len(labels)].numpy(force=True).copy() for name, values in self._table.items()}
        high, low = (table.pop(f"squares_{half}").astype(object) for half in ("high", "low"))
        return FitStatistics(groups=labels, **table, squares=(high << UNIT_BITS) + low)

    def _add(self, name: str, where: Tensor, what: Tensor | None = None) -> None:
        self._table[name].view(-1).index_add_(0, where, torch.ones_like(where) if what is None else what)

    def _grow(self, groups: int) -> None:
        room = len(self._table["dead"])
        size = groups * self._table["histogram"][0].nbytes
        if size > LARGEST:
            raise ValueError(
                f"{groups:,} groups take {size / 2**30:,.0f} GiB of histograms: number the groups from 0, "
                "or take fewer bins"
            )
        if groups > room:
            more = max(groups - room, room)
            for name, values in self._table.items():
                self._table[name] = torch.cat([values, values.new_zeros(more, *values.shape[1:])])


def histogram_quantile(histogram: NDArray[np.int64], q: ArrayLike) -> NDArray[np.float64]:
    """Quantiles of numbers in [0, 1] from their histograms over equal bins.

    As `numpy.quantile` (linear between order statistics) with every number moved to the middle of its bin, so exact to
    half a bin's width.

    Args:
        histogram: (..., bins) counts.
        q: Levels from 0 to 1, a number or an array.

    Returns:
        (*q.shape, ...) float64; NaN where a histogram is empty.

    Raises:
        ValueError: A level below 0 or above 1.
    """
    levels: NDArray[np.float64] = np.asarray(q, np.float64)
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"q={q!r}: quantiles have levels from 0 to 1")
    below = histogram.cumsum(-1)
    total, bins = below[..., -1], histogram.shape[-1]
    quantiles = []
    for level in levels.flat:
        rank = level * (total - 1)
        lower, upper = (((below <= order[..., None]).sum(-1) + 0.5) / bins for order in (np.floor(rank), np.ceil(rank)))
        quantiles.append(np.where(total > 0, lower + (rank - np.floor(rank)) * (upper - lower), np.nan))
    return np.reshape(quantiles, levels.shape + total.shape)


def refuse_mixed_sizes(filters: Any) -> None:
    """Raise ValueError for a bank that mixes kernel sizes, before any of it is read."""
    sizes: tuple[int, ...] = getattr(filters, "kernel_sizes", ())
    if len(sizes) > 1:
        found = ", ".join(f"{k}x{k}" for k in sizes)
        raise ValueError(f"the bank mixes kernel sizes ({found}): choose one with select(k={sizes[-1]})")


class _OneGroup:
    columns: Sequence[str] = ()
    labels: Sequence[Any] = (None,)

    def rows(self, piece: Any, start: int) -> None:
        return None


class _Numbered:
    """Groups given by their numbers."""

    columns: Sequence[str] = ()

    def __init__(self, groups: Tensor):
        self._groups = groups
        self.labels: Sequence[Any] = range(int(groups.max()) + 1 if len(groups) else 0)

    def rows(self, piece: Any, start: int) -> Tensor:
        return self._groups[start : start + len(piece)].long()


class _Columns:
    """Groups given by columns of a bank's metadata, numbered as they first appear."""

    def __init__(self, names: Sequence[str], single: bool):
        self.columns, self._single = list(names), single
        self._numbers: dict[Any, int] = {}

    @property
    def labels(self) -> Sequence[Any]:
        return tuple(self._numbers)

    def rows(self, piece: Any, start: int) -> Tensor:
        import pyarrow as pa

        metadata = piece.metadata
        columns = [metadata[name].combine_chunks().dictionary_encode(null_encoding="encode") for name in self.columns]
        code = np.zeros(len(piece), np.int64)
        for column in columns:
            code = code * len(column.dictionary) + column.indices.to_numpy()
        combined = pa.array(code).dictionary_encode()
        numbers = []
        for combination in combined.dictionary.to_pylist():
            values = []
            for column in reversed(columns):
                combination, value = divmod(combination, len(column.dictionary))
                values.append(column.dictionary[value].as_py())
            label = values[0] if self._single else tuple(reversed(values))
            numbers.append(self._numbers.setdefault(label, len(self._numbers)))
        return torch.from_numpy(np.array(numbers, np.int64)[combined.indices.to_numpy()])


def _grouping(groups: Any, filters: Any) -> _OneGroup | _Numbered | _Columns:
    if groups is None:
        return _OneGroup()
    names = [groups] if isinstance(groups, str) else groups
    if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        if not hasattr(filters, "metadata"):
            raise ValueError(f"groups={groups!r}: only a bank has columns; give one integer a filter")
        return _Columns(names, single=isinstance(groups, str))
    if isinstance(names, Sequence) and len(names) == 0 < len(filters):
        raise ValueError(f"groups={groups!r}: give None for a single group, columns' names, or one integer a filter")
    numbers = torch.as_tensor(groups)
    if numbers.dtype not in INTEGERS:
        raise TypeError(f"groups are {numbers.dtype}: give integers such as int64, or the names of a bank's columns")
    if numbers.shape != (len(filters),):
        raise ValueError(
            f"groups have shape {tuple(numbers.shape)}: give one integer for each of {len(filters)} filters"
        )
    if len(numbers) and numbers.min() < 0:
        raise ValueError(f"groups hold {int(numbers.min())}: give integers from 0")
    return _Numbered(numbers.to(filters.device) if isinstance(filters, Tensor) else numbers.cpu())


def _divide(part: Any, whole: Any) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(part, whole), np.float64)
