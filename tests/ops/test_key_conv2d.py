"""What the key convolution means, accepts and refuses, and its derivatives, against float64.

The implementations, by instruction set, are tested in tests/kernels.
"""

import io
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import mkf
from mkf.kernels import registry
from mkf.kernels.registry import BackendError
from mkf.ops import explain_key_conv2d, key_conv2d
from tests.ops.key_conv2d_problems import KEYS, LAYOUTS, Problem, noise

pytestmark = pytest.mark.usefixtures("poisoned")

CPU = torch.device("cpu")
RUNNABLE = [i.name for i in registry.implementations("key_conv2d") if i.why_not(CPU) is None]


@pytest.fixture(params=RUNNABLE)
def backend(request):
    """The name of an implementation, which a call within its fast path must be served by."""
    return request.param


SHAPES = [(2, 40, 14, 14), (1, 16, 7, 7), (3, 17, 9, 20), (1, 33, 1, 1), (1, 66, 2, 33), (2, 1, 8, 8)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("blocks", [0, 32])
def test_forward_and_gradients(backend, keys, layout, stride, blocks):
    for seed, shape in enumerate(SHAPES):
        problem = Problem(shape, KEYS[keys], layout=layout, blocks=blocks, shift=seed % 3 > 0, seed=seed)
        problem.options["stride"] = stride
        out, dx, *_ = problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend))
        assert out.is_contiguous(memory_format=LAYOUTS[layout])
        assert dx.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", ["published", "centred"])
def test_bfloat16(backend, keys, layout):
    for seed, shape in enumerate(SHAPES):
        problem = Problem(shape, KEYS[keys], layout=layout, dtype=torch.bfloat16, seed=seed)
        out, dx, d_scale, *_ = problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend))
        assert (out.dtype, dx.dtype, d_scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_go_where_they_are_served(dtype):
    for parameters in (torch.float32, dtype):
        problem = Problem((2, 20, 9, 8), KEYS["centred"], dtype=dtype)
        problem.scale, problem.shift, problem.bias = (
            t.to(parameters) for t in (problem.scale, problem.shift, problem.bias)
        )
        out, dx, d_scale, *_ = problem.check(key_conv2d)
        assert (out.dtype, dx.dtype, d_scale.dtype) == (dtype, dtype, parameters)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 0},
        {"padding": "valid", "stride": 3},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "dilation": (1, 3)},
        {"padding": (5, 1)},
        {"padding": 9, "stride": (2, 1)},
        {"padding": (3, 3), "stride": (1, 2)},
        {"padding": [4, 0], "stride": [2, 2], "dilation": [1, 1]},
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_geometry(options, layout):
    problem = Problem((2, 12, 13, 16), KEYS["mixed"], layout=layout)
    problem.options = options
    problem.check(key_conv2d)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x[:, 3:19, 1:-1, 2:],
        lambda x: x.transpose(2, 3),
        lambda x: x.permute(1, 0, 3, 2)[:2].expand(-1, -1, -1, -1),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 20, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
        lambda x: x.to(memory_format=torch.channels_last)[:, ::2],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:, ::3],
        lambda x: torch.randn(2, 20, 5, 5, 2)[..., 1],
    ],
)
def test_views(backend, view):
    x = view(noise(20, 20, 14, 12))
    problem = Problem(tuple(x.shape), KEYS["centred"])
    problem.x = x
    problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend))
    tensors = problem.tensors()[1:]
    out = key_conv2d(x, *tensors, padding=3, backend=backend)
    dense = key_conv2d(x.contiguous(), *tensors, padding=3, backend=backend)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_views(backend):
    problem = Problem((2, 20, 9, 8), KEYS["centred"], layout="nhwc")
    x, *rest = problem.tensors()
    x.requires_grad_()
    for dy in (torch.ones(1).expand(2, 20, 9, 8), noise(2, 20, 8, 9).mT, noise(9, 8, 2, 20).permute(2, 3, 0, 1)):
        (dx,) = torch.autograd.grad(key_conv2d(x, *rest, padding=3, backend=backend), x, dy)
        (exact,) = torch.autograd.grad(problem.torch(torch.float64, x, *rest), x, dy.double())
        torch.testing.assert_close(dx, exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(), ("x",), ("bias",), ("scale",), ("shift",), ("x", "bias"), ("shift", "bias")])
