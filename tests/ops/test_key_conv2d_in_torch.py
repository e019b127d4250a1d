"""The key convolution among torch's machinery: kept calls, autocast, torch.compile, tracing, dispatch modes.

What it computes is tested in test_key_conv2d.py, its derivatives in test_key_conv2d_derivatives.py.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mkf
from mkf.kernels import extension
from mkf.kernels.key_conv2d import structure
from mkf.ops import key_conv2d
from mkf.ops.key_conv2d import compute, eager
from tests.ops.key_conv2d_problems import KEYS, Problem, call_and_keep, noise

pytestmark = pytest.mark.usefixtures("poisoned")


class TestKeptCalls:
    @pytest.mark.skipif(extension.missing() is not None, reason="calls are kept for what the extension computes")
    def test_inputs_that_take_turns_are_all_kept(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        _, *others = problem.tensors()
        options = 1, 3, 1, 0.0, None
        first = [
            noise(2, 12, 9, 8),
            noise(2, 12, 9, 8).contiguous(memory_format=torch.channels_last),
            noise(2, 12, 9, 8).requires_grad_(),
            noise(2, 12, 8, 9),
        ]
        found = []
        for _ in range(2):
            for x in first:
                key_conv2d(x, *others, padding=3)
            found.append([eager.find(x, *others, options) for x in first])
        assert len({id(call) for call in found[0]}) == len(first)
        assert None not in found[0]
        assert all(one is other for one, other in zip(*found, strict=True))

    @pytest.mark.skipif(extension.missing() is not None, reason="calls are kept for what the extension computes")
    def test_those_that_do_not_hold_any_more_make_room(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])

        def check():
            out, exact = key_conv2d(*problem.tensors(), padding=3), problem.torch(torch.float64, *problem.tensors())
            torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)

        for key in range(3):
            problem.index[:] = key
            check()
        assert len(eager._kept[id(problem.scale)]) == 1
        for height in range(5, 5 + 2 * eager.KEPT_OF_EACH):
            problem.x = noise(1, 12, height, 8)
            check()
        kept = [entry.call.x_size[2] for entry in eager._kept[id(problem.scale)]]
        assert kept == list(range(height, height - eager.KEPT_OF_EACH, -1))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
    def test_an_index_of_any_integers(self, dtype):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        problem.index = problem.index.to(dtype)
        problem.x.requires_grad_()
        call_and_keep(problem)
        problem.index[:] = 3
        out = key_conv2d(*problem.tensors(), padding=3)
        problem.index = problem.index.int()
        assert torch.equal(out, key_conv2d(*problem.tensors(), padding=3))
        problem.check(key_conv2d)

    @pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.double, lambda keys: keys.mT])
    def test_keys_of_any_dtype_and_strides(self, change, monkeypatch):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        problem.keys = change(problem.keys)
        out = key_conv2d(*problem.tensors(), padding=3)
        monkeypatch.setattr(structure, "find", None)  # their plan is known
        assert torch.equal(out, key_conv2d(*problem.tensors(), padding=3))
        torch.testing.assert_close(out, problem.torch(torch.float64, *problem.tensors()).float(), rtol=1e-4, atol=1e-4)

    def test_sizes_share_the_copy_of_the_index(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        _, *others = problem.tensors()
        calls = [
            compute.prepare(noise(2, 12, h, 8), *others[:4], (1, 1), (3, 3), (1, 1), 0.0, "reference") for h in (8, 9)
        ]
        assert calls[0].index is calls[1].index
        assert calls[0].index is not problem.index

    def test_options_that_change_in_place_are_seen(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        padding = [3, 3]
        for _ in range(2):
            assert key_conv2d(*problem.tensors(), padding=padding).shape[2:] == (9, 8)
        padding[:] = 0, 0
        assert key_conv2d(*problem.tensors(), padding=padding).shape[2:] == (3, 2)

    def test_they_go_with_their_parameters(self):
        class Owner:
            pass

        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        problem.scale.owner = Owner()
        before, owner = len(eager._kept), weakref.ref(problem.scale.owner)
        call_and_keep(problem)
        del problem
        gc.collect()
        assert owner() is None
        assert len(eager._kept) <= before

    @pytest.mark.parametrize("train", [False, True])
    def test_defaults_of_torch_do_not_matter(self, train):
        for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
            problem = Problem((2, 12, 9, 8), mkf.keys.random(7, 8, 5).filters.clone())  # whose plan is not known yet
            problem.keys.mul_(1 + len(str(dtype)) / 1000 + len(device) / 1e4).requires_grad_(train)
            try:
                torch.set_default_dtype(dtype)
                with torch.device(device):
                    out = key_conv2d(*problem.tensors(), padding=3)
            finally:
                torch.set_default_dtype(torch.float32)
            expected = problem.torch(torch.float64, *problem.tensors())
            torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=1e-4, atol=1e-4)


class TestAutocast:
    def test_the_input_is_cast_and_the_parameters_are_not(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        leaves = [t.requires_grad_() for t in (problem.x, problem.scale, problem.shift, problem.bias)]
        with torch.autocast("cpu", torch.bfloat16):
            out = key_conv2d(*problem.tensors(), padding=3)
            wide = key_conv2d(problem.x.double(), *problem.tensors()[1:], padding=3)
        assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
        half = key_conv2d(problem.x.bfloat16(), *problem.tensors()[1:], padding=3)
        assert torch.equal(out, half)

    def test_each_dtype_is_a_call_of_its_own(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"], dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                assert key_conv2d(*problem.tensors(), padding=3).dtype == dtype

    def test_integers_are_still_refused(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="int64"):
            key_conv2d(problem.x.long(), *problem.tensors()[1:], padding=3)


def operator_samples():
    for view in (
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:],
        lambda x: x.bfloat16(),
    ):
        for stride, bias in (((1, 1), True), ((2, 2), False)):
            problem = Problem((2, 10, 9, 8), KEYS["centred"], bias=bias)
            x, keys, *rest = problem.tensors()
            x = view(x)
            yield x, keys, *rest, stride, (3, 3), (1, 1), 0.0, ""


@pytest.mark.parametrize("number", range(12))
def test_opcheck(number, monkeypatch):
    torch.use_deterministic_algorithms(False)
    sample = list(operator_samples())[number]
    torch.library.opcheck(torch.ops.mkf.key_conv2d, sample)
    x, keys, index, scale, shift, bias, *options = sample
    trained = (x, keys, index, *(None if t is None else t.clone().requires_grad_() for t in (scale, shift, bias)))
    torch.library.opcheck(torch.ops.mkf.key_conv2d, (*trained, *options))
    dy = torch.randn_like(torch.ops.mkf.key_conv2d(*sample))
    for wanted in ((True,) * 5, (True, False, False, True, True)):
        saved = x if wanted[2] or wanted[3] else None
        arguments = (dy, saved, keys, index, scale, shift, wanted, x.shape, *options)
        torch.library.opcheck(torch.ops.mkf.key_conv2d_backward, arguments)


class TestCompile:
    def test_one_graph_for_every_size(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"], layout="nhwc")
        keys, index, *parameters = problem.tensors()[1:]

        def function(x, scale, shift, bias):
            return key_conv2d(x * 2, keys, index, scale, shift, bias, padding="same").relu()

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        graphs = []
        for size in ((2, 12, 9, 11), (3, 12, 14, 20), (4, 12, 5, 6)):  # no two numbers alike by chance
            results = []
            for run in (function, compiled):
                x = noise(*size).to(memory_format=torch.channels_last)
                leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
                out = run(*leaves)
                results.append((out, *torch.autograd.grad(out.sum(), leaves)))
            for uncompiled, other in zip(*results, strict=True):
                torch.testing.assert_close(other, uncompiled)
                assert other.stride() == uncompiled.stride()
            graphs.append(counter.frame_count)
        assert graphs[0] == graphs[-1]

    def test_values_are_refused_at_run_time(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        compiled = torch.compile(key_conv2d, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*problem.tensors(), padding=3), key_conv2d(*problem.tensors(), padding=3))
        problem.index[3] = 8
        with pytest.raises(ValueError, match="channel 3"):
            compiled(*problem.tensors(), padding=3)

    def test_meta_tensors(self):
        tensors = [t.to("meta") for t in Problem((2, 12, 9, 8), KEYS["centred"], layout="nhwc").tensors()]
        out = torch.ops.mkf.key_conv2d(*tensors, (2, 2), (3, 3), (1, 1), 0.0, "")
        assert out.shape == (2, 12, 5, 4)
        assert out.is_contiguous(memory_format=torch.channels_last)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [False, True])
class TestWatchers:
    """Whatever looks at torch's operators sees this one, also where the same call was made and kept before."""

    @pytest.fixture
    def problem(self, kept):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        if kept:
            call_and_keep(problem)
        return problem

    def test_dispatch_modes(self, problem):
        with Watch() as watch:
            key_conv2d(*problem.tensors(), padding=3)
        assert "mkf.key_conv2d.default" in watch.seen

    def test_dispatch_modes_and_the_profiler_backward(self, problem):
        problem.x.requires_grad_()
        outs = [key_conv2d(*problem.tensors(), padding=3) for _ in range(3)]
        outs[0].sum().backward()
        dy = torch.ones_like(outs[0])
        torch.autograd.grad(outs[1], problem.x, dy, retain_graph=True)
        with Watch() as watch:
            torch.autograd.grad(outs[1], problem.x, dy)
        assert "mkf.key_conv2d_backward.default" in watch.seen
        with torch.profiler.profile() as profile:
            torch.autograd.grad(outs[2], problem.x, dy)
        assert "mkf::key_conv2d_backward" in {event.key for event in profile.key_averages()}

    def test_the_profiler(self, problem):
        with torch.profiler.profile() as profile:
            key_conv2d(*problem.tensors(), padding=3)
        assert "mkf::key_conv2d" in {event.key for event in profile.key_averages()}

    def test_tracing_records_the_operator(self, problem):
        rest = problem.tensors()[1:]
        traced = torch.jit.trace(lambda x: key_conv2d(x, *rest, padding=3), problem.x)
        assert "mkf::key_conv2d" in str(traced.graph)
        torch.testing.assert_close(traced(problem.x + 1), key_conv2d(problem.x + 1, *rest, padding=3))
        graph = make_fx(lambda x: key_conv2d(x, *rest, padding=3))(problem.x)
        assert "mkf.key_conv2d.default" in graph.code

    def test_compiling(self, problem):
        compiled = torch.compile(key_conv2d, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*problem.tensors(), padding=3), key_conv2d(*problem.tensors(), padding=3))

    def test_forward_mode_and_transforms(self, problem):
        x, *rest = problem.tensors()
        tangent = noise(*x.shape, seed=1)
        expected = key_conv2d(tangent, *rest[:4], None, padding=3)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            out = torch.autograd.forward_ad.unpack_dual(key_conv2d(dual, *rest, padding=3))
        torch.testing.assert_close(out.tangent, expected)
        _, tangent_out = torch.func.jvp(lambda x: key_conv2d(x, *rest, padding=3), (x,), (tangent,))
        torch.testing.assert_close(tangent_out, expected)
        together = torch.func.vmap(lambda x: key_conv2d(x, *rest, padding=3))(torch.stack([x, tangent]))
        torch.testing.assert_close(together[0], key_conv2d(x, *rest, padding=3))

    def test_autocast_and_inference_mode_come_and_go(self, problem):
        ordinary = key_conv2d(*problem.tensors(), padding=3)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(2):
                    assert key_conv2d(*problem.tensors(), padding=3).dtype == torch.bfloat16
            with torch.inference_mode():
                for _ in range(2):
                    out = key_conv2d(*problem.tensors(), padding=3)
                    assert out.is_inference()
                    assert torch.equal(out, ordinary)
            out = key_conv2d(*problem.tensors(), padding=3)
            assert not out.is_inference()
            assert torch.equal(out, ordinary)

    @pytest.mark.parametrize("x", [None, [1.0], np.zeros((2, 12, 9, 8), np.float32)])
    def test_what_is_no_tensor_is_refused(self, problem, x):
        with pytest.raises(TypeError, match="x: expected a tensor"):
            key_conv2d(x, *problem.tensors()[1:], padding=3)


