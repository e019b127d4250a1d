"""pytest benchmarks/: the key convolution over shapes, kinds of keys, dtypes and modes, and that the peers agree."""

import pytest
import torch

from mkf.benchmarks import key_conv2d as suite
from mkf.benchmarks import models
from mkf.benchmarks.peers.key_conv2d import PEERS
from mkf.keys import paper8

SMALL = (1, 16, 14)


@pytest.mark.parametrize("name", list(PEERS))
def test_peers_agree(name):
    layer = suite.layer("published", 16)
    peer = PEERS[name](layer.weight.detach(), layer.bias.detach())
    x = torch.randn(2, 16, 9, 9)
    torch.testing.assert_close(peer(x), layer(x), atol=1e-4, rtol=1e-4)


def test_variants_of_a_network_agree():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 16, 7, padding=3, groups=16))
    made = models.variants(model, paper8())
    x = torch.randn(2, 3, 9, 9)
    for name in (models.FROZEN, models.BIAS_ADDED):
        torch.testing.assert_close(made[name](x), made[models.MKF](x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[models.NONE](x), model[0](x))


def _bench(benchmark, shape, case, mode, dtype, name):
    found = suite.candidates(shape, case, mode, dtype)
    benchmark.group = f"{shape}, {case}, {mode}, {dtype}"
    benchmark.extra_info.update(shape=str(shape), case=case, mode=mode, dtype=str(dtype))
    benchmark(found[name])


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", list(suite.CASES))
@pytest.mark.parametrize("name", list(suite.candidates(SMALL)))
def test_cases(benchmark, name, case, mode):
    _bench(benchmark, (8, 192, 28), case, mode, torch.float32, name)


@pytest.mark.parametrize("shape", suite.SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mkf, channels-last", "mkf, NCHW", "nn.Conv2d, channels-last", "nn.Conv2d, NCHW"])
def test_shapes(benchmark, name, shape):
    _bench(benchmark, shape, "analytic, blocks", "forward", torch.float32, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mkf, channels-last", "nn.Conv2d, channels-last", "nn.Conv2d, NCHW"])
def test_dtypes(benchmark, name, dtype):
    _bench(benchmark, (8, 192, 28), "analytic, blocks", "forward", dtype, name)
