"""Every implementation of the key convolution for a CPU against float64, called as `mkf.ops` calls it.

What is the same for all, from what is refused to derivatives and layouts, is tested in tests/ops.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkf import keys as key_sets
from mkf.kernels import extension, registry
from mkf.kernels.key_conv2d.plan import make_plan
from tests.kernels import key_conv2d_float64 as float64
from tests.kernels.runs_here import cpu_runs, runnable

CPU = torch.device("cpu")
GRADIENTS = ("dx", "d_scale", "d_shift", "d_bias")
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of the norm of an output; bfloat16 rounds at 2^-9
SUM_ERROR = 2e-6  # of gradients that are sums, float32 in any case, relative to the norm of what is summed up


@pytest.fixture(params=runnable("key_conv2d"), ids=lambda p: "-".join(filter(None, p)))
def backend(request, monkeypatch):
    """The module of one implementation."""
    name, isa = request.param
    if isa:
        monkeypatch.setenv("MKF_ISA", isa)
    return next(i for i in registry.implementations("key_conv2d") if i.name == name).load()


@pytest.fixture(autouse=True)
def threads():
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounds_filters(backend, dtype):
    """Whether results are further off than rounded outputs are; tests/ops compares those with torch's."""
    return backend.__name__.endswith(".reference") and dtype == torch.bfloat16


