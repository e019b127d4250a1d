"""What `affine_fit` accepts, refuses and returns."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import mkf
from mkf.kernels.registry import BackendError, implementations
from mkf.ops.arguments import filters_tensor


@pytest.fixture
def filters():
    return torch.randn(10, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def keys():
    return torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(1))


def test_shapes_and_containers_are_the_same_fit(filters, keys):
    fit = mkf.affine_fit(filters, keys)
    for same in (
        mkf.affine_fit(filters.flatten(1), keys),
        mkf.affine_fit(filters, keys.numpy()),
        mkf.affine_fit(filters.requires_grad_(), keys),
        mkf.affine_fit(torch.nn.Parameter(filters), keys),
    ):
        assert all(torch.equal(x, y) for x, y in zip(fit, same, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 2)[:, :, :7],
        lambda x: x.repeat_interleave(2, 0)[::2],
    ],
)
@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_keys_of_any_strides(filters, keys, view, backend):
    strided = view(keys)
    assert torch.equal(strided, keys)
    assert not strided.is_contiguous()
    fits = (mkf.affine_fit(filters, q, topk=4, backend=backend) for q in (keys, strided))
    assert all(torch.equal(x, y) for x, y in zip(*fits, strict=True))


def test_numpy_in_numpy_out(filters, keys):
    fit = mkf.affine_fit(filters.numpy(), keys)
    assert all(isinstance(x, np.ndarray) for x in fit)
    assert np.array_equal(fit.index, mkf.affine_fit(filters, keys).index.numpy())
    for array in (filters.numpy()[::-1], filters.numpy().astype(">f4"), np.asfortranarray(filters.numpy())):
        swapped = mkf.affine_fit(array, keys)
        assert sorted(swapped.index) == sorted(fit.index)


def test_read_only_memory_is_shared_and_not_written_to(filters, keys, tmp_path):
    np.save(tmp_path / "filters.npy", filters.double())
    wanted = filters.double().numpy()
    mapped = np.load(tmp_path / "filters.npy", mmap_mode="r")  # the process would not survive a write
    strided = np.load(tmp_path / "filters.npy", mmap_mode="r")[::2].swapaxes(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in (mapped, mapped[1:], strided, mapped[:0], mapped.reshape(-1, 49)):
            shared = filters_tensor(array)
            assert len(array) == 0 or shared.data_ptr() == array.ctypes.data
            assert np.array_equal(shared, array.reshape(shared.shape))
    del shared
    for backend in ("native", "numba", "reference"):
        for source, same in ((mapped, wanted), (strided, wanted[::2].swapaxes(1, 2))):
            for fits in zip(mkf.affine_fit(source, keys, backend=backend),
                            mkf.affine_fit(same.copy(), keys, backend=backend), strict=True):  # fmt: skip
                np.testing.assert_array_equal(*fits)
    for topk in (None, 2):
        mkf.affine_fit(mapped, keys, method="combination", topk=topk)
    mkf.analysis.identify(mapped[:4])
    mkf.analysis.duplicates(mapped)
    mkf.analysis.effective_dimension(mapped)
    mkf.search.clusters(mapped, 2)
    assert np.array_equal(mapped, wanted)
    held = filters_tensor(np.load(tmp_path / "filters.npy", mmap_mode="r"))  # which nothing else keeps
    assert np.array_equal(held, wanted)


def test_the_fit_is_relative_to_the_keys_as_given(filters, keys):
    fit = mkf.affine_fit(filters, keys)
    other = mkf.affine_fit(filters, 5 * keys + 2)
    assert torch.equal(fit.index, other.index)
    torch.testing.assert_close(other.scale, fit.scale / 5)
    own = other.scale[:, None, None] * (5 * keys + 2)[other.index] + other.shift[:, None, None]
    torch.testing.assert_close(own, fit.scale[:, None, None] * keys[fit.index] + fit.shift[:, None, None])


def test_key_sets_and_banks(filters):
    keys = mkf.keys.paper8()
    model = torch.nn.Conv2d(10, 10, 7, groups=10)
    model.weight.data = filters[:, None].clone()
    bank = mkf.FilterBank.from_model(model)
    fit, raw = mkf.affine_fit(bank, keys), mkf.affine_fit(filters, keys.filters)
    assert all(torch.equal(x, y) for x, y in zip(fit, raw, strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 7, 5), "expected"), ((3, 4, 4), "expected"), ((3, 13, 13), "expected"),
     ((3, 1, 7, 7), "weight"), ((3, 48), "expected"), ((7,), "expected"), ((3, 5, 5), r"5x5 but keys are 7x7")],
)  # fmt: skip
def test_filters_that_are_none(shape, message, keys):
    with pytest.raises(ValueError, match=message):
        mkf.affine_fit(torch.randn(shape), keys)


@pytest.mark.parametrize("shape", [(0, 7, 7), (257, 7, 7), (4, 49), (4, 7, 5)])
def test_keys_that_are_none(filters, shape):
    with pytest.raises(ValueError, match=r"expected \(K, k, k\)"):
        mkf.affine_fit(filters, torch.randn(shape))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, float("nan"), float("inf")])
def test_keys_that_fit_nothing(filters, keys, value):
    keys[2] = value
    with pytest.raises(ValueError, match=r"keys \[2\] are constant or not finite"):
        mkf.affine_fit(filters, keys)


def test_topk_of_numpy(filters, keys):
    fit, same = (mkf.affine_fit(filters, keys, topk=topk) for topk in (2, np.int64(2)))
    assert all(torch.equal(x, y) for x, y in zip(fit, same, strict=True))


def test_no_filters(filters, keys):
    fit = mkf.affine_fit(filters[:0], keys, topk=2)
    assert [(x.shape, x.dtype) for x in fit] == [((0, 2), torch.int32), *[((0, 2), torch.float32)] * 3]
    assert mkf.affine_fit(filters[:0].numpy(), keys).index.shape == (0,)
    empty = filters[:0].clone().requires_grad_()
    mkf.affine_fit(empty, keys).residual.sum().backward()
    assert empty.grad.shape == (0, 7, 7)
    with pytest.raises(ValueError, match="the bank is empty"):
        mkf.affine_fit(mkf.FilterBank.embedded().select(k=7, model="none such"), keys)


def test_options_that_are_none(filters, keys, monkeypatch):
    with pytest.raises(ValueError, match="sign="):
        mkf.affine_fit(filters, keys, sign="negative")
    for topk in (5, 0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match=re.escape(f"topk={topk!r}: expected a whole number from 1 to 4")):
            mkf.affine_fit(filters, keys, topk=topk)
    with pytest.raises(TypeError, match="backend=3"):
        mkf.affine_fit(filters, keys, backend=3)
    for dtype in (object, np.longdouble, np.complex64):
        with pytest.raises(TypeError, match=f"filters are {np.dtype(dtype)}: convert them to float32"):
            mkf.affine_fit(filters.numpy().astype(dtype), keys)
    with pytest.raises(ValueError, match="no such implementation; there are native"):
        mkf.affine_fit(filters, keys, backend="fortran")
    with pytest.raises(TypeError, match="int64"):
        mkf.affine_fit(filters.long(), keys)
    with pytest.raises(TypeError, match="list"):
        mkf.affine_fit([1, 2], keys)
    monkeypatch.setenv("MKF_ISA", "mmx")
    with pytest.raises(ValueError, match="MKF_ISA='mmx'"):
        mkf.affine_fit(filters, keys, backend="native")


def test_an_implementation_that_cannot_run_says_why(filters, keys, monkeypatch):
    from mkf.kernels import extension

    monkeypatch.setattr(extension, "missing", lambda: "no compiler on this planet")
    assert torch.equal(mkf.affine_fit(filters, keys).index, mkf.affine_fit(filters, keys, backend="reference").index)
    with pytest.raises(BackendError, match=r"no compiler on this planet\. Here numba, reference can"):
        mkf.affine_fit(filters, keys, backend="native")
    monkeypatch.setenv("MKF_BACKEND", "native")
    with pytest.raises(BackendError, match="MKF_BACKEND='native' cannot run"):
        mkf.affine_fit(filters, keys)


METHODS = [("one", None), ("one", 3), ("combination", None), ("combination", 3)]


def buffers(fit, fill=99):
    """Outputs like those of a fit, full of something else."""
    return mkf.AffineFit(*(torch.full_like(x, fill) for x in fit))


@pytest.mark.parametrize(("method", "topk"), METHODS)
def test_out_is_written_and_returned(filters, keys, method, topk):
    options = {"method": method, "topk": topk}
    fit = mkf.affine_fit(filters, keys, **options)
    out = buffers(fit)
    assert mkf.affine_fit(filters, keys, **options, out=out) is out
    assert all(torch.equal(x, y) for x, y in zip(out, fit, strict=True))
    arrays = mkf.AffineFit(*(x.numpy() for x in buffers(fit)))
    assert mkf.affine_fit(filters.numpy(), keys, **options, out=arrays) is arrays
    assert all(np.array_equal(x, y.numpy()) for x, y in zip(arrays, fit, strict=True))
    whole = mkf.AffineFit(*(torch.cat([x, x]) for x in buffers(fit)))  # a part of something larger
    mkf.affine_fit(filters, keys, **options, out=mkf.AffineFit(*(x[10:] for x in whole)))
    assert all(torch.equal(x[10:], y) and (x[:10] == 99).all() for x, y in zip(whole, fit, strict=True))
    nothing = mkf.AffineFit(*(x[:0] for x in buffers(fit)))
    assert mkf.affine_fit(filters[:0], keys, **options, out=nothing) is nothing


@pytest.mark.parametrize("method", ["one", "combination"])
def test_out_that_is_unfit(filters, keys, method):
    fit = mkf.affine_fit(filters, keys, method=method, topk=2)

    def refused(error, message, f=filters, **replaced):
        out = buffers(fit)._replace(**replaced)
        before = [x.clone() for x in out if isinstance(x, torch.Tensor) and not x.is_meta]
        with pytest.raises(error, match=message):
            mkf.affine_fit(f, keys, method=method, topk=2, out=out)
        after = [x for x in out if isinstance(x, torch.Tensor) and not x.is_meta]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    refused(ValueError, r"out.scale has shape \(10,\): this fit writes \(10, 2\)", scale=torch.zeros(10))
    refused(ValueError, r"out.index has shape \(9, 2\)", index=torch.zeros(9, 2, dtype=torch.int32))
    refused(TypeError, "out.index is torch.int64: make it torch.int32", index=torch.zeros(10, 2, dtype=torch.int64))
    refused(TypeError, "out.scale is torch.float64: make it torch.float32", scale=torch.zeros(10, 2).double())
    refused(TypeError, "out.scale: expected a tensor or a numpy array, not list", scale=[1.0])
    refused(ValueError, "out.scale is not contiguous", scale=torch.zeros(2, 10).T)
    refused(ValueError, "out.scale is on meta, but the filters are on cpu", scale=torch.zeros(10, 2, device="meta"))
    frozen = np.zeros((10, 2), np.float32)
    frozen.flags.writeable = False
    refused(ValueError, "out.scale is read-only", scale=frozen)
    refused(ValueError, "out.scale is an array that torch cannot share", scale=np.zeros((10, 2), ">f4"))
    refused(ValueError, "out.scale is an array that torch cannot share", scale=np.zeros((10, 2), np.float32)[::-1])
    refused(ValueError, "out.scale is not contiguous", scale=np.zeros((2, 10), np.float32).T)
    with pytest.raises(TypeError, match="expected an AffineFit of four tensors or arrays, not tuple"):
        mkf.affine_fit(filters, keys, method=method, topk=2, out=tuple(buffers(fit)))


@pytest.mark.parametrize("method", ["one", "combination"])
def test_out_that_shares_memory(method):
    memory = torch.randn(30, 7, 7, generator=torch.Generator().manual_seed(0))
    filters, keys = memory[:20], memory[20:24]
    fit = mkf.affine_fit(filters, keys, method=method, topk=2)
    out = buffers(fit)
    flat = memory.view(-1)
    within, in_keys, beside = flat[40:80].view(20, 2), flat[990:1030].view(20, 2), flat[1200:1240].view(20, 2)
    for f in (filters, filters.numpy(), filters.transpose(1, 2)):
        for scale, message in ((within, "out.scale shares memory with filters"), (in_keys, "with keys")):
            with pytest.raises(ValueError, match=message):
                mkf.affine_fit(f, keys, method=method, topk=2, out=out._replace(scale=scale))
    mkf.affine_fit(filters, keys, method=method, topk=2, out=out._replace(scale=beside))
    assert torch.equal(beside, fit.scale)
    with pytest.raises(ValueError, match=r"out.index shares memory with out.scale"):
        mkf.affine_fit(filters, keys, method=method, topk=2, out=out._replace(index=out.scale.view(torch.int32)))


@pytest.mark.parametrize("method", ["one", "combination"])
def test_out_has_no_gradients(filters, keys, method):
    out = buffers(mkf.affine_fit(filters, keys, method=method))
    for f, q, o in (
        (filters.clone().requires_grad_(), keys, out),
        (filters, keys.clone().requires_grad_(), out),
        (filters, keys, out._replace(scale=out.scale.clone().requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match="a fit with out= has no gradients"):
            mkf.affine_fit(f, q, method=method, out=o)
        with torch.no_grad():
            mkf.affine_fit(f, q, method=method, out=o)
    # What was saved for a backward and is overwritten since must not be used.
    weight = torch.ones_like(out.scale, requires_grad=True)
    product = (weight * out.scale).sum()
    mkf.affine_fit(filters, keys, method=method, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(("method", "topk"), METHODS)
def test_out_compiled(filters, keys, method, topk):
    fit = mkf.affine_fit(filters, keys, method=method, topk=topk)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(f, q, out):
        return mkf.affine_fit(f, q, method=method, topk=topk, out=out).scale + 1

    out = buffers(fit)
    assert torch.equal(run(filters, keys, out), fit.scale + 1)
    assert all(torch.equal(x, y) for x, y in zip(out, fit, strict=True))


def test_meta_tensors_and_compile(filters, keys):
    fit = torch.ops.mkf.affine_fit(filters.to("meta"), keys.to("meta"), 2, False, "")
    assert [x.shape for x in fit] == [(10, 2)] * 4
    compiled = torch.compile(lambda f, q: mkf.affine_fit(f, q).scale * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(filters, keys), mkf.affine_fit(filters, keys).scale * 2)


def line(filters, keys, index):
    """The fit to given keys in differentiable float64 torch."""
    y, x = filters.flatten(1)[:, None], keys.flatten(1)[index.clamp(min=0)]
    x_mean, y_mean = x.mean(2, keepdim=True), y.mean(2, keepdim=True)
    a = ((x - x_mean) * (y - y_mean)).sum(2) / (x - x_mean).square().sum(2)
    b = y_mean[..., 0] - a * x_mean[..., 0]
    error = (y - a[..., None] * x - b[..., None]).norm(dim=2)
    return a, b, error / (y - y_mean).norm(dim=2)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients(filters, keys, topk, dtype):
    filters, keys = (x.to(dtype).requires_grad_() for x in (filters, keys + 0.3))
    fit = mkf.affine_fit(filters, keys, topk=topk)
    weights = [torch.randn(10, topk, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    sum((w * x).sum() for w, x in zip(weights, fit[1:], strict=True)).backward()
    f, q = (x.detach().double().requires_grad_() for x in (filters, keys))
    sum((w * x).sum() for w, x in zip(weights, line(f, q, fit.index), strict=True)).backward()
    torch.testing.assert_close(filters.grad, f.grad.to(dtype), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(keys.grad, q.grad.to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e30, 1e37])
def test_gradients_of_tiny_and_huge_filters(filters, keys, size):
    """In units of their size they are those of other filters, but for rounding."""
    gradients = []
    for unit in (1.0, size):
        f, q = ((x * u).double().float().requires_grad_() for x, u in ((filters, unit), (keys + 0.3, 1.0)))
        fit = mkf.affine_fit(f, q, topk=3)
        (fit.scale.sum() + 2 * fit.shift.sum() + 3 * unit * fit.residual.sum()).backward()
        gradients.append((f.grad, q.grad / unit))
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5)


def test_other_derivatives_are_refused(filters, keys):
    def residual(f):
        return mkf.affine_fit(f, keys).residual

    with pytest.raises(NotImplementedError, match="use backward"):
        torch.func.grad(lambda f: residual(f).sum())(filters)
    with pytest.raises(NotImplementedError, match="use backward"):
        torch.func.jvp(residual, (filters,), (filters,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use backward"):
        residual(torch.autograd.forward_ad.make_dual(filters, filters))
    with torch.autograd.forward_ad.dual_level():  # which concerns other tensors
        torch.testing.assert_close(residual(filters), mkf.affine_fit(filters, keys).residual)


@pytest.mark.parametrize("sign", ["any", "positive"])
def test_gradcheck(filters, keys, sign):
    filters, keys = filters[:5].double().requires_grad_(), keys.double().requires_grad_()
    # The outputs are float32, so the finite differences take a large step.
    assert torch.autograd.gradcheck(
        lambda f, q: tuple(x.double() for x in mkf.affine_fit(f, q, sign=sign)[1:]),
        (filters, keys),
        eps=3e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("noise", [1e-3, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("sign", ["any", "positive"])
def test_gradients_near_exact_copies_are_no_longer_than_they_can_be(keys, noise, sign):
    """|dr/df'| = sqrt(1 - r^2) / |f'|."""
    generator = torch.Generator().manual_seed(2)
    copies = keys[torch.arange(400) % 4] + noise * torch.randn(400, 7, 7, generator=generator)
    copies = (3 * copies + 0.5).requires_grad_()
    mkf.affine_fit(copies, keys, sign=sign).residual.sum().backward()
    centred = copies.detach() - copies.detach().mean((1, 2), keepdim=True)
    assert (copies.grad.flatten(1).norm(dim=1) * centred.flatten(1).norm(dim=1)).max() < 1 + 1e-4


def test_a_scale_held_at_zero_has_no_gradients(filters, keys):
    key = keys[:1].requires_grad_()
    opposite = (0.1 * filters - 2 * key.detach()).requires_grad_()
    fit = mkf.affine_fit(opposite, key, sign="positive")
    assert (fit.scale == 0).all()
    (fit.scale.sum() + fit.residual.sum()).backward()
    assert (opposite.grad == 0).all()
    assert (key.grad == 0).all()


def test_gradients_where_there_is_nothing_to_move(filters, keys):
    filters[0], filters[1], filters[2] = 2.0, keys[1] * 3, torch.nan
    filters.requires_grad_()
    fit = mkf.affine_fit(filters, keys)
    fit.residual.nansum().backward(retain_graph=True)
    assert filters.grad.isfinite().all()
    assert (filters.grad[[0, 2]] == 0).all()
    filters.grad = None
    fit.shift[0].backward()
    torch.testing.assert_close(filters.grad[0], torch.full((7, 7), 1 / 49))


@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x.permute(0, 2, 1), lambda x: x[::2], lambda x: x.expand(10, 7, 7), lambda x: x.bfloat16()],
)
def test_opcheck(filters, keys, view):
    f = view(filters)
    for wanted in (f, f.detach().requires_grad_()):
        torch.library.opcheck(torch.ops.mkf.affine_fit.default, (wanted, keys, 2, False, ""), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("topk", [None, 2])
def test_opcheck_out(filters, keys, topk):
    arguments = (filters.permute(0, 2, 1), keys, topk, False, "")
    outputs = torch.ops.mkf.affine_fit.default(*arguments)
    out = dict(zip(("scale", "shift", "residual", "index"), outputs, strict=True))
    torch.library.opcheck(torch.ops.mkf.affine_fit.out, arguments, out)


MEMORY = """
import re, sys
from pathlib import Path
import torch
from mkf.keys import paper8
from mkf.ops import AffineFit, affine_fit

