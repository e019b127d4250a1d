"""Principal components: the plain answer that a search has to beat."""

from typing import Any

import torch

from mkf.keys import KeySet
from mkf.search.clusters import check_count
from mkf.search.sample import positive, units


def pca(filters: Any, k: int = 8) -> KeySet:
    """The k leading eigenvectors of sum over i of x_i x_i^T, x_i the filters centred and of norm 1.

    They are the best k keys if a filter may be a combination of all of them; one at a time they are a baseline. The
    filters are read once, as a stream.

    Args:
        filters: A `FilterBank` of one kernel size, a tensor (N, k, k) or (N, k * k), or an array, also memory-mapped.
            Dead filters and those that are not finite are left out.
        k: Number of keys, 1 to 256, and fewer than the filters' taps: centred filters have no more dimensions.

    Returns:
        The keys, the one of the largest eigenvalue first, each turned so that its largest tap is positive.

    Raises:
        ValueError: k out of range, filters that do not span k dimensions, several kernel sizes, or a shape that is no
            filter's.
        TypeError: Filters that are no floating-point numbers.
    """
    check_count(k)
    scatter, live, size = torch.zeros(()), 0, 0
    for piece in units(filters):
        x, size = piece.filters.flatten(1), piece.filters.shape[-1]
        scatter = scatter.to(x.device) + (x.T @ x).double()
        live += len(x)
    values, vectors = torch.linalg.eigh(scatter.cpu())
    dimensions = int((values > 1e-5 * live).sum())
    if k > dimensions:
        raise ValueError(
            f"k={k}: {live} filters that vary span {dimensions} dimensions, so there are no more components"
        )
    keys = vectors[:, -k:].T.flip(0)
    keys = positive((keys - keys.mean(1, keepdim=True)).view(k, size, size))
    return KeySet(keys, provenance=f"principal components of {live:,} filters")