def test_only_the_gradients_that_are_wanted(backend, wanted):
    problem = Problem((2, 20, 9, 8), KEYS["mixed"], layout="nhwc")
    problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend), wanted)
    tensors = dict(zip(("x", "keys", "index", "scale", "shift", "bias"), problem.tensors(), strict=True))
    for name in wanted:
        tensors[name].requires_grad_()
    out = key_conv2d(*tensors.values(), padding=3, backend=backend)
    assert out.requires_grad == bool(wanted)
    if wanted:  # the activations are only kept where they are needed
        assert (out.grad_fn.saved_tensors[0] is not None) == ("scale" in wanted or "shift" in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_train(backend, layout):
    for keys in ("analytic", "published"):
        problem = Problem((3, 40, 9, 8), KEYS[keys], layout=layout)
        problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend), ("x", "keys", "scale", "shift", "bias"))
        problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend), ("keys",))


def test_real_images(backend, data_dir):
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.ParquetFile(data_dir / "images/imagenette96/val-00000-of-00001.parquet").iter_batches(
        4, columns=["image"]
    )
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in next(rows)["image"].to_pylist()]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    for keys in ("published", "centred"):
        problem = Problem((2, 12, 96, 96), KEYS[keys])
        problem.x = images.repeat(1, 4, 1, 1).float()
        problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend))


def test_a_tolerance_approximates_the_keys(backend):
    keys = mkf.keys.paper8()
    plan = keys.plan(0.1)
    problem = Problem((1, 8, 20, 20), plan.dense().float(), shift=False, bias=False)
    problem.index = torch.arange(8, dtype=torch.int32)
    problem.scale = torch.ones(8)
    x, _, *rest = problem.tensors()
    exact, near = (key_conv2d(x, keys, *rest, padding=3, backend=backend, tolerance=t) for t in (0.0, 0.1))
    described = problem.torch(torch.float64, *problem.tensors()).float()
    error = (near - exact).norm() / exact.norm()
    assert error < 0.3
    # The reference stays exact; who takes the approximation takes that of the plan.
    torch.testing.assert_close(near, exact if backend == "reference" else described, rtol=1e-4, atol=1e-4)


class TestEmptyAndSmall:
    def test_no_images(self, backend):
        problem = Problem((0, 5, 9, 8), KEYS["centred"])
        leaves = [t.requires_grad_() for t in (problem.x, problem.scale, problem.shift, problem.bias)]
        out = key_conv2d(*problem.tensors(), padding=3, stride=2, backend=backend)
        assert out.shape == (0, 5, 5, 4)
        dx, *parameters = torch.autograd.grad(out.sum(), leaves)
        assert dx.shape == (0, 5, 9, 8)
        assert all(torch.equal(g, torch.zeros(5)) for g in parameters)
        keys = problem.keys.requires_grad_()
        (d_keys,) = torch.autograd.grad(key_conv2d(*problem.tensors(), padding=3, backend=backend).sum(), keys)
        assert torch.equal(d_keys, torch.zeros(8, 7, 7))

    def test_one_image_without_a_batch(self, backend):
        problem = Problem((1, 5, 9, 8), KEYS["centred"])
        x, *rest = problem.tensors()
        x.requires_grad_()
        single = key_conv2d(x[0], *rest, padding=3, backend=backend)
        assert torch.equal(single, key_conv2d(x, *rest, padding=3, backend=backend)[0])
        assert torch.autograd.grad(single.sum(), x)[0].shape == x.shape

    def test_the_input_may_be_smaller_than_the_filter_with_its_padding(self):
        problem = Problem((1, 5, 1, 1), KEYS["centred"])
        assert problem.check(key_conv2d)[0].shape == (1, 5, 1, 1)


