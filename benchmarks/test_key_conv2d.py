"""pytest benchmarks/: the key convolution over shapes, kinds of keys, dtypes and modes, and that the peers agree."""

import pytest
import torch

from mkf.benchmarks import key_conv2d as suite
from mkf.benchmarks import key_conv2d_gpu, models
from mkf.benchmarks.peers.key_conv2d import PEERS
from mkf.kernels import extension
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


@pytest.mark.skipif(extension.missing() is not None, reason="needs an implementation for the CPU")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", list(key_conv2d_gpu.FORMS))
def test_candidates_of_the_gpu_suite_agree(form, backward):
    """On the CPU, with its implementations."""
    cpu, shape = torch.device("cpu"), (2, 64, 9, 9)
    found = key_conv2d_gpu.candidates(form, shape, backward, torch.float32, cpu)
    assert [name for name in found if name.startswith("mkf")] == ["mkf native"]
    x, other, out = key_conv2d_gpu.turns(shape, torch.channels_last, torch.float32, cpu, 1 << 16)[0]
    key_conv2d_gpu.check(found, [(x, other, out)])
    expected = found["torch NCHW"](x.contiguous(), other.contiguous(), out)
    torch.testing.assert_close(found["mkf native"](x, other, out), expected, atol=1e-4, rtol=1e-4)
    assert found["mkf native"](x, other, out) is out
    with pytest.raises(RuntimeError, match="mkf native is off by"):
        key_conv2d_gpu.check(found | {"mkf native": lambda x, *_: x}, [(x, other, out)])


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
