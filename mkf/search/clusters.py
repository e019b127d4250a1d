"""Keys by clustering: spherical k-means in which a filter and its negative are the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mkf.keys import KeySet
from mkf.keys.key_set import MAX_KEYS
from mkf.ops import stream
from mkf.ops.affine_fit import affine_fit
from mkf.search.sample import NOISE, SAMPLE, draw, positive, units

ADDITIONS = 16
"""Filters that are considered as new keys when passes no longer help."""

TRIED = 6
"""Moves that are tried before a minimum is believed."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """What `clusters` found.

    Attributes:
        keys: K keys, the one with most filters first, each turned so that its largest tap is positive.
        share: (K,) float64, each key's share of the filters.
        inertia: Mean squared residual of the filters, which clustering makes small.
        history: The same after each pass: of the best restart, of the moves that improved it, whose passes begin
            higher, and of the passes over all filters if there are more than the sample.
        restarts: Where each restart ended, the mean squared residual of the sample.
        filters: Filters that were clustered.
        dead: Constant filters, which were left out.
        not_finite: Filters with NaN or Inf, which were left out.
    """

    keys: KeySet
    share: np.ndarray[Any, np.dtype[np.float64]]
    inertia: float
    history: tuple[float, ...]
    restarts: tuple[float, ...]
    filters: int
    dead: int
    not_finite: int


def clusters(
    filters: Any,
    k: int = 8,
    seed: int = 0,
    *,
    restarts: int = 4,
    sample: int = SAMPLE,
    max_passes: int = 200,
    tolerance: float = 1e-6,
    backend: str | None = None,
    progress: stream.Progress | None = None,
) -> Clustering:
    """Find the k keys of which filters are best linear shifts, by sign-invariant spherical k-means.

    With x_i the filters, centred and of norm 1, and unit keys q_j, it seeks the minimum of

        mean over i of min over j of 1 - <x_i, q_j>^2,

    the mean squared residual of `affine_fit`; every filter counts the same, whatever its norm. A pass assigns each
    filter to its key by `affine_fit` and then makes each key the leading eigenvector of the scatter matrix
    sum x x^T of its filters, which is the best key for them; both steps can only lower the mean. A key that loses all
    filters starts again at the filter that is fitted worst.

    Each restart is seeded by greedy k-means++ (filters drawn with probability proportional to their squared residual,
    the best of several at a time). The best restart then tries moves out of its minimum: one key is given up, and a
    filter becomes a key, or a cluster is split in two along the second eigenvector of its scatter matrix. So a rare
    kind of filter without a key and two similar keys that share a cluster are found. A move after which passes end
    lower is kept, until none of the most promising does. All this works on a random sample of `sample` filters; if
    there are more, the result is refined by passes over all, which are read as a stream.

    The result depends on the filters and the seed alone, on one machine. These choices are ours: the paper has no
    clustering.

    Args:
        filters: A `FilterBank` of one kernel size, a tensor (N, k, k) or (N, k * k), or an array, also memory-mapped.
            Dead filters and those that are not finite are left out and counted.
        k: Number of keys, 1 to 256.
        seed: Of all random draws.
        restarts: Independent starts, of which the best is kept.
        sample: Filters in memory at most, besides `filters` themselves.
        max_passes: Passes between two swaps, and over all filters, at most.
        tolerance: A pass that lowers the mean by a smaller part ends a run of passes.
        backend: As `affine_fit` has it.
        progress: Called as `progress(done, restarts)`.

    Raises:
        ValueError: k out of 1 to 256, fewer live filters than keys, filters that are linear shifts of fewer than k
            different ones, several kernel sizes, or a shape that is no filter's.
        TypeError: Filters that are no floating-point numbers.
        BackendError: The implementation asked for cannot run there.
    """
    check_count(k)
    if restarts < 1 or max_passes < 1:
        raise ValueError(f"restarts={restarts}, max_passes={max_passes}: both must be at least 1")
    drawn = draw(filters, sample, seed, least=k)
    x = drawn.filters
    rng = np.random.default_rng(seed)
    runs = []
    for start in range(restarts):
        runs.append(_passes([x], _seed(x, k, rng, backend), max_passes, tolerance, backend))
        if progress is not None:
            progress(start + 1, restarts)
    keys, history = min(runs, key=lambda run: run[1][-1])
    while better := _improve(x, keys, history[-1], rng, max_passes, tolerance, backend):
        keys, history = better[0], history + better[1]
    if len(x) < drawn.live:
        keys, passes = _passes(_All(filters), keys, max_passes, tolerance, backend)
        history = history + passes
    source = _All(filters) if len(x) < drawn.live else [x]
    _, count, inertia, _ = _scatter(source, keys, backend)
    order = (-count).argsort(stable=True)
    provenance = f"sign-invariant spherical k-means, k={k}, seed={seed}, of {drawn.live:,} filters"
    return Clustering(
        KeySet(positive(keys[order]).cpu(), provenance=provenance),
        (count[order].double() / count.sum()).numpy(force=True),
        inertia,
        (*history, inertia),
        tuple(history[-1] for _, history in runs),
        drawn.live,
        drawn.dead,
        drawn.not_finite,
    )


def check_count(k: int) -> None:
    """Refuse a number of keys that no key set can have."""
    if not 1 <= k <= MAX_KEYS:
        raise ValueError(f"k={k}: ask for 1 to {MAX_KEYS} keys")


class _All:
    """Every live filter of a source, read anew each time it is iterated."""

    def __init__(self, filters: Any):
        self._filters = filters

    def __iter__(self) -> Any:
        return (piece.filters for piece in units(self._filters))


def _passes(
    source: Iterable[Tensor], keys: Tensor, most: int, tolerance: float, backend: str | None
) -> tuple[Tensor, list[float]]:
    """Assign and update until it no longer helps; the keys, and the mean squared residual before each update."""
    history: list[float] = []
    previous = keys
    for _ in range(most):
        scatter, count, mean, worst = _scatter(source, keys, backend)
        if history and mean >= history[-1] * (1 - tolerance):
            return (keys, [*history, mean]) if mean < history[-1] else (previous, history)
        history.append(mean)
        previous = keys
        keys = _leading(scatter, keys.shape)
        empty = (count == 0).nonzero().flatten().tolist()
        if empty:
            keys[empty[0]] = worst  # one at a time: the others are given theirs by the next passes
    return previous, history


def _scatter(source: Iterable[Tensor], keys: Tensor, backend: str | None) -> tuple[Tensor, Tensor, float, Tensor]:
    """One pass: scatter matrices (K, n, n) float64, filters of each key, mean squared residual, worst-fitted filter."""
    count_keys, taps = len(keys), keys[0].numel()
    scatter = torch.zeros(count_keys, taps, taps, dtype=torch.float64, device=keys.device)
    count = torch.zeros(count_keys, dtype=torch.int64, device=keys.device)
    total, rows = 0.0, 0
    worst, worst_residual = keys[0], -1.0
    for filters in source:
        for x in filters.split(stream.ROWS):
            index, _, _, residual = affine_fit(x, keys, backend=backend)
            order = index.long().argsort(stable=True)
            of_key = torch.bincount(index.long(), minlength=count_keys)
            for j, members in enumerate(x.flatten(1)[order].split(of_key.tolist())):
                scatter[j] += members.T @ members
            count += of_key
            total += float(residual.double().square().sum())
            rows += len(x)
            if len(x) and float(residual.max()) > worst_residual:
                worst_residual = float(residual.max())
                worst = x[residual.argmax()]
    return scatter, count, total / max(rows, 1), worst


def _leading(scatter: Tensor, shape: torch.Size) -> Tensor:
    """The unit eigenvector of the largest eigenvalue of each matrix, as float32 keys of that shape."""
    vectors = torch.linalg.eigh(scatter).eigenvectors[:, :, -1]
    vectors = vectors - vectors.mean(1, keepdim=True)
    keys: Tensor = (vectors / vectors.norm(dim=1, keepdim=True)).float().view(shape)
    return keys


def _draw(residual: Tensor, number: int, rng: np.random.Generator) -> Tensor:
    """Filters by chance proportional to their squared residual, as indices."""
    steps = residual.double().square().cumsum(0)
    ticks = torch.from_numpy(rng.random(number)).to(steps) * steps[-1]
    return torch.searchsorted(steps, ticks, right=True).clamp(max=len(steps) - 1)


def _seed(x: Tensor, k: int, rng: np.random.Generator, backend: str | None) -> Tensor:
    """Greedy k-means++ with 1 - <x, q>^2 as the squared distance."""
    tries = 2 + int(np.log(k))
    chosen = x[rng.integers(len(x), size=1)]
    while len(chosen) < k:
        residual = affine_fit(x, chosen, backend=backend).residual
        if float(residual.max()) < NOISE:
            raise ValueError(
                f"the filters are linear shifts of only {len(chosen)} different ones: there are no {k} keys in them"
            )
        candidates = x[_draw(residual, tries, rng)]
        left = [torch.minimum(1 - cos, residual.square()).double().sum() for cos in _squared_cosines(x, candidates)]
        chosen = torch.cat([chosen, candidates[int(torch.stack(left).argmin())][None]])
    return chosen


def _squared_cosines(x: Tensor, candidates: Tensor) -> Tensor:
    """(M, N) squared correlation of every candidate with every filter."""
    return (candidates.flatten(1) @ x.flatten(1).T).square()


def _improve(
    x: Tensor, keys: Tensor, mean: float, rng: np.random.Generator, most: int, tolerance: float, backend: str | None
) -> tuple[Tensor, list[float]] | None:
    """Try the most promising moves out of a local minimum; the first after which passes end below `mean`, or None."""
    for moved in _moves(x, keys, rng, backend):
        found, history = _passes([x], moved, most, tolerance, backend)
        if history[-1] < mean * (1 - tolerance):
            return found, history
    return None


def _moves(x: Tensor, keys: Tensor, rng: np.random.Generator, backend: str | None) -> list[Tensor]:
    """Key sets that differ from `keys` by a move, the one that promises the lowest mean squared residual first.

    A move gives up one key and either adds a filter, drawn in proportion to its squared residual, which finds a kind of
    filter that has no key; or splits another key along the second eigenvector of its scatter matrix, which parts two
    similar keys that share a cluster. The two best keys of each filter tell what giving up any key costs.
    """
    count = len(keys)
    if count == 1:
        return []
    fit = affine_fit(x, keys, topk=2, backend=backend)
    index = fit.index[:, 0].long()
    first, second = fit.residual.square().T
    flat = x.flatten(1)
    additions: list[tuple[int | None, Tensor]] = [
        (None, filter_[None]) for filter_ in flat[_draw(fit.residual[:, 0], ADDITIONS, rng)]
    ]
    scatter = _scatter([x], keys, backend)[0]
    additions += [(j, halves) for j, halves in enumerate(_halves(scatter))]
    promised = []
    for split, added in additions:
        distance = 1 - (flat @ added.T).square().amax(1)
        stays = torch.minimum(first, distance)
        loses = torch.minimum(second, distance)
        if split is not None:
            stays = torch.where(index == split, loses, stays)
        costs = torch.zeros(count, dtype=torch.float64, device=x.device).index_add_(0, index, (loses - stays).double())
        if split is not None:
            costs[split] = torch.inf
        given_up = int(costs.argmin())
        kept = [j for j in range(count) if j not in (split, given_up)]
        promised.append(
            (float(stays.double().sum() + costs[given_up]), torch.cat([keys[kept], added.view(-1, *keys.shape[1:])]))
        )
    promised.sort(key=lambda move: move[0])
    return [moved for _, moved in promised[:TRIED]]


def _halves(scatter: Tensor) -> list[Tensor]:
    """Two unit keys (2, n) for each cluster, turned from its key to both sides along its second eigenvector."""
    values, vectors = torch.linalg.eigh(scatter)
    angle = (values[:, -2].clamp(min=0) / values[:, -1].clamp(min=1e-30)).sqrt().atan()[:, None]
    along, across = angle.cos() * vectors[:, :, -1], angle.sin() * vectors[:, :, -2]
    return list(torch.stack([along + across, along - across], 1).float())