class TestArguments:
    @pytest.fixture
    def call(self):
        problem = Problem((2, 12, 9, 8), KEYS["analytic"])
        arguments = dict(zip(("x", "keys", "index", "scale", "shift", "bias"), problem.tensors(), strict=True))
        return lambda **changes: key_conv2d(**{**arguments, "padding": 3, **changes})

    def test_key_sets_tensors_and_integers_of_any_width(self, call):
        out = call()
        assert torch.equal(out, call(keys=KEYS["analytic"]))
        assert torch.equal(out, call(keys=KEYS["analytic"].filters.mT.contiguous().mT))
        assert torch.equal(out, call(padding="same", stride=[1, 1], dilation=(1, 1)))
        index = Problem((2, 12, 9, 8), KEYS["analytic"]).index
        for dtype in (torch.int64, torch.int16, torch.uint8):
            assert torch.equal(out, call(index=index.to(dtype)))
        assert torch.equal(out, call(index=index.repeat_interleave(2)[::2]))
        assert torch.equal(call(bias=None), call(bias=torch.zeros(12)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": noise(2, 12, 9)[0]}, r"x has shape \(12, 9\)"),
            ({"x": noise(2, 12, 0, 9)}, "only N may be 0"),
            ({"x": noise(2, 11, 9, 8)}, r"index has shape \(12,\), but x has 11 channels: expected \(11,\)"),
            ({"scale": noise(12, 1)}, r"scale has shape \(12, 1\), but x has 12 channels"),
            ({"shift": noise(1)}, r"shift has shape \(1,\)"),
            ({"bias": noise(13)}, r"bias has shape \(13,\)"),
            ({"keys": noise(8, 7, 5)}, r"keys have shape \(8, 7, 5\): expected \(K, k, k\)"),
            ({"keys": noise(8, 4, 4)}, "with k one of"),
            ({"keys": noise(8, 1, 7, 7)}, r"expected \(K, k, k\)"),
            ({"keys": noise(257, 3, 3)}, "there are 257 keys"),
            ({"padding": -1}, "padding=-1: expected a whole number of 0 or more"),
            ({"padding": "full"}, "'same' or 'valid'"),
            ({"padding": (1, 2, 3)}, "or two of them"),
            ({"padding": 1.5}, "padding=1.5"),
            ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
            ({"stride": 0}, "stride=0: expected a whole number of 1 or more"),
            ({"dilation": (1, 0)}, "dilation"),
            ({"padding": 0, "x": noise(2, 12, 6, 9)}, "x of 6x9 is smaller than a 7x7 filter"),
            ({"dilation": 3}, "smaller than a 7x7 filter of dilation"),
            ({"tolerance": 1.0}, "relative error"),
            ({"backend": "fortran"}, "no such implementation; there are"),
            ({"index": torch.tensor([0] * 11 + [8])}, r"out of range \[0, 8\) in 1 of 12 channels.*channel 11"),
            ({"index": torch.tensor([0, -1] * 6)}, "in 6 of 12 channels, the first is channel 1"),
            ({"index": torch.tensor([0] * 11 + [2**32])}, "out of range"),
            ({"scale": torch.tensor([1.0] * 11 + [torch.nan])}, "scale is not finite in 1 of 12 channels"),
            ({"shift": torch.tensor([torch.inf] * 3 + [1.0] * 9)}, "shift is not finite in 3 of 12 channels"),
            ({"keys": torch.full((8, 7, 7), torch.nan)}, r"keys \[0, 1, 2, 3, 4, 5, 6, 7\] are not finite"),
        ],
    )  # fmt: skip
    def test_values_that_are_refused(self, call, changes, message):
        with pytest.raises(ValueError, match=message):
            call(**changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.zeros(2, 12, 9, 8, dtype=torch.int64)}, "x is torch.int64"),
            ({"x": np.zeros((2, 12, 9, 8), np.float32)}, "x: expected a tensor, not ndarray"),
            ({"keys": np.zeros((8, 7, 7), np.float32)}, "keys: expected a KeySet or a tensor, not ndarray"),
            ({"keys": torch.zeros(8, 7, 7, dtype=torch.int32)}, "keys are torch.int32"),
            ({"index": [0] * 12}, "index: expected a tensor, not list"),
            ({"index": torch.zeros(12)}, "index is torch.float32: expected integers"),
            ({"index": torch.zeros(12, dtype=torch.bool)}, "index is torch.bool"),
            ({"scale": None}, "scale: expected a tensor, not NoneType"),
            ({"scale": noise(12).double()}, "scale is torch.float64, x is torch.float32: make scale float32"),
            ({"bias": noise(12).bfloat16()}, "bias is torch.bfloat16"),
        ],
    )  # fmt: skip
    def test_types_that_are_refused(self, call, changes, message):
        with pytest.raises(TypeError, match=message):
            call(**changes)

    @pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: noise(2, 12, 9, 8).to_sparse(), "torch.sparse_coo"),
            (lambda: noise(12, 9).to_sparse_csr(), "torch.sparse_csr"),
            (lambda: torch.nested.nested_tensor([noise(12, 9, 8)]), "nested"),
        ],
    )
    def test_inputs_that_are_not_dense(self, call, make, message):
        with pytest.raises(TypeError, match=f"x is not a dense tensor but {message}"):
            call(x=make())

    @pytest.mark.parametrize("name", ["x", "keys", "index", "scale", "shift", "bias"])
    def test_tensors_on_several_devices(self, call, name):
        problem = Problem((2, 12, 9, 8), KEYS["analytic"])
        with pytest.raises(ValueError, match="move them to one device"):
            call(**{name: getattr(problem, name).to("meta")})

    def test_large_but_finite_parameters(self, call):
        huge = torch.full((12,), 1e25)  # the sum of their products is not finite in float32
        assert call(scale=huge, shift=-huge, x=torch.zeros(2, 12, 9, 8)).isfinite().all()


