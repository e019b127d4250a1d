"""Combinations of keys against numpy's least squares, filter by filter, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mkf
from mkf.ops import combination

KEYS = mkf.keys.paper8().filters


def noise(count, k=7, seed=0):
    return torch.randn(count, k, k, generator=torch.Generator().manual_seed(seed))


def mixtures(count, error, keys=KEYS, seed=0):
    """Sums of all keys with noise of so much of their norm."""
    weights = torch.randn(count, len(keys), generator=torch.Generator().manual_seed(seed)).double()
    exact = (weights @ keys.double().flatten(1)).view(count, *keys.shape[1:])
    rest = noise(count, keys.shape[1], seed + 1).double()
    return exact + error * rest * (exact.flatten(1).norm(dim=1) / rest.flatten(1).norm(dim=1))[:, None, None]


def expected(filters, keys, m=None):
    """Keys, scales, shift and residual; of m keys, each is the one that leaves least together with those before."""
    y = np.asarray(filters, np.float64).reshape(len(filters), -1)
    x = np.asarray(keys, np.float64).reshape(len(keys), -1)
    x_centred = x - x.mean(1, keepdims=True)

    def left(f, chosen):
        a = np.linalg.lstsq(x_centred[chosen].T, f, rcond=None)[0]
        return a, np.linalg.norm(f - a @ x_centred[chosen])

    fits = []
    for f in y:
        f_centred = f - f.mean()
        chosen = list(range(len(x))) if m is None else []
        while m is not None and len(chosen) < m:
            errors = [np.inf if j in chosen else left(f_centred, [*chosen, j])[1] for j in range(len(x))]
            chosen.append(int(np.argmin(errors)))
        a, error = left(f_centred, chosen)
        fits.append((chosen, a, f.mean() - a @ x[chosen].mean(1), error / np.linalg.norm(f_centred)))
    return [np.array(values) for values in zip(*fits, strict=True)]


def assert_right(fit, filters, keys, m=None):
    index, scale, shift, residual = (np.asarray(x) for x in fit)
    assert [x.dtype for x in (index, scale, shift, residual)] == ["int32", *["float32"] * 3]
    for own, right in zip((index, scale, shift, residual), expected(filters, keys, m), strict=True):
        assert own.shape == right.shape
        np.testing.assert_allclose(own, right, rtol=2e-7, atol=1e-30 if own is residual else 1e-7 * np.abs(right).max())


@pytest.mark.parametrize("m", [None, 1, 3, 8])
@pytest.mark.parametrize(
    "filters",
    [noise(40), noise(40).double(), 1e4 + noise(40), 1e9 + noise(40).double(), noise(40).bfloat16(), 1e-30 * noise(40),
     1e30 * noise(40), mixtures(40, 1e-3), mixtures(40, 1e-8), mixtures(40, 1e-4) + 100],
    ids=["float32", "float64", "offset", "huge offset", "bfloat16", "small", "large", "near", "nearer", "near, offset"],
)  # fmt: skip
def test_it_is_the_least_squares_fit(filters, m):
    fit = mkf.affine_fit(filters, KEYS, method="combination", topk=m)
    assert_right(fit, filters.double(), KEYS, m)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([3, 5, 7, 9, 11]), st.integers(1, 8), st.data())
def test_random_filters_keys_and_sizes(seed, k, count, data):
    keys = 2 * noise(count, k, seed) + 1
    m = data.draw(st.none() | st.integers(1, min(count, k * k - 2)))
    filters = noise(5, k, seed + 1).transpose(1, 2)
    if m is None and count == k * k - 1:
        return  # then the residual is all rounding
    assert_right(mkf.affine_fit(filters, keys, method="combination", topk=m), filters, keys, m)


def test_trained_filters(data_dir):
    layers = load_file(data_dir / "filters" / "trained_k7.safetensors")
    filters = torch.cat([layer[:, 0] for layer in layers.values()])[::20]
    live = filters[(filters.flatten(1).amax(1) > filters.flatten(1).amin(1))]
    for m in (None, 2):
        assert_right(mkf.affine_fit(live, KEYS, method="combination", topk=m), live, KEYS, m)
    residuals = [mkf.affine_fit(filters, KEYS, method="combination", topk=m).residual for m in (1, 2, 4, 8)]
    for more, fewer in zip(residuals[1:], residuals, strict=False):
        assert (more <= fewer + 1e-6).all()


def test_the_first_key_is_the_single_fit():
    filters = torch.cat([noise(500), KEYS, -3 * KEYS + 2])
    one, first = mkf.affine_fit(filters, KEYS), mkf.affine_fit(filters, KEYS, method="combination", topk=3)
    assert torch.equal(first.index[:, 0], one.index)
    alone = mkf.affine_fit(filters, KEYS, method="combination", topk=1)
    for x, y in zip(alone, one, strict=True):
        torch.testing.assert_close(x.flatten(), y, rtol=1e-5, atol=1e-6)


def test_it_rebuilds_the_filter():
    keys = 3 * KEYS + 0.7
    filters = mixtures(30, 0.0, keys).float()
    for m in (None, 8):
        fit = mkf.affine_fit(filters, keys, method="combination", topk=m)
        rebuilt = (fit.scale[:, :, None, None] * keys[fit.index]).sum(1) + fit.shift[:, None, None]
        torch.testing.assert_close(rebuilt, filters, rtol=1e-4, atol=1e-4)
        assert fit.residual.max() < 1e-6


def test_dead_and_broken_filters_leave_their_neighbours_alone():
    filters = noise(60)
    whole = mkf.affine_fit(filters, KEYS, method="combination", topk=2)
    broken, dead = torch.arange(0, 60, 7), torch.arange(4, 60, 11)
    filters[broken, 2, 3] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(3)
    filters[dead] = torch.linspace(-1e5, 1e5, len(dead))[:, None, None]
    for m in (2, None):
        fit = mkf.affine_fit(filters, KEYS, method="combination", topk=m)
        assert (fit.index[broken] == -1).all()
        assert all(x[broken].isnan().all() for x in fit[1:])
        assert torch.equal(fit.index[dead], torch.arange(m or 8, dtype=torch.int32).expand(len(dead), -1))
        assert (fit.scale[dead] == 0).all()
        assert (fit.residual[dead] == 0).all()
        assert torch.equal(fit.shift[dead], filters[dead, 0, 0])
        if m == 2:
            others = torch.ones(60, dtype=torch.bool).index_fill(0, torch.cat([broken, dead]), False)
            for x, y in zip(fit, whole, strict=True):
                torch.testing.assert_close(x[others], y[others])


def test_dependent_keys():
    filters = noise(20)
    independent = mkf.affine_fit(filters, KEYS, method="combination")
    keys = torch.cat([KEYS, 2 * KEYS[:3] + 1, KEYS[:1] - KEYS[1:2]])
    every = mkf.affine_fit(filters, keys, method="combination")
    torch.testing.assert_close(every.residual, independent.residual)
    q = keys.flatten(1).double()
    q -= q.mean(1, keepdim=True)
    norm = q.norm(dim=1)
    f = filters.flatten(1).double()
    least = (f - f.mean(1, keepdim=True)) @ torch.linalg.pinv(q / norm[:, None], rtol=1e-5) / norm
    torch.testing.assert_close(every.scale.double(), least, rtol=1e-4, atol=1e-5)
    few = mkf.affine_fit(filters, keys, method="combination", topk=12)
    torch.testing.assert_close(few.residual, independent.residual)
    assert ((few.scale == 0).sum(1) == 4).all()
    assert all(sorted(row) == list(range(12)) for row in few.index.tolist())


@pytest.mark.parametrize("distance", [1e-3, 2e-5])
def test_keys_that_are_nearly_dependent(distance):
    keys = torch.cat([KEYS] * 3).double() + distance * noise(24).double()
    filters = torch.cat([mixtures(10, 0, keys), mixtures(10, 0.01, keys), noise(10).double()])
    for m in (3, 24):
        fit = mkf.affine_fit(filters, keys, method="combination", topk=m)
        residual = [expected(f[None], keys[j])[3].item() for f, j in zip(filters, fit.index, strict=True)]
        np.testing.assert_allclose(fit.residual, residual, rtol=2e-7, atol=1e-10)
    every = mkf.affine_fit(filters, keys, method="combination")
    np.testing.assert_allclose(every.residual, residual, rtol=2e-7, atol=1e-10)


@pytest.mark.parametrize("count", [49, 60, 256])
def test_more_keys_than_a_filter_has_taps(count):
    filters, keys = noise(10), noise(count, seed=3)
    for m in (None, 48, count):
        fit = mkf.affine_fit(filters, keys, method="combination", topk=m)
        assert fit.index.shape == (10, m or count)
        assert fit.residual.max() < 1e-10
        assert fit.scale.isfinite().all()
    assert ((fit.scale == 0).sum(1) == count - 48).all()


def test_equal_keys_go_to_the_lowest_index():
    keys = KEYS[[3, 3, 0, 0, 3]]
    fit = mkf.affine_fit(noise(200), keys, method="combination", topk=2)
    assert torch.equal(fit.index.sort(1).values, torch.tensor([0, 2], dtype=torch.int32).expand(200, 2))
    fit = mkf.affine_fit(KEYS[3:4], keys, method="combination", topk=3)
    assert fit.index.tolist() == [[0, 1, 2]]  # the others add nothing
    assert (fit.scale[0, 1:] == 0).all()


@pytest.mark.parametrize("budget", [1, 100_000, 10_000_000])
@pytest.mark.parametrize("m", [None, 3])
def test_the_size_of_a_piece_does_not_matter(budget, m, monkeypatch):
    filters = noise(100)
    whole = mkf.affine_fit(filters, KEYS, method="combination", topk=m)
    monkeypatch.setattr(combination, "WORKING_BYTES", budget)
    for x, y in zip(mkf.affine_fit(filters, KEYS, method="combination", topk=m), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_containers_and_no_filters():
    filters = noise(20)
    fit = mkf.affine_fit(filters, KEYS, method="combination", topk=2)
    array = mkf.affine_fit(filters.numpy().reshape(20, 49), mkf.keys.paper8(), method="combination", topk=2)
    assert all(isinstance(x, np.ndarray) and np.array_equal(x, y.numpy()) for x, y in zip(array, fit, strict=True))
    bank = mkf.FilterBank.from_layers([mkf.bank.Layer("a", filters)], "m")
    same = mkf.affine_fit(bank, KEYS, method="combination", topk=2)
    assert all(torch.equal(x, y) for x, y in zip(same, fit, strict=True))
    empty = mkf.affine_fit(filters[:0], KEYS, method="combination")
    assert [tuple(x.shape) for x in empty] == [(0, 8), (0, 8), (0,), (0,)]


def test_refused():
    filters = noise(5)
    with pytest.raises(ValueError, match="method='two': use 'one' or 'combination'"):
        mkf.affine_fit(filters, KEYS, method="two")
    with pytest.raises(ValueError, match="sign='positive' is for single keys"):
        mkf.affine_fit(filters, KEYS, method="combination", sign="positive")
    with pytest.raises(ValueError, match="backend='native' is for single keys"):
        mkf.affine_fit(filters, KEYS, method="combination", backend="native")
    with pytest.raises(ValueError, match="topk=9: expected a whole number from 1 to 8"):
        mkf.affine_fit(filters, KEYS, method="combination", topk=9)
    keys = KEYS.clone()
    keys[2] = 1
    with pytest.raises(ValueError, match=r"keys \[2\] are constant or not finite"):
        mkf.affine_fit(filters, keys, method="combination")


def differentiable(filters, keys, index):
    """The fit to given keys in float64 torch, by the normal equations."""
    y, x = filters.flatten(1), keys.flatten(1)[index]
    y_centred, x_centred = y - y.mean(1, keepdim=True), x - x.mean(2, keepdim=True)
    a = torch.linalg.solve(x_centred @ x_centred.mT, (x_centred @ y_centred[:, :, None])[:, :, 0])
    b = y.mean(1) - (a * x.mean(2)).sum(1)
    error = y_centred - (a[:, None] @ x_centred)[:, 0]
    return a, b, error.norm(dim=1) / y_centred.norm(dim=1)


@pytest.mark.parametrize("m", [None, 1, 3])
@pytest.mark.parametrize("budget", [20_000, 1 << 20])
def test_gradients(m, budget, monkeypatch):
    monkeypatch.setattr(combination, "WORKING_BYTES", budget)
    filters, keys = (5 * noise(30)).double().requires_grad_(), (2 * KEYS.double() + 0.3).requires_grad_()
    fit = mkf.affine_fit(filters, keys, method="combination", topk=m)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(fit[1:])]
    sum((w * x).sum() for w, x in zip(weights, fit[1:], strict=True)).backward()
    f, q = (x.detach().requires_grad_() for x in (filters, keys))
    sum((w * x).sum() for w, x in zip(weights, differentiable(f, q, fit.index.long()), strict=True)).backward()
    torch.testing.assert_close(filters.grad, f.grad)
    torch.testing.assert_close(keys.grad, q.grad)


@pytest.mark.parametrize("m", [None, 1, 3])
@pytest.mark.filterwarnings("error")
def test_second_derivatives_are_those_of_filters(m):
    filters, keys = (5 * noise(30)).double().requires_grad_(), 2 * KEYS.double() + 0.3
    weights = [torch.randn(30, *shape, generator=torch.Generator().manual_seed(1)) for shape in ((m or 8,), (), ())]

    def penalty(outputs):
        loss = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        return torch.autograd.grad(loss, filters, create_graph=True)[0].square().sum()

    fit = mkf.affine_fit(filters, keys, method="combination", topk=m)
    own, right = (
        torch.autograd.grad(penalty(outputs), filters)
        for outputs in (fit[1:], differentiable(filters, keys, fit.index.long()))
    )
    torch.testing.assert_close(own, right)
    fit = mkf.affine_fit(filters, keys.requires_grad_(), method="combination", topk=m)
    with pytest.raises(NotImplementedError, match=r"keys require gradients too: give keys.detach\(\)"):
        penalty(fit[1:])


def test_gradients_at_other_keys_than_the_best():
    filters, keys = noise(20).double().requires_grad_(), KEYS.double().requires_grad_()
    index = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(20)])
    outputs = differentiable(filters, keys, index)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(outputs)]
    right = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), (filters, keys))
    own = torch.ops.mkf.affine_combination_gradients(filters.detach(), keys.detach(), 3, index.int(), *weights)
    torch.testing.assert_close(own, right)


def test_a_key_that_adds_nothing_has_no_gradients():
    filters = noise(4).requires_grad_()
    fit = mkf.affine_fit(filters, torch.cat([KEYS[:1], 2 * KEYS[:2] + 1]), method="combination", topk=3)
    assert (fit.scale[:, 2] == 0).all()
    fit.scale[:, 2].sum().backward()
    assert (filters.grad == 0).all()


def test_gradients_where_there_is_nothing_to_move():
    filters = noise(4)
    filters[0], filters[1], filters[2] = 2.0, KEYS[1] * 3 + KEYS[2], torch.nan
    filters.requires_grad_()
    for m in (None, 4):
        fit = mkf.affine_fit(filters, KEYS, method="combination", topk=m)
        filters.grad = None
        (fit.residual.nansum() + fit.scale.nansum()).backward(retain_graph=True)
        assert filters.grad.isfinite().all()
        assert (filters.grad[[0, 2]] == 0).all()
        assert (filters.grad[3] != 0).all()
        filters.grad = None
        fit.shift.sum().backward()
        torch.testing.assert_close(filters.grad[0], torch.full((7, 7), 1 / 49))
        assert (filters.grad[2] == 0).all()
    exact = (3 * KEYS[1:2].double() + KEYS[2:3]).requires_grad_()
    for m in (None, 4):
        mkf.affine_fit(exact, KEYS.double(), method="combination", topk=m).residual.sum().backward()
        assert (exact.grad == 0).all()


@pytest.mark.parametrize("m", [None, 2])
def test_opcheck(m):
    f, q = noise(10).permute(0, 2, 1), noise(4, seed=1)
    operator, tolerances = torch.ops.mkf.affine_combination, {"atol": 1e-5, "rtol": 1e-4}
    for wanted in (f, f.bfloat16(), f.detach().requires_grad_()):
        torch.library.opcheck(operator.default, (wanted, q, m), **tolerances)
    scale, shift, residual, index = operator.default(f, q, m)
    out = {"scale": scale.clone(), "shift": shift.clone(), "residual": residual.clone(), "index": index.clone()}
    torch.library.opcheck(operator.out, (f, q, m), out)
    gradients = (f, q, m, index, scale, shift, residual)
    torch.library.opcheck(torch.ops.mkf.affine_combination_gradients.default, gradients, **tolerances)


def test_compiled():
    filters = noise(10).requires_grad_()

    def penalty(f):
        return mkf.affine_fit(f, KEYS, method="combination", topk=2).residual.sum()

    torch.compile(penalty, fullgraph=True, backend="aot_eager")(filters).backward()
    compiled, filters.grad = filters.grad, None
    penalty(filters).backward()
    torch.testing.assert_close(compiled, filters.grad)
