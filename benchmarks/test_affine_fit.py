"""pytest benchmarks/: the affine fit over sizes, keys, kernel sizes and dtypes, and that the peers compute the same."""

import os

import pytest
import torch

from mkf.benchmarks import affine_fit as suite
from mkf.benchmarks.peers import affine_fit as peers
from mkf.ops import affine_fit

COUNT = int(os.environ.get("MKF_BENCH_FILTERS", "100000"))


@pytest.mark.parametrize("name", list(peers.available()))
def test_peers_agree(name):
    filters, keys = suite.problem(1000, 8, 7, torch.float32)
    ours = affine_fit(filters, keys)
    theirs = peers.available()[name](keys.flatten(1))(filters)
    assert (torch.as_tensor(theirs[0]) == ours.index).float().mean() > 0.99
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(torch.as_tensor(other).float(), mine, atol=1e-3, rtol=1e-3)


def _bench(benchmark, name, **problem):
    filters, keys = suite.problem(**problem)
    benchmark.group = ", ".join(f"{key}={value}" for key, value in problem.items())
    benchmark.extra_info.update({key: str(value) for key, value in problem.items()})
    benchmark(suite.candidates(filters, keys)[name])


@pytest.mark.parametrize("keys_count", [8, 50])
@pytest.mark.parametrize("name", list(suite.candidates(*suite.problem(1, 1, 3, torch.float32))))
def test_peers(benchmark, name, keys_count):
    _bench(benchmark, name, count=COUNT, keys_count=keys_count, k=7, dtype=torch.float32)


@pytest.mark.parametrize("keys_count", [1, 8, 16, 50, 256])
@pytest.mark.parametrize("name", [suite.READ, "mkf native"])
def test_number_of_keys(benchmark, name, keys_count):
    _bench(benchmark, name, count=COUNT, keys_count=keys_count, k=7, dtype=torch.float32)


@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("name", [suite.READ, "mkf native"])
def test_kernel_size(benchmark, name, k):
    _bench(benchmark, name, count=COUNT, keys_count=8, k=k, dtype=torch.float32)


@pytest.mark.parametrize("dtype", list(suite.DTYPES.values()), ids=list(suite.DTYPES))
@pytest.mark.parametrize("name", [suite.READ, "mkf native"])
def test_dtype(benchmark, name, dtype):
    _bench(benchmark, name, count=COUNT, keys_count=8, k=7, dtype=dtype)


@pytest.mark.parametrize("count", [1, 1000, 100_000])
@pytest.mark.parametrize("name", [suite.READ, "mkf native"])
def test_number_of_filters(benchmark, name, count):
    _bench(benchmark, name, count=count, keys_count=8, k=7, dtype=torch.float32)
