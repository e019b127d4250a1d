"""pytest benchmarks/: naming filters, from members of the family to what looks like none of them."""

import os

import pytest
import torch

from mkf.analysis import identify
from mkf.keys.family import KINDS

COUNT = int(os.environ.get("MKF_BENCH_FILTERS", "20000"))


def planted(count: int, noise: float) -> torch.Tensor:
    """As many filters (7, 7) of each kind, scales .3 to 1.3, with noise of that part of their norm."""
    generator = torch.Generator().manual_seed(0)
    filters = torch.empty(count, 7, 7)
    for number, kind in enumerate(KINDS):
        rows = filters[number :: len(KINDS)]
        scales = 0.3 + torch.rand(len(rows), 2, generator=generator, dtype=torch.float64)
        if not kind.separable:
            scales[:, 1] = 0.7  # whose square is the weight of the Laplacian
        members = kind.members(scales.square(), 7)[:, 0]
        members -= members.mean((1, 2), keepdim=True)
        rows.copy_(members / members.flatten(1).norm(dim=1)[:, None, None])
    return filters + noise / 7 * torch.randn(filters.shape, generator=generator)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_identify(benchmark, noise):
    filters = planted(COUNT, noise)
    identify(filters[:100])  # the grids are made once
    benchmark.extra_info.update(filters=COUNT, noise=noise)
    benchmark.pedantic(identify, (filters,), rounds=3)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["filters/s"] = round(COUNT / benchmark.stats["median"])