def test_keys_that_are_a_negative_view():
    problem = Problem((2, 12, 9, 8), mkf.keys.random(7, 8, 5).filters * 1.01)  # whose plan is not known yet
    mkf.ops.explain_key_conv2d(problem.x, torch._neg_view(problem.keys.clone()), padding=3)
    problem.check(key_conv2d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operator_takes_a_bias_of_any_dtype(dtype):
    problem = Problem((2, 12, 9, 8), KEYS["centred"])
    problem.bias = problem.bias.to(dtype)
    options = [1, 1], [3, 3], [1, 1], 0.0, ""
    out = torch.ops.mkf.key_conv2d(*problem.tensors(), *options)
    torch.testing.assert_close(out, problem.torch(torch.float64, *problem.tensors()).float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), but x has 12 channels"):
        torch.ops.mkf.key_conv2d(*problem.tensors()[:5], torch.zeros(1), *options)


def test_tensors_without_memory_of_their_own():
    problem = Problem((2, 12, 9, 8), KEYS["centred"])
    rest = problem.tensors()[1:]
    out = key_conv2d(torch._to_functional_tensor(problem.x), *rest, padding=3)
    torch.testing.assert_close(torch._from_functional_tensor(out), key_conv2d(problem.x, *rest, padding=3))
    zeros = key_conv2d(torch._efficientzerotensor((2, 12, 9, 8)), *rest, padding=3)
    torch.testing.assert_close(zeros, key_conv2d(torch.zeros(2, 12, 9, 8), *rest, padding=3))


def test_negated_views():
    problem = Problem((2, 12, 9, 8), KEYS["centred"])
    rest = problem.tensors()[1:]
    x = torch._neg_view(noise(2, 12, 9, 8))  # as the imaginary part of a conjugate is, but contiguous
    assert x.is_neg()
    torch.testing.assert_close(key_conv2d(x, *rest, padding=3), key_conv2d(x.resolve_neg(), *rest, padding=3))