def enlist(monkeypatch, name="picky", reason="it has the wrong colour"):
    """An implementation, preferred to all, that refuses every call for that reason."""
    module = ModuleType(f"mkf.kernels.key_conv2d.{name}")
    module.why_not = lambda device: None
    module.why_not_call = lambda *call: reason
    monkeypatch.setitem(sys.modules, module.__name__, module)
    implementation = registry.Implementation("key_conv2d", name, ("cpu",), "for a test")
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (implementation, *registry.IMPLEMENTATIONS))


class TestChoice:
    def test_a_call_that_is_not_served_falls_back_and_says_so_when_asked(self, monkeypatch):
        problem = Problem((2, 12, 9, 8), KEYS["analytic"])
        out = key_conv2d(*problem.tensors(), padding=3)
        enlist(monkeypatch)
        assert torch.equal(key_conv2d(*problem.tensors(), padding=3), out)
        told = explain_key_conv2d(problem.x, problem.keys, padding=3)
        assert "; not picky: it has the wrong colour" in told
        with pytest.raises(
            BackendError, match=r"'picky' cannot run key_conv2d on cpu: it has the wrong colour\. Here "
        ):
            key_conv2d(*problem.tensors(), padding=3, backend="picky")
        monkeypatch.setenv("MKF_BACKEND", "picky")
        with pytest.raises(BackendError, match="MKF_BACKEND='picky' cannot run"):
            key_conv2d(*problem.tensors(), padding=3)

    def test_what_would_run(self):
        x = noise(2, 12, 9, 8)
        for name in RUNNABLE:
            assert explain_key_conv2d(x, KEYS["analytic"], padding=3, backend=name).startswith(f"{name}: ")
        assert explain_key_conv2d(x[0].double(), KEYS["analytic"]).startswith("reference: ")
        with pytest.raises(TypeError, match="int64"):
            explain_key_conv2d(x.long(), KEYS["analytic"])