count, given = int(sys.argv[1]), sys.argv[2] == "out"
options = {"method": "combination"} if sys.argv[3] == "combination" else {"backend": sys.argv[3]}
several = 8 if sys.argv[3] == "combination" else 1
def kilobytes(what):
    # Not ru_maxrss, which in a new process starts at what its parent had.
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

filters = torch.empty(count, 7, 7).uniform_()
keys = paper8()
affine_fit(filters[:30_000], keys, **options)
out = None
if given:
    shapes = ((count, 8), (count, 8), (count,), (count,)) if several > 1 else ((count,),) * 4
    dtypes = (torch.int32, *[torch.float32] * 3)
    out = AffineFit(*(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)))
before = kilobytes("VmRSS")
fit = affine_fit(filters, keys, out=out, **options)
print(kilobytes("VmHWM") - before)
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize("backend", ["native", "numba"])  # the reference's pieces take some 40 MB, whatever is fitted
def test_memory(backend):
    reason = next(i.why_not(torch.device("cpu")) for i in implementations("affine_fit") if i.name == backend)
    if reason:
        pytest.skip(reason)
    assert extra_bytes_a_filter(backend, "new", 2_000_000) < 24  # of which the result has 16
    assert extra_bytes_a_filter(backend, "out", 2_000_000) < 8


@linux
def test_memory_of_combinations():
    # The result has 8 scales and indices, a shift and a residual. What a piece takes does not grow: 40 MB, generously.
    assert extra_bytes_a_filter("combination", "new", 1_000_000) < 72 + 40
    assert extra_bytes_a_filter("combination", "out", 1_000_000) < 40


def extra_bytes_a_filter(how, given, count):
    script = [sys.executable, "-c", MEMORY, str(count), given, how]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / count


def test_a_word_for_keys_is_told_how_to_become_them() -> None:
    with pytest.raises(TypeError, match=r"keys='paper8': give a KeySet, which mkf\.keys\.parse makes"):
        mkf.affine_fit(torch.ones(1, 7, 7), "paper8")
