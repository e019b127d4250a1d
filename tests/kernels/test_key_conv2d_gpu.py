"""The CUDA and Triton key convolutions: on a GPU if there is one, else their code on the CPU and in the compilers."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mkf.kernels import extension, gpu
from mkf.kernels.extension import DTYPES
from mkf.kernels.key_conv2d import device_plan, reference, triton
from mkf.kernels.key_conv2d.plan import plan_of
from mkf.kernels.registry import implementations
from mkf.keys import analytic
from mkf.nn import KeyConv2d
from tests.kernels.key_conv2d_cases import (
    BOX,
    DIRECT,
    EVERY,
    LAPLACIAN,
    OFF_CENTRE,
    ONE,
    TAPPED,
    THREE,
    TWO,
    ZERO,
    Case,
)
from tests.kernels.runs_here import ROOT, run_interpreted

GPU = torch.device("cuda", 0)
BACKENDS = {i.name: i for i in implementations("key_conv2d") if i.devices == ("cuda",)}
HALF_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = (80, 90, 100)
MOVE = r"mov\.f32 (%f\d+), (%f\d+);"  # in PTX
SHARED_MEMORY = 99 * 1024  # that a block can have where it is least, as on sm_86


class Problem(ctypes.Structure):
    """`mkf::KeyConv2dCuda`."""

    _fields_ = (
        ("backward", ctypes.c_bool),
        ("dtype", ctypes.c_int),
        ("channels_last", ctypes.c_bool),
        ("k", ctypes.c_int),
        ("stride", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("c", ctypes.c_int),
        ("h", ctypes.c_int),
        ("w", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("records", "keys", "index", "scale", "shift", "bias", "convolved")),
        *((name, ctypes.c_void_p) for name in ("out", "x", "d_scale", "d_shift", "d_bias", "partial_sums")),
    )


class OnTheHost:
    """csrc/key_conv2d/cuda_kernel.cuh compiled for the CPU, called as an implementation is."""

    def __init__(self, library, multiprocessors):
        self.library = ctypes.CDLL(str(library))
        self.library.key_conv2d_parts.restype = ctypes.c_int64
        self.multiprocessors = multiprocessors

    def problem(self, like, plan, index, scale, shift, stride, channels_last, **addresses):
        self.records = device_plan.records(plan)
        pointers = {"records": self.records, "keys": plan.keys, "index": index, "scale": scale, "shift": shift}
        pointers |= addresses
        sizes = dict(zip("nchw", like.shape, strict=True))
        return Problem(
            dtype=DTYPES[like.dtype],
            channels_last=channels_last,
            k=plan.keys.shape[-1],
            stride=stride[0],
            **sizes,
            **{name: None if t is None else t.data_ptr() for name, t in pointers.items()},
        )

    def key_conv2d(self, x, plan, index, scale, shift, bias, stride, padding, dilation, out):
        layout = not (x.is_contiguous() and out.is_contiguous())
        p = self.problem(x, plan, index, scale, shift, stride, layout, bias=bias, convolved=x, out=out)
        self.library.key_conv2d(ctypes.byref(p), self.multiprocessors)

    def key_conv2d_backward(
        self, dy, x, plan, index, scale, shift, stride, padding, dilation, dx, d_scale, d_shift, d_bias
    ):
        like = dx if x is None else x
        layout = not (like.is_contiguous() and dy.is_contiguous())
        factor = None if d_scale is None and d_shift is None else x
        p = self.problem(
            like, plan, index, scale, shift, stride, layout,
            convolved=dy, out=dx, x=factor, d_scale=d_scale, d_shift=d_shift, d_bias=d_bias,
        )  # fmt: skip
        p.backward = True
        if not (d_scale is None and d_shift is None and d_bias is None):
            parts = self.library.key_conv2d_parts(ctypes.byref(p), self.multiprocessors)
            self.sums = torch.full((parts, 3, len(index)), torch.nan)
            p.partial_sums = self.sums.data_ptr()
        self.library.key_conv2d(ctypes.byref(p), self.multiprocessors)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    library = tmp_path_factory.mktemp("cuda_on_the_host") / "key_conv2d.so"
    flags = ["-O1", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-I", ROOT / "csrc"]
    flags += [
        "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
    ]  # a GPU reads and writes aligned vectors only
    subprocess.run([compiler, *flags, Path(__file__).with_name("key_conv2d_cuda_host.cpp"), "-o", library], check=True)
    return library


@pytest.fixture(params=["cuda_on_the_host", *(name for name, i in BACKENDS.items() if i.why_not(GPU) is None)])
def kernel(request):
    """What has `key_conv2d` and `key_conv2d_backward`, and the device of its tensors."""
    if request.param in BACKENDS:
        module = BACKENDS[request.param].load()
        return module, GPU
    return OnTheHost(request.getfixturevalue("host_library"), multiprocessors=4), torch.device("cpu")


def check(kernel, *arguments, **options):
    module, device = kernel
    case = Case(*arguments, **options, device=device)
    case.check_forward(case.forward(module.key_conv2d))
    case.check_backward(case.backward(module.key_conv2d_backward))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_every_kernel(kernel, k, stride, channels_last, dtype):
    check(kernel, (2, 32, 11, 14), k, stride, dtype, channels_last, (ONE,), shifted=False)
    check(kernel, (1, 40, 15, 10), k, stride, dtype, channels_last, (LAPLACIAN, BOX, ZERO))
    check(kernel, (1, 7, 9, 17), k, stride, dtype, channels_last, EVERY)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", EVERY, ids=str)
@pytest.mark.parametrize("shifted", [True, False])
def test_every_form(kernel, kind, shifted, stride):
    check(kernel, (1, 5, 9, 10), 7, stride, torch.float32, True, (kind,), shifted=shifted, biased=shifted)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 2, 1, 5), (2, 33, 5, 1), (1, 3, 2, 200), (1, 8, 90, 3), (1, 31, 13, 65), (5, 64, 7, 7)],
    ids=str,
)
def test_awkward_shapes(kernel, shape, stride, channels_last):
    check(kernel, shape, 7, stride, torch.bfloat16, channels_last, (LAPLACIAN, ONE))
    check(kernel, shape, 7, stride, torch.float32, channels_last, (TWO, TAPPED))


@pytest.mark.parametrize("width", [28, 56, 88, 120])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 7, 9])
def test_rows_of_several_tiles(kernel, k, stride, width):
    for dtype in HALF_AND_FULL:
        check(kernel, (1, 3, 5, width), k, stride, dtype, False, (ONE, BOX))


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("start", [1, 2, 4, 8])
def test_tensors_that_start_anywhere(kernel, start, channels_last):
    """Copies are as long as the alignment allows."""
    module, device = kernel
    case = Case((2, 16, 8, 16), 7, 1, torch.bfloat16, channels_last, (ONE, BOX), device=device)
    for name in ("x", "dy"):
        t = getattr(case, name)
        storage = torch.full((start + t.numel() + 16,), torch.nan, dtype=t.dtype, device=device)
        moved = storage[start : start + t.numel()].as_strided(t.shape, t.stride())
        setattr(case, name, moved.copy_(t))
    case.check_forward(case.forward(module.key_conv2d))
    case.check_backward(case.backward(module.key_conv2d_backward))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=4) if any(w)], ids=str)
def test_only_some_gradients(kernel, wanted, stride):
    module, device = kernel
    case = Case((2, 5, 9, 10), 7, stride, torch.float32, True, (TWO, BOX), device=device)
    torch_alone = wanted == (False, False, False, True)
    if torch_alone and device.type == "cpu":
        pytest.skip("the Python side does this one alone")
    gradients = case.backward(module.key_conv2d_backward, wanted)
    case.check_backward(gradients)
    everything = case.backward(module.key_conv2d_backward)
    assert torch_alone or all(g is None or torch.equal(g, e) for g, e in zip(gradients, everything, strict=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", [ONE, LAPLACIAN, DIRECT], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_finite_stays_within_its_window(kernel, value, kind, stride):
    module, device = kernel
    case = Case((1, 3, 40, 41), 7, stride, torch.float32, True, (kind,), device=device)
    expected = case.forward(module.key_conv2d)
    case.x[0, 1, 19, 20] = value
    out = case.forward(module.key_conv2d)
    reached = torch.zeros(40, 41, dtype=torch.bool)
    reached[16:23, 17:24] = True
    reached = reached[::stride, ::stride].to(device)
    assert not out[0, 1][reached].isfinite().any()
    out[0, 1][reached] = expected[0, 1][reached]
    assert torch.equal(out, expected)


def test_the_number_of_multiprocessors_decides_nothing_but_the_sums_rounding(host_library):
    case = Case((1, 5, 70, 10), 7, 1, torch.float32, True, (LAPLACIAN, ONE))
    few, many = (OnTheHost(host_library, count) for count in (1, 132))
    assert torch.equal(case.forward(few.key_conv2d), case.forward(many.key_conv2d))
    (dx, *sums), (other_dx, *others) = (case.backward(each.key_conv2d_backward) for each in (few, many))
    assert torch.equal(dx, other_dx)
    assert few.sums.shape != many.sums.shape
    case.check_backward((None, *sums))
    case.check_backward((None, *others))


def test_blocks_fit_into_shared_memory(host_library):
    library = ctypes.CDLL(str(host_library))
    shapes = ((7, 7), (1, 97), (1, 200), (56, 56), (57, 130), (112, 112))
    for k, stride, dtype, last, backward in itertools.product((3, 5, 7, 9, 11), (1, 2), (0, 2), (True, False), (0, 1)):
        for h, w in shapes:
            p = Problem(dtype=dtype, channels_last=last, k=k, stride=stride, backward=backward, n=8, c=96, h=h, w=w)
            assert 0 < library.key_conv2d_shared_bytes(ctypes.byref(p)) <= SHARED_MEMORY, (k, stride, dtype, last, h, w)


def test_triton_in_its_interpreter():
    run_interpreted("key_conv2d_triton_interpreted.py")


def resource_usage(cubin):
    """What cuobjdump prints about each kernel of a file; Triton brings it along."""
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", [*(f"sm_{arch}" for arch in ARCHITECTURES), "gfx942"])
def test_triton_compiles_without_spills(target, capsys, tmp_path, monkeypatch):
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mkf.kernels.key_conv2d.triton_kernel import key_conv2d

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    nvidia = target.startswith("sm_")
    machine = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    types = dict.fromkeys(("x", "factor", "out"), "*bf16") | {"index": "*i32", "channels": "i32"}
    types |= dict.fromkeys(("in_h", "in_w", "out_h", "out_w"), "i32")
    types |= {f"{of}_{axis}": "i64" for of in ("in", "out") for axis in "ncyx"}
    for backward in (False, True):
        constants = triton.constants(7, 1, backward, not backward, True, backward, backward, triton.TILES[True])
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in key_conv2d.arg_names}
        source = ASTSource(key_conv2d, signature, constexprs=constants)
        compiled = compiler.compile(source, target=machine, options={"num_warps": triton.WARPS})
        if nvidia:
            file = tmp_path / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            usage = resource_usage(file)
            registers, spilled = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        else:
            text = compiled.asm["amdgcn"]
            registers, spilled = (
                int(re.search(rf"\.{what}:\s+(\d+)", text)[1]) for what in ("vgpr_count", "vgpr_spill_count")
            )
        with capsys.disabled():
            name = "backward" if backward else "forward"
            print(f"\ntriton key_conv2d {name} 7x7 for {target}: {registers} registers, {spilled} spilled", end="")
        assert spilled == 0


@pytest.fixture(scope="session")
def cuda_code(tmp_path_factory):
    """A file of machine code: the extension if it has the CUDA kernels, else those for 7x7, compiled here."""
    if extension.missing() is None and extension.native().cuda:
        return extension.native().__file__
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    code = tmp_path_factory.mktemp("cuda") / "seven.o"
    targets = itertools.chain(*(("-gencode", f"arch=compute_{arch},code=sm_{arch}") for arch in ARCHITECTURES))
    flags = ["-O3", "-std=c++17", "--threads", "0", "-I", ROOT / "csrc", *targets]
    subprocess.run([nvcc, *flags, "-c", Path(__file__).with_name("key_conv2d_cuda_seven.cu"), "-o", code], check=True)
    return code


def test_cuda_compiles_without_spills(cuda_code, capsys):
    usage = resource_usage(cuda_code)
    found = []
    for block in re.split(r"Fatbin elf code:", usage)[1:]:
        arch = re.search(r"arch = sm_(\d+)", block)[1]
        pattern = r"Function (\S*key_conv2d\w*kernel\S*):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
        for name, registers, stack, local in re.findall(pattern, block):
            shape = re.search(r"ShapeILi(\d+)ELi(\d+)ELi(\d+)ELb([01])", name)
            found.append((int(arch), shape and (*map(int, shape.groups()[:3]), "fb"[int(shape[4])])))
            if arch == "90":
                with capsys.disabled():
                    k, down, up, way = found[-1][1] or (0, 1, 1, "sums of parts")
                    way = {"f": "forward", "b": "backward"}.get(way, way)
                    print(f"\nkey_conv2d {way} {k}x{k}, stride {down * up}, sm_{arch}: {registers} registers", end="")
            assert (stack, local) == ("0", "0"), (name, arch)
            assert int(registers) <= (128 if shape is None or int(shape[1]) <= 7 else 255)
    for arch in ARCHITECTURES:
        sevens = {shape for of, shape in found if of == arch and shape and shape[0] == 7}
        assert sevens == {(7, 1, 1, "f"), (7, 2, 1, "f"), (7, 1, 1, "b"), (7, 1, 2, "b")}


def test_a_slot_is_taken_as_meant(tmp_path):
    """The one piece of the CUDA code that no test on the host runs, Thread::take(), as the compiler wrote it down."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    source, text = Path(__file__).with_name("key_conv2d_cuda_seven.cu"), tmp_path / "seven.ptx"
    target = ["-gencode", "arch=compute_90,code=compute_90"]
    subprocess.run([nvcc, "-O3", "-std=c++17", "-I", ROOT / "csrc", *target, "-ptx", source, "-o", text], check=True)
    jumps = re.findall(
        r"slots: \.branchtargets (.*?);\s+brx\.idx\.uni (%r\d+), slots;(.*?)taken:", text.read_text(), re.S
    )
    assert len(jumps) > 16
    for targets, _, code in jumps:
        assert targets == ", ".join(f"s{j}" for j in range(7))
        cases = re.findall(r"s(\d):(.*?)bra\.uni taken", code, re.S)
        assert [int(j) for j, _ in cases] == list(range(7))
        taken, begin, slots = set(), set(), []
        for _, case in cases:
            moves = re.findall(MOVE, case)
            assert len(moves) == 16
            assert [source for _, source in moves[::2]] == [to for to, _ in moves[1::2]]
            taken.add(tuple(to for to, _ in moves[::2]))
            begin.add(tuple(source for _, source in moves[1::2]))
            slots += [source for _, source in moves[::2]]
        (taken,), (begin,) = taken, begin
        assert begin == begin[:2] * 4
        assert len({*taken, *slots}) == 8 + 56
        assert not {*begin} & {*taken}
        # What a slot begins with may share a register with one of the slots that pad to seven, if that stays as it is.
        moved = [to == source for _, case in cases for to, source in re.findall(MOVE, case)[1::2] if to in begin]
        assert all(moved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reasons_are_given(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA" in BACKENDS[backend].why_not(GPU)
    assert "not for cpu" in BACKENDS[backend].why_not(torch.device("cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_that_are_not_served(backend):
    case = Case((1, 2, 9, 9), 7, 1, torch.float32, True)
    why_not_call = BACKENDS[backend].load().why_not_call
    assert why_not_call(case.x, case.plan, (1, 1), (3, 3), (1, 1)) is None
    assert why_not_call(case.x, case.plan, (2, 2), (3, 3), (1, 1)) is None
    assert "float64" in why_not_call(case.x.double(), case.plan, (1, 1), (3, 3), (1, 1))
    assert "stride" in why_not_call(case.x, case.plan, (1, 2), (3, 3), (1, 1))
    assert "padding" in why_not_call(case.x, case.plan, (1, 1), (0, 0), (1, 1))
    assert "dilation" in why_not_call(case.x, case.plan, (1, 1), (3, 3), (2, 2))


def test_records_say_what_a_block_can_run():
    kinds = (ONE, TWO, THREE, OFF_CENTRE, LAPLACIAN, DIRECT, ZERO)
    plan = Case((1, 2, 9, 9), 7, 1, torch.float32, True, kinds).plan
    form, box, tap = device_plan.records(plan)[:, :3].T
    assert form.tolist() == [0, 1, 2, 2, 1, 2, 0]
    assert (box != 0).tolist() == [False, False, False, False, True, False, False]
    assert (tap != 0).tolist() == [False, False, False, False, True, False, False]


def test_records_of_keys_that_train_are_made_once(monkeypatch):
    monkeypatch.setattr(device_plan, "_records", {})
    index = torch.zeros(4, dtype=torch.int32)
    for seed in range(3):
        keys = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(seed))
        records, own = device_plan.on_device(plan_of(keys, None), index)
        assert torch.equal(records, device_plan.records(plan_of(keys, None)))
        assert torch.equal(own, keys)
    assert len(device_plan._records) == 1
    other, _ = device_plan.on_device(plan_of(keys, 0.0), index)
    assert torch.equal(other, device_plan.records(plan_of(keys, 0.0)))
    assert len(device_plan._records) == 2


def test_what_a_graph_reads_stays(monkeypatch):
    monkeypatch.setattr(gpu, "_captured", [])
    case = Case((1, 2, 9, 9), 7, 1, torch.float32, True)
    device_plan.on_device(case.plan, case.index)
    assert not gpu._captured
    monkeypatch.setattr(gpu, "is_capturing", lambda tensor: True)
    read = (case.index, *device_plan.on_device(case.plan, case.index))
    assert all(kept is tensor for kept, tensor in zip(gpu._captured[0], read, strict=True))
    case.forward(reference.key_conv2d)
    case.backward(reference.key_conv2d_backward)
    assert [[id(t) for t in kept] for kept in gpu._captured[1:]] == [[id(case.index), id(case.plan.keys)]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
class TestOnAGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def _needs_gpu(self, backend):
        reason = BACKENDS[backend].why_not(GPU)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")

    def case(self, shape=(4, 96, 28, 28), **options):
        return Case(shape, 7, 1, torch.bfloat16, True, (LAPLACIAN, ONE), device=GPU, **options)

    def test_results_repeat_bit_for_bit(self, backend):
        module, case = BACKENDS[backend].load(), self.case()
        first = case.forward(module.key_conv2d), *case.backward(module.key_conv2d_backward)
        for _ in range(20):
            again = case.forward(module.key_conv2d), *case.backward(module.key_conv2d_backward)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_graph_capture(self, backend):
        module, case = BACKENDS[backend].load(), self.case()
        case.forward(module.key_conv2d), case.backward(module.key_conv2d_backward)  # compiles, loads, copies the plan
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.forward(module.key_conv2d)
            gradients = case.backward(module.key_conv2d_backward)
        case.x.normal_()
        case.dy.normal_()
        graph.replay()
        case.check_forward(out)
        case.check_backward(gradients)

    def test_a_graph_outlives_the_call_that_it_recorded(self, backend):
        layer = KeyConv2d(32, 7, analytic("B"), padding=3, backend=backend).to(GPU)
        x = torch.randn(2, 32, 14, 14, device=GPU)
        with torch.no_grad():
            expected = layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer(x)
            layer.index.copy_(layer.index.flip(0))
            layer(x)  # takes the place of the call that was recorded
            others = [torch.full((32,), 10**6, dtype=torch.int32, device=GPU) for _ in range(100)]  # where it lay
            graph.replay()
        torch.testing.assert_close(out, expected)
        del others

    def test_the_current_stream_is_used(self, backend):
        module, case = BACKENDS[backend].load(), self.case()
        late = case.x.clone()
        case.x.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            case.x.copy_(late)
            out = case.forward(module.key_conv2d)
        torch.cuda.synchronize()
        case.check_forward(out)

    def test_another_device_than_the_current(self, backend):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        module = BACKENDS[backend].load()
        case = Case((2, 32, 14, 14), 7, 1, torch.float32, True, (BOX,), device="cuda:1")
        case.check_forward(case.forward(module.key_conv2d))
        case.check_backward(case.backward(module.key_conv2d_backward))

    @pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
    def test_offsets_beyond_32_bits(self, backend, channels_last):
        """More than 2^31 elements; the last image must come out as it does alone."""
        shape = (2**31 // (128 * 128 * 64) + 8, 64, 128, 128)
        if torch.cuda.mem_get_info(GPU)[0] < 5 * 2 * 2**31:
            pytest.skip("needs 20 GB of GPU memory")
        module, alone = BACKENDS[backend].load(), self.case((1, *shape[1:]), seed=1)
        if not channels_last:
            alone = Case((1, *shape[1:]), 7, 1, torch.bfloat16, False, (LAPLACIAN, ONE), seed=1, device=GPU)
        layout = alone.layout
        many = alone.__class__.__new__(alone.__class__)
        many.__dict__ |= alone.__dict__
        for name in ("x", "dy"):
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=GPU, memory_format=layout).zero_()
            tensor[-1] = getattr(alone, name)[0]
            setattr(many, name, tensor)
        out = many.forward(module.key_conv2d)
        alone.check_forward(out[-1:])
        bias = many.bias.bfloat16()[:, None, None]
        assert torch.equal(out[0], bias.expand_as(out[0]))
        del out
        dx, *sums = many.backward(module.key_conv2d_backward)
        alone.check_backward([dx[-1:], *sums])
        assert not dx[:-1].any()