def some_keys(kind, k):
    """Eight keys (k, k) of one kind; `mixed` has all kinds that the plan knows."""
    if kind == "direct":
        return noise(8, k, k, seed=1)
    keys = noise(8, k, 1, seed=2) * noise(8, 1, k, seed=3)
    if kind == "mixed":
        keys[1] += 0.7
        keys[2] = 0.3
        keys[3, k // 2, 1] += 2
        keys[4, 0, k - 1] -= 1
        if k > 5:
            keys[5] += noise(k, 1, seed=4) * noise(1, k, seed=5)
        keys[6] = 0
    if kind == "mirrored":  # in one direction, in both, with two terms, with a tap; itself or its negative
        column, row = keys[:, :, :1], keys[:, :1]
        even, odd = column + column.flip(1), column - column.flip(1)
        across, negative = row + row.flip(2), row - row.flip(2)
        keys = torch.stack([even[0] * across[0], even[1] * negative[1], odd[2] * across[2], odd[3] * negative[3]])
        one_sided = torch.stack([even[4] * row[4], column[5] * negative[5]])
        two = torch.stack([even[6] * across[6] + odd[6] * negative[6], even[7] * across[7] + even[0] * across[1]])
        two[1, k // 2, k // 2] += 2
        keys = torch.cat([keys, one_sided, two])
    return keys


class Problem:
    """One call, its tensors and what float64 says."""

    def __init__(self, shape, keys, stride=1, dtype=torch.float32, layout="last", shifted=True, blocks=0, seed=0):
        n, c, h, w = shape
        self.keys, self.stride, self.dtype, self.layout = keys, stride, dtype, LAYOUTS[layout]
        k = keys.shape[-1]
        self.plan = make_plan(keys)
        self.options = ((stride, stride), (k // 2, k // 2), (1, 1))
        order = (
            torch.arange(c) // blocks
            if blocks
            else torch.randint(9973, (c,), generator=torch.Generator().manual_seed(seed))
        )
        self.index = (order % len(keys)).int()
        self.scale, self.bias = noise(c, seed=seed + 1), noise(c, seed=seed + 2)
        self.shift = 0.3 * noise(c, seed=seed + 3) if shifted else torch.zeros(c)
        self.x = self.tensor(noise(n, c, h, w, seed=seed + 4))
        self.dy = self.tensor(noise(n, c, (h - 1) // stride + 1, (w - 1) // stride + 1, seed=seed + 5))

    def tensor(self, values):
        return values.to(self.dtype).contiguous(memory_format=self.layout)

    def guarded(self, like):
        """A tensor of NaN like another in a larger piece of memory, and a check that nothing around it was written."""
        memory = torch.full((like.numel() + 256,), 12345.0, dtype=like.dtype)
        tensor = memory[128:-128].as_strided(like.shape, like.stride(), 128).fill_(torch.nan)
        return tensor, lambda: bool((memory[:128] == memory[0]).all() and (memory[-128:] == memory[0]).all())

    def forward(self, backend, bias=True):
        out, intact = self.guarded(self.dy)
        backend.key_conv2d(
            self.x, self.plan, self.index, self.scale, self.shift, self.bias if bias else None, *self.options, out
        )
        assert intact()
        return out

    def backward(self, backend, wanted=GRADIENTS):
        out, checks = {}, []
        for name in GRADIENTS:
            if name in wanted:
                out[name], check = self.guarded(self.x if name == "dx" else self.scale)
                checks.append(check)
        x = self.x if {"d_scale", "d_shift"} & set(wanted) else None
        backend.key_conv2d_backward(
            self.dy, x, self.plan, self.index, self.scale, self.shift, *self.options, *(out.get(g) for g in GRADIENTS)
        )
        assert all(check() for check in checks)
        return out

    def parameters(self):
        return [t.double().numpy() for t in (self.keys, self.scale, self.shift)]

    def check(self, backend, wanted=GRADIENTS, bias=True):
        """Compare everything with float64; what is rounded to bfloat16 is compared as precisely as that allows."""
        keys, scale, shift = self.parameters()
        index, x, dy = self.index.numpy(), self.x.double().numpy(), self.dy.double().numpy()
        weight = float64.filters(keys, index, scale, shift)
        expected = float64.convolution(x, weight, self.bias.double().numpy() if bias else None, self.stride)
        close(self.forward(backend, bias), expected, ERROR[self.dtype])
        expected = dict(zip(GRADIENTS, float64.gradients(dy, x, keys, index, scale, shift, self.stride), strict=True))
        size = np.sqrt((dy**2).sum((0, 2, 3)) * max(1, dy[:, 0].size / 100))
        for name, value in self.backward(backend, wanted).items():
            if name == "dx":
                close(value, expected[name], ERROR[self.dtype])
            else:
                assert value.dtype == torch.float32
                close(value, expected[name], SUM_ERROR, extra=SUM_ERROR * np.linalg.norm(size))


def close(value, expected, error, extra=0.0):
    value = value.double().numpy()
    assert value.shape == expected.shape
    assert np.isfinite(value).all()
    assert np.linalg.norm(value - expected) <= error * np.linalg.norm(expected) + extra


SHAPES = [(1, 1, 1, 1), (2, 16, 7, 7), (1, 17, 14, 15), (1, 40, 9, 30), (3, 3, 1, 23), (1, 32, 29, 1), (1, 8, 8, 16)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["direct", "rank1", "mixed", "mirrored"])
@pytest.mark.parametrize("stride", [1, 2])
def test_shapes(backend, kind, layout, stride):
    for shape in SHAPES:
        Problem(shape, some_keys(kind, 7), stride, layout=layout).check(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [3, 5, 9, 11])
@pytest.mark.parametrize("kind", ["direct", "mixed", "mirrored"])
def test_kernel_sizes(backend, kind, k, layout):
    for stride in (1, 2):
        for dtype in ERROR:
            if not rounds_filters(backend, dtype):
                Problem((1, 19, 10, 17), some_keys(kind, k), stride, dtype, layout).check(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [3, 5, 7, 11])
@pytest.mark.parametrize("dtype", ERROR)
def test_small_images(backend, dtype, k, layout):
    if rounds_filters(backend, dtype):
        pytest.skip("it rounds the filters too")
    for i, size in enumerate([(1, 1), (1, 2), (2, 2), (3, 1), (3, 3), (2, 4), (4, 4)]):
        for batch in (1, 8, 17):
            problem = Problem((batch, (40, 5)[i % 2], *size), some_keys("mixed", k), 1, dtype, layout, seed=i)
            problem.check(backend)
            some = [("d_scale", "d_bias"), ("dx", "d_shift"), ("d_shift",), ("d_bias",)][i % 4]
            problem.check(backend, some, bias=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["direct", "rank1", "mixed"])
def test_bfloat16(backend, kind, layout):
    if rounds_filters(backend, torch.bfloat16):
        pytest.skip("it rounds the filters too")
    for shape in SHAPES:
        for stride in (1, 2):
            Problem(shape, some_keys(kind, 7), stride, torch.bfloat16, layout).check(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_rounded_once_and_ties_go_to_even(backend, layout):
    if rounds_filters(backend, torch.bfloat16):
        pytest.skip("it rounds the filters too")
    identity = torch.zeros(1, 7, 7)
    identity[0, 3, 3] = 1
    problem = Problem((2, 75, 8, 9), identity, dtype=torch.bfloat16, layout=layout, shifted=False)
    problem.bias.zero_()
    problem.scale[:] = torch.where(torch.arange(75) % 3 > 0, 1 + 2.0**-8, 3.0)  # most products lie between two values
    problem.x[0, 0, 0, 0] = 3.38e38  # and this one beyond them
    expected = problem.x.float() * problem.scale[:, None, None]
    assert torch.equal(problem.forward(backend), expected.bfloat16())


def test_lines_of_bfloat16_in_halves_and_in_pairs(backend):
    if rounds_filters(backend, torch.bfloat16):
        pytest.skip("it rounds the filters too")
    keys = torch.cat([some_keys("mixed", 7), some_keys("direct", 7)[:1]])
    problem = Problem((2, 32 * 10 + 5, 9, 16), keys, dtype=torch.bfloat16)
    one, two, direct = 0, 5, 8  # terms
    assert (make_plan(keys).terms[[one, two]].tolist(), make_plan(keys).direct[direct]) == ([1, 2], True)
    for line, (first, second) in enumerate([(i, j) for i in (one, two, direct) for j in (one, two, direct)]):
        problem.index[32 * line : 32 * line + 32] = one
        problem.index[[32 * line + 7, 32 * line + 16 + 4]] = torch.tensor([first, second], dtype=torch.int32)
    problem.index[32 * 9 : 32 * 10] = one
    problem.index[[32 * 9 + 6, 32 * 9 + 7, 32 * 9 + 16 + 4]] = two  # more than one vector can have of the pairs
    problem.check(backend)
    problem.check(backend, ("dx", "d_bias"), bias=False)


@pytest.mark.skipif(not cpu_runs("avx512_bf16"), reason="the processor lacks the instruction")
def test_the_instruction_for_bfloat16_rounds_as_the_others_do(monkeypatch):
    native = next(i for i in registry.implementations("key_conv2d") if i.name == "native").load()
    identity = torch.zeros(1, 7, 7)
    identity[0, 3, 3] = 1
    problem = Problem((1, 64, 64, 64), identity, dtype=torch.bfloat16, shifted=False)
    problem.bias.zero_()
    problem.scale[:] = 1 + 2.0 ** -(torch.arange(64) % 12)
    bits = torch.arange(1 << 16).sub(1 << 15).short().view(torch.bfloat16)  # all there are
    usual = torch.where(bits.abs() < 2.0**-126, 0, bits)  # below, it stores zero
    problem.x = problem.tensor(usual.view(1, 16, 64, 64).repeat(1, 4, 1, 1))
    results = []
    for isa in ("avx512", "avx512_bf16"):
        monkeypatch.setenv("MKF_ISA", isa)
        results.append(problem.forward(native))
    is_nan = [result.isnan() for result in results]
    assert torch.equal(*is_nan)
    assert is_nan[0].any()
    assert torch.equal(*(result[~is_nan[0]] for result in results))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ERROR)
def test_direct_taps_of_images_that_are_one_strip_or_more(backend, dtype, layout):
    if rounds_filters(backend, dtype):
        pytest.skip("it rounds the filters too")
    for k, sizes in ((7, range(7, 17)), (3, (8, 14)), (5, (13, 15)), (11, (9, 14))):
        for size in sizes:
            problem = Problem((2, 35, size, 18), some_keys("direct", k), 1, dtype, layout, seed=size)
            problem.check(backend)
            problem.check(backend, [("d_shift",), ("dx",), ("d_bias",)][size % 3], bias=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [key_sets.paper8(), key_sets.analytic("A"), key_sets.analytic("D2")], ids=str)
@pytest.mark.parametrize("blocks", [0, 16])
def test_key_sets(backend, keys, blocks, layout):
    for shifted in (False, True):
        Problem((1, 48, 14, 14), keys.filters, layout=layout, shifted=shifted, blocks=blocks).check(backend)


def test_keys_from_real_filters(backend, data_dir):
    from safetensors.torch import load_file

    weights = torch.cat([w[:, 0] for w in load_file(data_dir / "filters/trained_k7.safetensors").values()])
    Problem((2, 64, 14, 14), weights[:: len(weights) // 200].float()).check(backend)


@pytest.mark.parametrize("wanted", [("dx",), ("d_scale",), ("d_shift",), ("d_bias",), ("dx", "d_bias"), GRADIENTS[:3]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_wanted(backend, wanted, layout):
    for kind in ("direct", "mixed"):
        for stride in (1, 2):
            problem = Problem((2, 21, 9, 10), some_keys(kind, 7), stride, layout=layout, shifted=kind == "mixed")
            problem.check(backend, wanted, bias=False)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 33), st.integers(1, 33)),
    st.sampled_from([3, 5, 7, 7, 7, 9, 11]),
    st.sampled_from([1, 2]),
    st.sampled_from(list(ERROR)),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(["direct", "rank1", "mixed", "mirrored"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_problem(shape, k, stride, dtype, layout, kind, shifted, seed):
    problem = Problem(shape, some_keys(kind, k), stride, dtype, layout, shifted, seed=seed)
    for implementation in registry.implementations("key_conv2d"):
        if implementation.why_not(CPU) is None and not rounds_filters(backend := implementation.load(), dtype):
            problem.check(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["direct", "mixed", "mirrored"])
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_window(backend, value, dtype, kind, layout):
    problem = Problem((1, 40, 23, 24), some_keys(kind, 7), dtype=dtype, layout=layout)
    clean, clean_dx = problem.forward(backend), problem.backward(backend)["dx"]
    problem.x[0, 5, 11, 9] = problem.dy[0, 5, 11, 9] = value
    window = torch.zeros(problem.x.shape, dtype=torch.bool)
    window[0, 5, 8:15, 6:13] = True
    for spoilt, before in ((problem.forward(backend), clean), (problem.backward(backend)["dx"], clean_dx)):
        assert not spoilt[window].isfinite().any() or kind == "mixed"  # a key of zeros and ones may keep some finite
        assert torch.equal(spoilt[~window], before[~window])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ERROR)
def test_a_bias_that_is_any_nan_gives_nan(backend, dtype, layout):
    problem = Problem((1, 40, 9, 9), some_keys("mixed", 7), dtype=dtype, layout=layout)
    problem.bias[[3, 36]] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    is_nan = problem.forward(backend).isnan()
    assert is_nan[:, [3, 36]].all()
    assert is_nan.sum() == 2 * 81


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_tiny_and_huge_values(backend, size, layout):
    problem = Problem((1, 16, 12, 12), some_keys("mixed", 7), layout=layout)
    problem.bias *= size
    problem.x *= size
    problem.check(backend, ("d_bias",))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["direct", "mixed"])
def test_the_number_of_threads_does_not_show(backend, kind, layout):
    shapes = ((3, 70, 40, 41), torch.float32), ((2, 48, 56, 57), torch.bfloat16), ((300, 70, 2, 3), torch.float32)
    for shape, dtype in shapes:
        problem = Problem(shape, some_keys(kind, 7), dtype=dtype, layout=layout)
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append([problem.forward(backend), *problem.backward(backend).values()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_sums_keep_their_digits(backend):
    problem = Problem((2, 16, 150, 151), some_keys("mixed", 7))
    problem.x += 3
    problem.dy += 2
    index, (keys, scale, shift) = problem.index.numpy(), problem.parameters()
    x, dy = problem.x.double().numpy(), problem.dy.double().numpy()
    expected = float64.gradients(dy, x, keys, index, scale, shift, 1)
    for name, value in zip(GRADIENTS[1:], expected[1:], strict=True):
        close(problem.backward(backend, (name,))[name], value, 1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 60000, 1), (1, 5, 1, 60000)], ids=["tall", "wide"])
def test_sums_of_equal_values_do_not_drift(backend, shape):
    if not backend.__name__.endswith(".native"):
        pytest.skip("of the extension's sums; torch's drift")
    problem = Problem(shape, torch.ones(1, 7, 7))
    problem.x[:], problem.dy[:] = 0.1, 0.1  # what float32 rounds off is the same at every step
    found = problem.backward(backend)
    pixels, value = 60000, problem.x[0, 0, 0, 0].double().item()
    windows = 7 * pixels - 12  # the inputs of all windows, which padding shortens at both ends
    assert found["d_bias"].double().numpy() == pytest.approx(pixels * value, rel=2e-6)
    for name in ("d_scale", "d_shift"):
        assert found[name].double().numpy() == pytest.approx(windows * value**2, rel=2e-6)


@pytest.mark.parametrize("k", [5, 7, 9, 11])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_of_as_many_terms_as_are_cheaper_than_taps(backend, layout, k):
    most = k // 2
    columns, rows = noise(k, most, seed=2), noise(k, most, seed=3)
    columns[:, 0] += columns[:, 0].flip(0)  # the first term mirrors itself in one direction: only alone it may split
    columns, rows = (torch.linalg.qr(t.double()).Q for t in (columns, rows))
    terms = columns.T[:, :, None] * rows.T[:, None] * 0.5 ** torch.arange(most)[:, None, None]
    keys = 5 * terms.cumsum(0).float()
    assert make_plan(keys).terms.tolist() == list(range(1, most + 1))
    for shifted in (False, True):
        Problem((1, 40, 12, 13), keys, layout=layout, shifted=shifted).check(backend)


def test_what_the_extension_does_not_serve():
    native = next(i for i in registry.implementations("key_conv2d") if i.name == "native").load()
    plan, x = make_plan(some_keys("mixed", 7)), noise(1, 3, 9, 9)
    one, same = (1, 1), (3, 3)
    assert native.why_not_call(x, plan, one, same, one) is None
    assert native.why_not_call(x.bfloat16(), plan, (2, 2), same, one) is None
    for arguments, reason in (
        ((x.half(), plan, one, same, one), "float16"),
        ((x.double(), plan, one, same, one), "float64"),
        ((x, plan, (1, 2), same, one), "stride"),
        ((x, plan, (3, 3), same, one), "stride"),
        ((x, plan, one, (2, 2), one), "padding"),
        ((x, plan, one, (6, 6), (2, 2)), "dilation"),
    ):
        assert reason in native.why_not_call(*arguments)


WITHOUT_MEMORY = """
import re, resource
from pathlib import Path
import torch
from mkf.kernels.key_conv2d import native
from mkf.kernels.key_conv2d.plan import make_plan

torch.set_num_threads(2)
plan, index, one = make_plan(torch.ones(1, 7, 7)), torch.zeros(1, dtype=torch.int32), torch.ones(1)

def convolve(x, out):
    native.key_conv2d(x, plan, index, one, one, None, (1, 1), (3, 3), (1, 1), out)

small, large = torch.zeros(2, 1, 1, 1 << 15), torch.zeros(2, 1, 1, 1 << 20)
convolve(small, torch.empty_like(small))
out = torch.empty_like(large)
kilobytes = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (kilobytes * 1024 + (40 << 20),) * 2)
try:
    convolve(large, out)  # each thread would have 64 MiB of its own
except MemoryError:
    print("refused")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or extension.missing() is not None, reason="native, on Linux")
def test_threads_without_memory_end_in_an_exception():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


@pytest.mark.parametrize("wanted", [("dx", "d_scale"), ("dx", "d_shift"), ("d_scale", "d_shift")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_of_the_gradients(backend, wanted, layout):
    for kind in ("direct", "rank1", "mixed"):
        for stride in (1, 2):
            Problem((2, 21, 9, 10), some_keys(kind, 7), stride, layout=layout).check(backend, wanted, bias=False)


@pytest.mark.parametrize("kind", ["direct", "rank1"])
def test_shifts_that_are_all_negative(backend, kind):
    problem = Problem((2, 21, 9, 10), some_keys(kind, 7))
    problem.shift = -0.1 - problem.shift.abs()
    problem.check(backend, ("dx", "d_scale"))


def test_bands_of_strips_that_threads_do_not_divide(backend):
    problem, results = Problem((1, 70, 43, 30), some_keys("mixed", 7)), []
    for count in (1, 3, 5):
        torch.set_num_threads(count)
        results.append([problem.forward(backend), *problem.backward(backend).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "places", [[(2, 1), (2, 5), (4, 5)], [(r, 3 * r % 7) for r in range(7)]], ids=["lines", "many"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_taps_in_one_row_or_column_and_too_many_of_them(backend, places, layout):
    keys = noise(len(places), 7, 1, seed=2) * noise(len(places), 1, 7, seed=3)
    for key, place in zip(keys, places, strict=True):
        key[place] += 3
    assert (make_plan(keys).tap != 0).all()
    for stride in (1, 2):
        Problem((1, 48, 12, 13), keys, stride, layout=layout).check(backend)


@pytest.mark.parametrize("count", [9, 12, 16, 17, 33])
def test_one_sided_keys_among_many_others(backend, count):
    one_sided = noise(1, 7, 1, seed=7) * noise(1, 1, 7, seed=8) + some_keys("mixed", 7)[5:6]
    keys = torch.cat([some_keys("mirrored", 7), one_sided] * 4)[:count]
    Problem((1, 64, 9, 10), keys * (1 + 0.1 * torch.arange(count))[:, None, None]).check(backend)


def test_a_vector_that_overlaps_the_one_before_leaves_its_channels_alone(backend):
    if not backend.__name__.endswith(".native"):
        pytest.skip("of the extension's vectors")
    keys = torch.cat([some_keys("rank1", 7)[:1], some_keys("direct", 7)[:1]])
    whole, part = Problem((1, 17, 9, 10), keys), Problem((1, 16, 9, 10), keys)
    whole.index[:], part.index[:] = 0, 0
    whole.index[16] = 1  # taken tap by tap, and so are all that share its vector: they would be rounded otherwise
    part.x, part.dy = part.tensor(whole.x[:, :16]), part.tensor(whole.dy[:, :16])
    part.scale, part.shift, part.bias = (t[:16].clone() for t in (whole.scale, whole.shift, whole.bias))
    assert torch.equal(whole.forward(backend)[:, :16], part.forward(backend))
    found, expected = whole.backward(backend), part.backward(backend)
    assert torch.equal(found["dx"][:, :16], expected["dx"])
    assert all(torch.equal(found[name][:16], expected[name]) for name in GRADIENTS[1:])
