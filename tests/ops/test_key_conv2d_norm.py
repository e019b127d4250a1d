"""The key convolution with a LayerNorm after it, in one pass and in two, against float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import mkf
from mkf.kernels import extension
from mkf.ops import key_conv2d_layer_norm
from mkf.ops.key_conv2d import compute
from tests.kernels.runs_here import cpu_runs
from tests.ops.key_conv2d_problems import noise

pytestmark = pytest.mark.usefixtures("poisoned")

NAMES = "x", "scale", "shift", "bias", "weight", "norm_bias"
needs_kernel = pytest.mark.skipif(extension.missing() is not None, reason="needs the C++ extension")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def passes(monkeypatch):
    """What each pass in one was asked for; empty where both operations ran one after the other."""
    seen = []
    for name in ("forward_norm", "gradients_norm"):
        run = getattr(compute, name)
        monkeypatch.setattr(compute, name, lambda *a, run=run, name=name, **k: (seen.append(name), run(*a, **k))[1])
    return seen


class Problem:
    """Tensors of one call, and what torch makes of them with the filters written out."""

    def __init__(self, shape, k=7, stride=1, eps=1e-6, bias=True, layout=torch.channels_last, offset=0.0, seed=0):
        n, c, h, w = shape
        self.keys = torch.cat([mkf.keys.random(k, 4, seed).filters, mkf.keys.analytic("B", k).filters[:4]])
        self.index = torch.randint(8, (c,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        self.x = noise(n, c, h, w, seed=seed + 1).contiguous(memory_format=layout)
        self.scale, self.weight, self.norm_bias = (noise(c, seed=seed + i) for i in (2, 3, 4))
        self.shift = 0.3 * noise(c, seed=seed + 5)
        self.bias = noise(c, seed=seed + 6) + offset if bias else None
        self.eps, self.options = eps, {"stride": stride, "padding": k // 2}

    def leaves(self, wanted=NAMES):
        for name in NAMES:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.requires_grad_(name in wanted)
        return [t for name in wanted if (t := getattr(self, name)) is not None]

    def ours(self):
        affine = self.scale, self.shift, self.bias, self.weight, self.norm_bias
        return key_conv2d_layer_norm(self.x, self.keys, self.index, *affine, self.eps, **self.options)

    def torchs(self, dtype, x, scale, shift, bias, weight, norm_bias):
        filters = scale[:, None, None] * self.keys.to(dtype)[self.index] + shift[:, None, None]
        y = F.conv2d(x, filters[:, None], bias, **self.options, groups=len(scale))
        return F.layer_norm(y.permute(0, 2, 3, 1), (len(scale),), weight, norm_bias, self.eps).permute(0, 3, 1, 2)

    def reference(self, dtype, wanted):
        given = {name: None if (t := getattr(self, name)) is None else t.detach().to(dtype) for name in NAMES}
        leaves = [t.requires_grad_() for name in wanted if (t := given[name]) is not None]
        out = self.torchs(dtype, *given.values())
        return [out, *torch.autograd.grad(out, leaves, self.dy(out).to(dtype))]

    def dy(self, out):
        return noise(*out.shape, seed=9)

    def check(self, wanted=NAMES):
        leaves = self.leaves(wanted)
        out = self.ours()
        results = [out, *torch.autograd.grad(out, leaves, self.dy(out).contiguous(memory_format=torch.channels_last))]
        exact, theirs = (self.reference(dtype, wanted) for dtype in (torch.float64, torch.float32))
        for got, right, other in zip(results, exact, theirs, strict=True):
            assert got.shape == right.shape
            error, reference = ((t - right).norm().item() for t in (got, other))
            assert error <= 3 * reference + 1e-6 * right.norm().item()
        return results


@needs_kernel
@pytest.mark.parametrize("isa", extension.ISAS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 2, 5),
        (2, 17, 6, 7),
        (3, 40, 9, 8),
        (2, 100, 5, 9),
        (4, 96, 14, 14),
        (5, 23, 7, 7),
        (2, 31, 33, 35),
        (1, 48, 40, 60),
    ],
)
def test_one_pass_against_float64(shape, isa, passes, monkeypatch):
    if not cpu_runs(isa):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("MKF_ISA", isa)
    problem = Problem(shape)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results = problem.check()
        if count == 1:
            first = results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))  # whatever the number of threads
    assert passes.count("gradients_norm") == 3
    with torch.no_grad():  # the convolution is not kept
        assert torch.equal(problem.ours(), first[0])


@needs_kernel
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 3)])
def test_small_images_are_normalised_afterwards(size, passes):
    Problem((20, 33, *size)).check()
    assert "gradients_norm" not in passes


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_size_and_any_gradients(data):
    shape = [data.draw(st.integers(1, most)) for most in (4, 120, 12, 12)]
    shape[1] += 15
    k, stride = data.draw(st.sampled_from([3, 5, 7, 9, 11])), data.draw(st.sampled_from([1, 2]))
    wanted = data.draw(st.lists(st.sampled_from(NAMES[:3] + NAMES[4:]), min_size=1, unique=True))
    Problem(shape, k, stride, bias=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99))).check(wanted)


@pytest.mark.parametrize("shape", [(2, 24, 8, 9), (1, 48, 40, 60)])  # the second by two threads
@pytest.mark.parametrize("wanted", [["bias"], ["shift", "bias"], ["weight"], ["norm_bias"], ["x"]])
def test_some_gradients(wanted, shape, passes):
    torch.set_num_threads(2)
    Problem(shape).check(wanted)
    assert extension.missing() or "gradients_norm" in passes


def test_gradients_of_many_pixels():
    problem = Problem((4, 16, 200, 200), k=3)
    leaves = problem.leaves(["weight", "norm_bias"])
    out = problem.ours()
    gradients = torch.autograd.grad(out, leaves, problem.dy(out).contiguous(memory_format=torch.channels_last))
    for got, right in zip(gradients, problem.reference(torch.float64, ["weight", "norm_bias"])[1:], strict=True):
        assert (got - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("options", [{"eps": 0.1}, {"offset": 1e4}, {"stride": 2}, {"k": 3}])
def test_large_offsets_and_other_options(options):
    Problem((2, 32, 10, 9), **options).check()


@pytest.mark.parametrize("channels", [17, 20, 96, 768])
@pytest.mark.parametrize("value", [3.0, -1000.1, 10000.3])
def test_pixels_that_are_constant(channels, value):
    problem = Problem((2, channels, 3, 5))
    problem.scale.zero_(), problem.shift.zero_(), problem.bias.fill_(value)
    assert torch.equal(problem.ours(), problem.norm_bias[:, None, None].expand(2, channels, 3, 5))


def test_pixels_that_are_not_finite():
    other = Problem((2, 20, 20, 9))
    other.x[1, 3, 0, 0] = float("nan")
    other.ours()
    lost = other.ours().isnan()
    assert lost[1, :, :4, :4].all()
    assert lost.sum() == lost[1, :, :4, :4].numel()  # its windows, in all channels


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "x", p.x.contiguous()),
        lambda p: setattr(p, "x", p.x[:0]),
        lambda p: setattr(p, "weight", noise(64, seed=8)[::2]),
        lambda p: setattr(p, "norm_bias", torch._neg_view(p.norm_bias)),
        lambda p: p.__init__((2, 8, 6, 7)),
        lambda p: p.options.update(padding=2),
        lambda p: p.keys.requires_grad_(),
    ],
)
def test_what_is_not_one_pass_is_two(change, passes):
    problem = Problem((2, 32, 6, 7))
    change(problem)
    given = [getattr(problem, name) for name in NAMES]
    for _ in range(3):
        torch.testing.assert_close(problem.ours(), problem.torchs(torch.float32, *given), rtol=1e-4, atol=1e-4)


def test_autocast_and_other_dtypes_are_torchs():
    problem = Problem((2, 32, 6, 7))
    problem.ours()
    with torch.autocast("cpu", torch.bfloat16):
        y = mkf.ops.key_conv2d(
            problem.x, problem.keys, problem.index, problem.scale, problem.shift, problem.bias, padding=3
        )
        expected = F.layer_norm(y.movedim(1, -1), (32,), problem.weight, problem.norm_bias, problem.eps)
        assert torch.equal(problem.ours().movedim(1, -1), expected)
    wide, problem.x = problem.ours(), problem.x.bfloat16()
    torch.testing.assert_close(problem.ours().float(), wide, rtol=0.1, atol=0.1)
    problem.weight = problem.weight[:16]
    with pytest.raises(RuntimeError, match="32"):
        problem.ours()


def test_an_image_without_a_batch():
    problem = Problem((1, 32, 6, 7))
    expected = problem.ours()[0]
    problem.x = problem.x[0]
    torch.testing.assert_close(problem.ours(), expected)


@pytest.mark.parametrize("wanted", [NAMES, ["x", "weight"], ["shift"]])
def test_second_derivatives_and_many_gradients_at_once(wanted):
    problem = Problem((2, 18, 5, 6), k=3)
    leaves = problem.leaves(wanted)
    problem.ours()

    def penalty(out):
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    double = [getattr(problem, name).detach().double().requires_grad_(name in wanted) for name in NAMES]
    exact_leaves = [t for name, t in zip(NAMES, double, strict=True) if name in wanted]
    exact = torch.autograd.grad(problem.torchs(torch.float64, *double).square().sum(), exact_leaves, create_graph=True)
    exact = torch.autograd.grad(sum(g.square().sum() for g in exact), exact_leaves)
    for got, right in zip(penalty(problem.ours()), exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-3 * right.abs().max().item())

    out = problem.ours()
    dy = noise(3, *out.shape)
    many = torch.autograd.grad(out, leaves, dy, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, leaves, d, retain_graph=True) for d in dy]
    for together, each in zip(many, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(each), rtol=1e-3, atol=1e-3)


def test_parameters_that_are_replaced_or_change_between_forward_and_backward():
    problem = Problem((2, 32, 6, 7))
    leaves = problem.leaves()
    problem.ours()
    out = problem.ours()
    expected = torch.autograd.grad(out, leaves, problem.dy(out), retain_graph=True)
    problem.scale.data = copy.deepcopy(problem.scale.data)
    again = torch.autograd.grad(out, leaves, problem.dy(out), retain_graph=True)
    for a, b in zip(expected, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        problem.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, problem.dy(out))
    assert all(torch.isfinite(t).all() for t in torch.autograd.grad(problem.ours().sum(), leaves))


def test_saved_tensors_may_be_stored_elsewhere():
    problem = Problem((2, 32, 6, 7))
    leaves = problem.leaves()
    problem.ours()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().numpy(), torch.from_numpy):
        out = problem.ours()
    expected = torch.autograd.grad(problem.ours(), leaves, problem.dy(out))
    for a, b in zip(torch.autograd.grad(out, leaves, problem.dy(out)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # In another order; scale and shift lie where they lay.
    stores = (
        lambda t: t.contiguous() if t.ndim == 4 else t,
        lambda t: torch.stack([t, t], 1)[:, 0] if t is problem.weight else t,
    )
    for store in stores:
        with torch.autograd.graph.saved_tensors_hooks(store, lambda t: t):
            out = problem.ours()
        for a, b in zip(torch.autograd.grad(out, leaves, problem.dy(out)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compile_and_export_see_both_operations():
    problem = Problem((2, 32, 6, 7))
    leaves = problem.leaves()
    out = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(out, problem.ours(), rtol=1e-4, atol=1e-4)
    gradients = (torch.autograd.grad(y, leaves, problem.dy(y)) for y in (out, problem.ours()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
