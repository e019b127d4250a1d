"""Every implementation that runs on a CPU against float64, on random, real and awkward filters."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkf import affine_fit
from mkf.kernels import registry
from tests.kernels.affine_fit_float64 import assert_agrees, line_of_best_key
from tests.kernels.runs_here import runnable

CPU = torch.device("cpu")


@pytest.fixture(params=runnable("affine_fit"), ids=lambda p: "-".join(filter(None, p)))
def fit(request, monkeypatch):
    """`affine_fit` by one implementation."""
    backend, isa = request.param
    if isa:
        monkeypatch.setenv("MKF_ISA", isa)
    return lambda filters, keys, **options: affine_fit(filters, keys, backend=backend, **options)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000])
def test_random_filters(fit, k, count):
    filters, keys = noise(count, k, k), noise(8, k, k, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("keys_count", [1, 2, 7, 8, 9, 16, 17, 50, 256])
def test_any_number_of_keys(fit, keys_count):
    filters, keys = noise(100, 7, 7), noise(keys_count, 7, 7, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(fit, dtype):
    filters, keys = noise(333, 7, 7).to(dtype), noise(8, 7, 7, seed=1)
    assert_agrees(fit(filters, keys), filters.double(), keys)


def test_every_float16_value(fit):
    """A filter of each finite half, subnormals included, beside three fixed taps."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    filters = torch.tensor([[1, 2, 0], [4, 0, 3], [0, 1, 0.0]]).half().repeat(len(halves), 1, 1)
    filters[:, 1, 1] = halves
    keys = noise(8, 3, 3, seed=1)
    result = fit(filters, keys)
    finite = halves.isfinite()
    assert (result.index[~finite] == -1).all()
    assert_agrees([x[finite] for x in result], filters[finite].double(), keys)


@pytest.mark.parametrize("offset", [1e2, -1e4, 3e4, 1e5, -3e5, 1e6])
def test_a_common_offset_costs_nothing(fit, offset):
    filters, keys = noise(500, 7, 7) + offset, noise(8, 7, 7, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("offset", [30.0, 1e4, -1e9])
def test_a_common_offset_in_float64(fit, offset):
    filters, keys = noise(500, 7, 7).double() + offset, noise(8, 7, 7, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("tap", [0, 24, 48])
def test_a_tap_far_from_the_others(fit, tap):
    filters, keys = noise(500, 7, 7), noise(8, 7, 7, seed=1)
    filters.flatten(1)[:, tap] += torch.linspace(-1e3, 1e3, 500)
    keys.flatten(1)[3, tap] += 100
    filters[::5] = keys[3] + 1e-5 * filters[::5]
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("error", [1e-1, 1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("keys_count", [8, 50])
def test_small_residuals_keep_their_digits(fit, error, keys_count):
    keys = noise(keys_count, 7, 7, seed=1)
    planted = torch.arange(640) % keys_count
    filters = (-3 * keys[planted] + 0.5 + error * noise(640, 7, 7, seed=2)).double()
    result = fit(filters.float(), keys)
    assert (result.index == planted).all()
    assert_agrees(result, filters.float(), keys)


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1e-21, 1e-15, 1e15, 1e30, 3e38])
def test_tiny_and_huge_filters(fit, size):
    filters = noise(40, 7, 7)
    filters = (filters / filters.abs().amax((1, 2), keepdim=True)).double().mul(size).float()
    keys = noise(8, 7, 7, seed=1)
    index, scale, _, residual = fit(filters, keys)
    a, _, r = line_of_best_key(filters, keys)
    rows = np.arange(len(filters))
    assert (r[rows, index] <= r.min(1) + 1e-6).all()
    np.testing.assert_allclose(residual, r[rows, index], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale, a[rows, index].astype(np.float32), rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("size", [1e-308, 1e60, 1.7e308])
def test_tiny_and_huge_filters_in_float64(fit, size):
    """Beyond float32, only the scale and the shift are not."""
    filters, keys = noise(40, 7, 7).clamp(-1, 1).double(), noise(8, 7, 7, seed=1)
    filters[:, 0, 0], filters[:, 6, 6] = 1, -1
    for sign in ("any", "positive"):
        huge, plain = (fit(f, keys, topk=3, sign=sign) for f in (filters * size, filters))
        assert torch.equal(huge.index, plain.index)
        torch.testing.assert_close(huge.residual, plain.residual, rtol=1e-5, atol=1e-6)
        for found, value in ((huge.scale, plain.scale), (huge.shift, plain.shift)):
            torch.testing.assert_close(found, (value.double() * size).float(), rtol=1e-4, atol=1e-37)


def test_tiny_and_huge_filters_among_others(fit):
    filters, keys = noise(300, 7, 7), noise(8, 7, 7, seed=1)
    filters[5], filters[6], filters[7], filters[299] = 1, torch.nan, filters[7] * 1e-25, filters[299] * 1e20
    result = fit(filters, keys, topk=3, sign="positive")
    plain = fit(noise(300, 7, 7), keys, topk=3, sign="positive")
    assert result.index[5:7].tolist() == [[0, 1, 2], [-1, -1, -1]]
    live = [i for i in range(300) if i not in (5, 6)]
    assert torch.equal(result.index[live], plain.index[live])
    size = torch.ones(300, 1)
    size[7], size[299] = 1e-25, 1e20
    torch.testing.assert_close(result.scale[live], (plain.scale * size)[live], rtol=2e-5, atol=0)
    torch.testing.assert_close(result.residual[live], plain.residual[live], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
def test_constant_filters_are_dead(fit, k):
    values = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1e-40, 3e38, 16777217.0]), noise(1000), 1e-20 * noise(50)])
    filters = values[:, None, None].expand(-1, k, k)
    index, scale, shift, residual = fit(filters, noise(8, k, k))
    assert (index == 0).all()
    assert (scale == 0).all()
    assert (residual == 0).all()
    assert torch.equal(shift, values)
    several = fit(filters[:3], noise(8, k, k), topk=3)
    assert several.index.tolist() == [[0, 1, 2]] * 3
    assert (several.residual == 0).all()