class TestKeysInUse:
    @pytest.mark.parametrize("write", [lambda k: k.mul_(2), lambda k: k.data.mul_(2), lambda k: k.numpy().__imul__(2)])
    def test_writing_to_keys_takes_effect(self, backend, write):
        problem = Problem((1, 12, 9, 8), KEYS["analytic"], shift=False, bias=False)
        before = key_conv2d(*problem.tensors(), padding=3, backend=backend)
        write(problem.keys)
        torch.testing.assert_close(key_conv2d(*problem.tensors(), padding=3, backend=backend), 2 * before)

    def test_writing_to_the_index_takes_effect(self, backend):
        problem = Problem((1, 12, 9, 8), KEYS["analytic"])
        key_conv2d(*problem.tensors(), padding=3, backend=backend)
        problem.index.numpy()[:] = 3
        problem.check(lambda *t, **o: key_conv2d(*t, **o, backend=backend))
        problem.index.data[2] = 99
        with pytest.raises(ValueError, match="channel 2"):
            key_conv2d(*problem.tensors(), padding=3, backend=backend)

    def test_a_call_that_is_repeated_is_looked_at_again(self, backend, monkeypatch):
        """What was checked and chosen once is kept with the tensors, which may change in every way."""
        problem = Problem((1, 12, 9, 8), KEYS["analytic"])

        def call():
            return key_conv2d(*problem.tensors(), padding=3, backend=backend)

        def is_right():
            out = call()
            assert torch.equal(out, call())
            expected = problem.torch(torch.float64, *problem.tensors()).float()
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

        is_right()
        problem.scale.data = noise(24)[::2]  # of other strides
        is_right()
        problem.shift.add_(1)
        problem.bias.data = noise(12, seed=3)
        is_right()
        problem.x = problem.x.to(memory_format=torch.channels_last)
        is_right()
        problem.keys.requires_grad_()
        is_right()
        (d_keys,) = torch.autograd.grad(call().sum(), problem.keys)
        assert d_keys.any()
        problem.keys.requires_grad_(False)
        is_right()
        problem.shift[3] = torch.nan
        with pytest.raises(ValueError, match="shift is not finite"):
            call()
        problem.shift[3] = 0
        is_right()
        problem.bias.data = noise(13)
        with pytest.raises(ValueError, match="bias has shape"):
            call()
        problem.bias.data = noise(12).double()
        with pytest.raises(TypeError, match=r"bias is torch\.float64"):
            call()
        problem.bias = None
        is_right()
        backend = None
        is_right()
        monkeypatch.setenv("MKF_BACKEND", "fortran")
        with pytest.raises(ValueError, match="MKF_BACKEND='fortran'"):
            call()

    @pytest.mark.parametrize("name", ["scale", "shift"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("channel", [0, 11])
    def test_values_that_torch_does_not_see_change_are_looked_at(self, name, value, channel):
        problem = Problem((1, 12, 9, 8), KEYS["analytic"])
        for _ in range(2):
            key_conv2d(*problem.tensors(), padding=3)
        getattr(problem, name).numpy()[channel] = value
        with pytest.raises(ValueError, match=f"{name} is not finite"):
            key_conv2d(*problem.tensors(), padding=3)

    def test_the_last_key_counts_too(self):
        problem = Problem((1, 12, 9, 8), KEYS["analytic"])
        problem.index[:] = len(problem.keys) - 1
        for _ in range(2):
            key_conv2d(*problem.tensors(), padding=3)
        problem.keys.numpy()[-1] *= 2
        expected = problem.torch(torch.float64, *problem.tensors()).float()
        torch.testing.assert_close(key_conv2d(*problem.tensors(), padding=3), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["scale", "shift"])
    def test_parameters_may_get_other_memory(self, name):
        problem = Problem((1, 12, 9, 8), KEYS["analytic"])
        for _ in range(2):
            key_conv2d(*problem.tensors(), padding=3)
        before = getattr(problem, name).data  # kept, so that the new values lie elsewhere
        getattr(problem, name).data = noise(12, seed=5)
        assert getattr(problem, name).data_ptr() != before.data_ptr()
        expected = problem.torch(torch.float64, *problem.tensors()).float()
        torch.testing.assert_close(key_conv2d(*problem.tensors(), padding=3), expected, rtol=1e-4, atol=1e-4)

    def test_results_of_a_computation_are_not_kept(self):
        from mkf.ops.key_conv2d import eager

        problem = Problem((1, 12, 9, 8), KEYS["analytic"])
        leaf = problem.scale.requires_grad_()
        before = len(eager._kept)
        for _ in range(3):
            problem.scale = leaf.exp()
            key_conv2d(*problem.tensors(), padding=3)
        assert len(eager._kept) == before

    def test_writing_to_saved_parameters_before_backward_is_noticed(self):
        problem = Problem((1, 12, 9, 8), KEYS["analytic"])
        out = key_conv2d(problem.x.requires_grad_(), *problem.tensors()[1:], padding=3)
        problem.scale.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (3, 1, 4, 5), (2, 1, 1, 1), (2, 16, 1, 5)])
def test_strides_are_those_of_an_ordinary_convolution(shape, layout):
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    layer = mkf.KeyConv2d(shape[1], 7, mkf.keys.analytic("B"), padding=3)
    conv = layer.to_conv2d()
    out, expected = layer(x), conv(x)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert dx.stride() == x.stride()
