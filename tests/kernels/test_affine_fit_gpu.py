"""The CUDA and Triton kernels: on a GPU if there is one, and without one their code on the CPU and in the compilers."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mkf import AffineFit, affine_fit
from mkf.kernels import extension, gpu
from mkf.kernels.affine_fit import triton as triton_backend
from mkf.kernels.extension import DTYPES
from mkf.kernels.registry import implementations
from mkf.ops.affine_fit import _prepare
from tests.kernels.affine_fit_float64 import assert_agrees
from tests.kernels.pretender import enlist
from tests.kernels.runs_here import ROOT, run_interpreted, triton_version
from tests.kernels.test_affine_fit import (  # noqa: F401
    noise,
    test_a_common_offset_costs_nothing,
    test_a_common_offset_in_float64,
    test_a_filter_does_not_know_its_neighbours,
    test_any_number_of_keys,
    test_constant_filters_are_dead,
    test_dtypes,
    test_equal_keys_go_to_the_lowest_index,
    test_every_float16_value,
    test_nearly_tied_keys,
    test_not_finite_filters_leave_their_neighbours_alone,
    test_random_filters,
    test_real_filters,
    test_scales_of_one_sign,
    test_small_residuals_keep_their_digits,
    test_strided_filters,
    test_strided_filters_of_every_dtype_and_size,
    test_the_best_m_keys,
    test_tiny_and_huge_filters,
)

GPU = torch.device("cuda", 0)
BACKENDS = {i.name: i for i in implementations("affine_fit") if i.devices == ("cuda",)}


@pytest.fixture(scope="session")
def host_build(tmp_path_factory):
    """csrc/affine_fit/cuda_kernel.cuh compiled for the CPU."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    library = tmp_path_factory.mktemp("cuda_on_the_host") / "affine_fit.so"
    source = Path(__file__).with_name("affine_fit_cuda_host.cpp")
    flags = [
        "-O2",
        "-march=native",
        "-ffp-contract=off",
        "-std=c++17",
        "-fopenmp",
        "-shared",
        "-fPIC",
        "-I",
        ROOT / "csrc",
    ]
    subprocess.run([compiler, *flags, source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).affine_fit


def on_the_host(function):
    """An implementation that calls the C function."""

    def run(filters, keys, positive, *outputs):
        def address(x):
            return ctypes.c_void_p(x.data_ptr())

        count, best = outputs[0].shape
        strides = map(ctypes.c_int64, (count, *filters.stride()))
        arrays = map(address, (keys.unit, keys.inverse_norm, keys.mean))
        function(address(filters), DTYPES[filters.dtype], *strides, filters.shape[1], *arrays, len(keys.unit), best,
                 ctypes.c_bool(positive), *map(address, outputs))  # fmt: skip

    return run


def as_it_lies(filters):
    """A copy on the GPU with the same strides, at the same place in its memory."""
    whole = filters.new_empty(0).set_(filters.untyped_storage()).to(GPU)
    return whole.as_strided(filters.shape, filters.stride(), filters.storage_offset())


@pytest.fixture(params=["cuda_on_the_host", *(name for name, i in BACKENDS.items() if i.why_not(GPU) is None)])
def fit(request, monkeypatch):
    """`affine_fit` of CPU tensors by one kernel."""
    backend = request.param
    if backend in BACKENDS:

        def run(filters, keys, **options):
            return AffineFit(*(x.cpu() for x in affine_fit(as_it_lies(filters), keys, backend=backend, **options)))

        return run
    enlist(monkeypatch, backend, on_the_host(request.getfixturevalue("host_build")))
    return lambda filters, keys, **options: affine_fit(filters, keys, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", range(9))
def test_banks_that_start_anywhere(fit, dtype, start):
    """Copies go by 16 bytes: the first and the last filters may lie across them."""
    keys = noise(8, 7, 7, seed=1)
    storage = torch.full((16 + 40 * 49,), torch.nan).to(dtype)
    filters = storage[start : start + 37 * 49].view(37, 7, 7)
    filters.copy_(noise(37, 7, 7))
    assert_agrees(fit(filters, keys), filters.double(), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [30.0, 1e4, 5e4])
def test_near_a_key_and_far_from_zero(fit, offset, dtype):
    keys = noise(8, 7, 7, seed=1)
    filters = (-3 * keys[torch.arange(500) % 8] + torch.rand(500, 1, 1) * noise(500, 7, 7)).to(dtype) + offset
    assert_agrees(fit(filters, keys), filters, keys)


def test_ranks_of_filters_too_small_for_float32_sums(fit):
    keys = noise(6, 7, 7)[[0, 1, 1, 2, 0, 3, 4, 5]]
    best = fit(1e-25 * noise(50, 7, 7, seed=2), keys, topk=8)
    assert (best.index.sort(1).values == torch.arange(8)).all()
    ordinary = fit(noise(50, 7, 7, seed=2), keys, topk=8)
    assert torch.equal(best.index, ordinary.index)


def test_more_than_fits_into_shared_memory_at_once(fit):
    filters, keys = noise(30, 11, 11), noise(256, 11, 11, seed=1)
    filters[::2] = keys[torch.arange(0, 30, 2) * 8] + 1e-3 * filters[::2]
    assert_agrees(fit(filters, keys), filters, keys)
    best = fit(filters, keys, topk=256)
    assert (best.index.sort(1).values == torch.arange(256)).all()
    assert (best.residual.diff(dim=1) > -1e-6).all()


def test_triton_in_its_interpreter():
    run_interpreted("affine_fit_triton_interpreted.py")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_triton_compiles_without_spills(target, capsys, tmp_path, monkeypatch):
    sizes = (
        (7, 11) if triton_version() >= (3, 9) else (7,)
    )  # older ones lay 11x11 out so that a few registers are missing
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mkf.kernels.affine_fit.triton_kernel import affine_fit as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arch = int(target[3:]) if target.startswith("sm_") else target
    machine = GPUTarget("cuda", arch, 32) if target.startswith("sm_") else GPUTarget("hip", arch, 64)
    types = {"filters": "*fp32", "index": "*i32", "count": "i64", "keys_count": "i32", "best": "i32"}
    types |= dict.fromkeys(("stride", "row_stride", "col_stride"), "i64")
    for k in sizes:
        constants = triton_backend.constants(k, positive=False)
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=machine, options={"num_warps": triton_backend.WARPS})
        if "cubin" in compiled.asm:
            file = tmp_path / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
            ).stdout
            registers, spilled = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        else:
            text = compiled.asm["amdgcn"]
            registers, spilled = (
                int(re.search(rf"\.{what}:\s+(\d+)", text)[1]) for what in ("vgpr_count", "vgpr_spill_count")
            )
        with capsys.disabled():
            print(f"\ntriton affine_fit {k}x{k} for {target}: {registers} registers, {spilled} spilled", end="")
        assert spilled == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_compiles_without_spills(arch, capsys, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    flags = ["-O3", "-std=c++17", "-fmad=false", "-Xptxas", "-v"]  # as setup.py has them
    command = [nvcc, *flags, "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin"]
    source = ROOT / "csrc/affine_fit/cuda.cu"
    result = subprocess.run([*command, source, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pattern = (
        r"affine_fit_kernelILi(\d+)ELi(\d+)ELb([01]).*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) reg"
    )
    kernels = re.findall(pattern, result.stderr, re.DOTALL)
    assert len(kernels) == 3
    for filters, taps, one, stack, spilled, registers in kernels:
        with capsys.disabled():
            name = f"affine_fit_kernel<{filters}, {taps}, {bool(int(one))}>"
            print(f"\n{name} for sm_{arch}: {registers} registers, {stack} bytes of stack, {spilled} spilled", end="")
        assert (stack, spilled) == ("0", "0")


@pytest.mark.parametrize("backend", BACKENDS)
def test_reasons_are_given(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA" in BACKENDS[backend].why_not(GPU)
    assert "not for cpu" in BACKENDS[backend].why_not(torch.device("cpu"))


def test_cuda_leaves_amd_to_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in BACKENDS["cuda"].load().why_not(GPU)


@pytest.mark.parametrize("backend", BACKENDS)
def test_old_gpus_are_told(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if backend == "cuda" and (extension.missing() or not extension.native().cuda):
        pytest.skip("built without nvcc")
    assert "7.5" in BACKENDS[backend].why_not(GPU)


@pytest.mark.parametrize(("driver", "reason"), [(13020, None), (14000, None), (12080, "serves CUDA 12.8, is too old")])
def test_drivers_older_than_the_kernels_are_told(driver, reason, monkeypatch):
    native = SimpleNamespace(cuda=True, cuda_versions=lambda: (driver, 13000))
    monkeypatch.setattr(extension, "native", lambda: native)
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu._too_old_driver.cache_clear()
    told = BACKENDS["cuda"].load().why_not(GPU)
    gpu._too_old_driver.cache_clear()
    assert told is None if reason is None else reason in told


def test_the_runtime_of_the_kernels_tells_its_version():
    if extension.missing() or not extension.native().cuda:
        pytest.skip("built without nvcc")
    assert extension.native().cuda_versions()[1] >= 12080


@pytest.mark.parametrize("backend", BACKENDS)
class TestOnAGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def _needs_gpu(self, backend):
        reason = BACKENDS[backend].why_not(GPU)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")

    def outputs(self, count):
        return torch.empty(count, 1, dtype=torch.int32, device=GPU), *torch.full((3, count, 1), torch.nan, device=GPU)

    def test_graph_capture_on_a_side_stream(self, backend):
        filters, keys = noise(1000, 7, 7).to(GPU), noise(8, 7, 7, seed=1)
        prepared, outputs = _prepare(keys.to(GPU)), self.outputs(1000)
        kernel = BACKENDS[backend].load().affine_fit
        kernel(filters, prepared, False, *outputs)  # compiles and loads
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel(filters, prepared, False, *outputs)
        filters.copy_(noise(1000, 7, 7, seed=5))
        graph.replay()
        assert_agrees([x[:, 0].cpu() for x in outputs], filters.cpu(), keys)

    def test_the_current_stream_is_used(self, backend):
        filters, keys = torch.empty(100_000, 7, 7, device=GPU), noise(8, 7, 7, seed=1).to(GPU)
        late = noise(100_000, 7, 7).to(GPU)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            filters.copy_(late)
            result = affine_fit(filters, keys, backend=backend)
        torch.cuda.synchronize()
        expected = affine_fit(late, keys, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))

    def test_another_device_than_the_current(self, backend):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        filters, keys = noise(100, 7, 7), noise(8, 7, 7, seed=1)
        result = affine_fit(filters.to("cuda:1"), keys, backend=backend)
        assert_agrees([x.cpu() for x in result], filters, keys)

    def test_offsets_beyond_32_bits(self, backend):
        count = 2**31 // 49 + 100_000
        if torch.cuda.mem_get_info(GPU)[0] < count * 120:
            pytest.skip("needs 5 GB of GPU memory")
        keys = noise(8, 7, 7, seed=1)
        filters = torch.zeros(count, 7, 7, dtype=torch.bfloat16, device=GPU)
        last = noise(1000, 7, 7).bfloat16()
        filters[-1000:] = last.to(GPU)
        result = affine_fit(filters, keys, backend=backend)
        assert_agrees([x[-1000:].cpu() for x in result], last.double(), keys)
        assert not result.scale[:-1000].any()
