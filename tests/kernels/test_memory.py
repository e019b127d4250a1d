"""Kernels of the CPU touch nothing outside of their tensors, also where these lie beside memory that may not be."""

import ctypes
import mmap
import sys

import pytest
import torch

from mkf import affine_fit
from mkf.kernels import registry
from mkf.kernels.key_conv2d.plan import make_plan
from tests.kernels.affine_fit_float64 import assert_agrees
from tests.kernels.runs_here import runnable
from tests.kernels.test_key_conv2d import ERROR, LAYOUTS, Problem, noise, some_keys

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is fenced in by Linux's mprotect")

NO_ACCESS, READ_AND_WRITE = 0, 3
NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python's mmap does not name


def native(operator):
    return next(i for i in registry.implementations(operator) if i.name == "native").load()


@pytest.fixture(params=[isa for name, isa in runnable("key_conv2d") if name == "native"])
def isa(request, monkeypatch):
    monkeypatch.setenv("MKF_ISA", request.param)


@pytest.fixture
def fenced():
    """Copies tensors to where memory that may not be touched begins right after them, or ends right before them."""
    page, libc, maps = mmap.PAGESIZE, ctypes.CDLL(None), []
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def copy(tensor, at_end):
        size = tensor.numel() * tensor.element_size()
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (base, base + page + inner):
            assert libc.mprotect(fence, page, NO_ACCESS) == 0
        maps.append((memory, base, inner))
        offset = page + inner - size if at_end else page
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    yield copy
    for _, base, inner in maps:
        libc.mprotect(base, inner + 2 * page, READ_AND_WRITE)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ERROR)
def test_the_key_convolution(fenced, dtype, layout, at_end):
    for k in (3, 7):
        for stride in (1, 2):
            for shape in ((1, 1, 1, 1), (2, 17, 9, 10), (1, 37, 15, 3), (1, 5, 16, 29), (1, 64, 8, 7)):
                problem = Problem(shape, some_keys("mixed", k), stride, dtype, layout)
                for name in ("x", "dy", "index", "scale", "shift", "bias"):
                    setattr(problem, name, fenced(getattr(problem, name), at_end))
                problem.guarded = lambda like: (fenced(like, at_end).fill_(torch.nan), lambda: True)
                problem.check(native("key_conv2d"))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_fit(fenced, dtype, at_end):
    for k in (3, 7):
        for count in (1, 5, 17, 100):
            filters, keys = noise(count, k, k).to(dtype), noise(8, k, k, seed=1)
            assert_agrees(affine_fit(fenced(filters, at_end), keys, backend="native"), filters.double(), keys)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("images", "k"), [(17, 7), (17, 3), (1, 7)])
def test_offsets_beyond_31_bits(images, k, layout):
    """Of memory that is zero, and so never there; all that reads it is the bias's gradient.

    Across images and within one; a size of 3 goes through a tile also where 7 is read in place.
    """
    if not any(name == "native" for name, _ in runnable("key_conv2d")):
        pytest.skip("the extension is not built")
    channels, width = 32, 2048
    height = 17 * width // images
    elements = images * channels * height * width
    memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    dy = flat.view(images, channels, height, width)
    if layout == "last":
        dy = flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    dy[-1, 5, -110:-100, 100:110] = 1
    d_bias, one = torch.empty(channels), torch.ones(channels)
    index = torch.zeros(channels, dtype=torch.int32)
    options = make_plan(torch.ones(1, k, k)), index, one, one, (1, 1), (k // 2, k // 2), (1, 1)
    native("key_conv2d").key_conv2d_backward(dy, None, *options, None, None, None, d_bias)
    assert torch.equal(d_bias, 100.0 * (torch.arange(channels) == 5))