def test_not_finite_filters_leave_their_neighbours_alone(fit):
    filters, keys = noise(67, 7, 7), noise(8, 7, 7, seed=1)
    clean = fit(filters, keys)
    spoilt = filters.clone()
    spoilt[3, 0, 0], spoilt[20, 6, 6], spoilt[66, 3, 3], spoilt[40] = torch.nan, torch.inf, -torch.inf, torch.nan
    result = fit(spoilt, keys)
    bad = torch.tensor([3, 20, 40, 66])
    good = torch.ones(67, dtype=torch.bool)
    good[bad] = False
    assert (result.index[bad] == -1).all()
    assert all(x[bad].isnan().all() for x in result[1:])
    assert all(torch.equal(x[good], y[good]) for x, y in zip(result, clean, strict=True))


def test_equal_keys_go_to_the_lowest_index(fit):
    keys = noise(3, 7, 7)[[0, 1, 1, 2, 0]]
    filters = torch.cat([keys, -keys])
    assert fit(filters, keys).index.tolist() == [0, 1, 1, 3, 0] * 2
    best = fit(filters[:2], keys, topk=3)
    assert best.index[:, :2].tolist() == [[0, 4], [1, 2]]
    # A better key moves two equal ones down: the lower of them stays ahead.
    mixture = (keys[3] + 0.3 * keys[0])[None]
    assert fit(mixture, keys[[0, 0, 3]], topk=2).index.tolist() == [[2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_that_are_linear_shifts_of_one_another_are_equal(fit, dtype):
    """Rounding of the keys, of other sums or of another backend does not choose between them."""
    keys = noise(8, 7, 7, seed=1).to(dtype)
    shifts = torch.cat([keys, -1.7 * keys + 0.25, 0.3 * keys - 2])
    filters = 1.3 * keys[torch.arange(2000) % 8].float() + 0.2 + 0.1 * noise(2000, 7, 7, seed=2)
    result = fit(filters, shifts, topk=3)
    assert (result.index == torch.stack([torch.arange(2000) % 8 + 8 * i for i in range(3)], 1)).all()
    for i in range(3):
        assert_agrees([x[:, i] for x in result], filters, shifts)
    assert all((x == result.residual[:, 0]).all() for x in result.residual.T)
    positive = fit(filters, shifts, topk=3, sign="positive")
    assert (positive.index[:, :2] == result.index[:, ::2]).all(), "the negative one is no match"


def test_keys_that_differ_by_more_are_told_apart(fit):
    keys = noise(4, 7, 7).repeat(2, 1, 1) + 1e-4 * noise(8, 7, 7, seed=1)
    filters = keys[torch.arange(400) % 8] + 0.3 * noise(400, 7, 7, seed=2)
    result = fit(filters, keys)
    assert_agrees(result, filters, keys)
    assert (result.index >= 4).any()


def test_nearly_tied_keys(fit):
    keys = noise(2, 7, 7).repeat(4, 1, 1) + 1e-6 * noise(8, 7, 7, seed=1)
    filters = keys[torch.arange(200) % 8] + 0.3 * noise(200, 7, 7, seed=2)
    assert_agrees(fit(filters, keys), filters, keys)


def test_scales_of_one_sign(fit):
    filters, keys = noise(500, 7, 7), noise(3, 7, 7, seed=1)
    result = fit(filters, keys, sign="positive")
    assert_agrees(result, filters, keys, positive=True)
    assert (result.scale >= 0).all()
    alone = fit(-keys[:1], keys[:1], sign="positive")
    assert (alone.index.item(), alone.scale.item(), alone.residual.item()) == (0, 0, 1)


def test_the_best_m_keys(fit):
    filters, keys = noise(300, 7, 7), noise(20, 7, 7, seed=1)
    result = fit(filters, keys, topk=5)
    assert result.index.shape == (300, 5)
    a, b, r = line_of_best_key(filters, keys)
    order = np.argsort(r, 1, kind="stable")[:, :5]
    assert (result.index.numpy() == order).mean() > 0.99
    np.testing.assert_allclose(result.residual, np.take_along_axis(r, order, 1), atol=2e-6)
    np.testing.assert_allclose(result.scale, np.take_along_axis(a, result.index.numpy(), 1), atol=1e-5)
    np.testing.assert_allclose(result.shift, np.take_along_axis(b, result.index.numpy(), 1), atol=1e-5)
    first = fit(filters, keys)
    assert all(torch.equal(x[:, 0], y) for x, y in zip(result, first, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 1),
        lambda x: x[:, 1:8, 2:9],
        lambda x: x[::3],
        lambda x: x.flip(0),
        lambda x: x[:, ::2, ::2],
        lambda x: x[1:].permute(2, 1, 0)[:, :7, :7],
        lambda x: x[:1].expand(50, -1, -1),
        lambda x: x.reshape(-1)[3:].as_strided((80, 5, 5), (3, 7, 2)),
    ],
)
def test_strided_filters(fit, view):
    filters = view(noise(121, 9, 9))
    k = filters.shape[1]
    if filters.shape[1] != filters.shape[2]:
        filters = filters[:, :k, :k]
    keys = noise(8, k, k, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)
    assert all(torch.equal(x, y) for x, y in zip(fit(filters, keys), fit(filters.contiguous(), keys), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strided_filters_of_every_dtype_and_size(fit, dtype):
    for size in (1, 2**-60) if dtype != torch.float16 else (1,):
        stack = (size * noise(121, 9, 9)).to(dtype)
        for filters in (stack[::3], stack.permute(0, 2, 1), stack[:, 1:8, 2:9], stack[:, ::2, ::2]):
            keys = noise(8, *filters.shape[1:], seed=1)
            results = fit(filters, keys), fit(filters.contiguous(), keys)
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_filter_does_not_know_its_neighbours(fit):
    """Bitwise the same for any batch split and any number of threads."""
    filters, keys = noise(40_000, 7, 7), noise(8, 7, 7, seed=1)
    filters[::7] = keys[0] + 1e-3 * filters[::7]
    whole = fit(filters, keys)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(whole, fit(filters, keys), strict=True))
    finally:
        torch.set_num_threads(threads)
    for start, stop in ((0, 1), (5, 38), (17, 39_999)):
        piece = fit(filters[start:stop], keys)
        assert all(torch.equal(x[start:stop], y) for x, y in zip(whole, piece, strict=True))


def test_filters_that_are_converted_in_pieces(fit):
    filters, keys = noise(40_000, 3, 3).bfloat16(), noise(4, 3, 3, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(fit(filters, keys), fit(filters.float(), keys), strict=True))


@pytest.mark.parametrize("isa", [isa for name, isa in runnable("affine_fit") if name == "native"])
def test_many_outputs_at_any_address(isa, monkeypatch):
    """Outputs that no cache would keep are written past it where their address allows that, and come out the same."""
    from mkf.kernels.affine_fit import native
    from mkf.ops.affine_fit import _prepare

    monkeypatch.setenv("MKF_ISA", isa)
    filters, keys = noise(100, 3, 3).repeat(1000, 1, 1), noise(2, 3, 3, seed=1)
    few = affine_fit(filters[:100], keys, backend="native")
    for offset in (0, 1, 16):
        dtypes = (torch.int32, torch.float32, torch.float32, torch.float32)
        outputs = [torch.full((len(filters) + 20, 1), 7, dtype=dtype) for dtype in dtypes]
        inner = [x[offset : offset + len(filters)] for x in outputs]
        native.affine_fit(filters, _prepare(keys), False, *inner)
        assert all(torch.equal(x.view(1000, 100), y.expand(1000, 100)) for x, y in zip(inner, few, strict=True))
        assert all((x[:offset] == 7).all() and (x[offset + len(filters) :] == 7).all() for x in outputs)


def test_real_filters(fit, data_dir):
    from safetensors.torch import load_file

    from mkf import keys

    for k in (3, 5, 7):
        weights = load_file(data_dir / f"filters/trained_k{k}.safetensors").values()
        filters = torch.cat([w[:, 0] for w in weights])
        live = filters[(filters != filters[:, :1, :1]).any(2).any(1)]
        assert 0 < len(live) <= len(filters)
        some_keys = keys.paper8() if k == 7 else keys.random(k, 8, 0)
        assert_agrees(fit(live, some_keys), live, some_keys.filters)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes(data):
    """Any mixture of ordinary, tied, offset, scaled, dead and poisoned filters, on every implementation."""
    k = data.draw(st.sampled_from([3, 5, 7, 9, 11]))
    seed = data.draw(st.integers(0, 2**31))
    count, keys_count = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    keys = noise(keys_count, k, k, seed=seed)
    filters = noise(count, k, k, seed=seed + 1).double()
    for _ in range(data.draw(st.integers(0, 4))):
        i = data.draw(st.integers(0, count - 1))
        change = data.draw(st.sampled_from(["offset", "scale", "copy", "constant", "poison"]))
        if change == "offset":
            filters[i] += data.draw(st.floats(-1e5, 1e5))
        elif change == "scale":
            filters[i] *= 10.0 ** data.draw(st.integers(-30, 30))
        elif change == "copy":
            filters[i] = keys[data.draw(st.integers(0, keys_count - 1))] + data.draw(st.floats(0, 1e-2)) * filters[i]
        elif change == "constant":
            filters[i] = data.draw(st.floats(-1e30, 1e30))
        else:
            filters[i, 0, 0] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    filters = filters.float()
    finite = filters.isfinite().all(2).all(1)
    dead = finite & (filters == filters[:, :1, :1]).all(2).all(1)
    live = finite & ~dead
    for implementation in registry.implementations("affine_fit"):
        if implementation.why_not(CPU) is not None:
            continue
        result = affine_fit(filters, keys, backend=implementation.name)
        assert (result.index[~finite] == -1).all()
        assert (result.residual[dead] == 0).all()
        if live.any():
            assert_agrees([x[live] for x in result], filters[live], keys)


def test_numba_leaves_the_number_of_threads_to_torch():
    pytest.importorskip("numba")
    code = (
        "import torch; from mkf import affine_fit; torch.set_num_threads(1); "
        "affine_fit(torch.randn(9, 7, 7), torch.randn(2, 7, 7), backend='numba'); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "1\n", done.stderr


def test_numba_in_a_forked_worker_says_so(monkeypatch):
    filters, keys = noise(3, 7, 7), noise(2, 7, 7, seed=1)
    pytest.importorskip("numba")
    affine_fit(filters, keys, backend="numba")
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="survive a fork"):
        affine_fit(filters, keys, backend="numba")
