"""The key convolution's GPU kernels against a copy and PyTorch's own: `python -m mkf.benchmarks.key_conv2d_gpu`.

Times are CUDA events around CUDA graphs, as a small layer takes less than its launch from Python. A graph holds a call
for each of so many inputs and outputs that none is still in the cache when its turn comes again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mkf.benchmarks.measure import Result, Row, write
from mkf.kernels.key_conv2d import KeyPlan
from mkf.kernels.registry import implementations

SHAPES = ((64, 96, 56, 56), (64, 192, 28, 28), (64, 384, 14, 14), (64, 768, 7, 7))  # of ConvNeXt-T
COPY = "copy"
K = 7

# Separable terms of each of eight keys (0 for direct taps), whether the seventh has a tap, whether there are shifts,
# and whether the keys come in blocks of 32 channels or at random.
FORMS = {
    "rank 1, no shift": ((1,) * 8, False, False, True),
    "rank 1, shift": ((1,) * 8, False, True, True),
    "analytic, shift, blocks": ((1, 1, 1, 1, 1, 1, 2, 1), True, True, True),
    "analytic, shift, random order": ((1, 1, 1, 1, 1, 1, 2, 1), True, True, False),
    "direct taps": ((0,) * 8, False, True, True),
}


LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}

Candidate = Callable[[Tensor, Tensor, Tensor], object]
"""Of x, another x and out forward, of dy, x and dx backward; torch's return outputs of their own."""


def plan(terms: tuple[int, ...], tap: bool, device: torch.device) -> KeyPlan:
    """Keys of noise with the given separable terms, which lie on the device; their values do not matter here."""
    count = len(terms)
    columns, rows = torch.randn(2, count, 2, K)
    rank = torch.tensor(terms, dtype=torch.int32)
    present = torch.arange(2) < rank[:, None]
    columns *= present[..., None]
    taps = torch.zeros(count)
    if tap:
        taps[6] = 1
    keys = torch.einsum("ntr,ntc->nrc", columns, rows)
    keys[:, K // 2, K // 2] += taps
    keys[rank == 0] = torch.randn(K, K)
    centre = torch.full((count,), K // 2, dtype=torch.int32)
    zero = torch.zeros(count)
    return KeyPlan(keys.to(device), rank == 0, rank, columns, rows, zero, taps, centre, centre, zero.double())


def candidates(
    form: str, shape: tuple[int, ...], backward: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Candidate]:
    """What is compared: a copy, mkf's implementations for the device, PyTorch's layouts with and without cuDNN."""
    generator = torch.Generator(device).manual_seed(0)
    terms, tap, shifted, blocks = FORMS[form]
    made, channels = plan(terms, tap, device), shape[1]
    order = torch.arange(channels, device=device) // 32 % 8
    index = (order if blocks else order[torch.randperm(channels, device=device, generator=generator)]).int()
    scale, shift, bias = torch.randn(3, channels, device=device, generator=generator)
    shift *= shifted
    sums = tuple(torch.empty(3, channels, device=device))
    options = (1, 1), (K // 2, K // 2), (1, 1)
    found: dict[str, Candidate] = {COPY: lambda x, _, out: out.copy_(x)}
    for implementation in implementations("key_conv2d"):
        if device.type in implementation.devices and implementation.why_not(device) is None:
            module, own = implementation.load(), (made, index, scale, shift)
            found[f"mkf {implementation.name}"] = (
                partial(_gradients, module.key_conv2d_backward, (*own, *options), sums)
                if backward
                else partial(_output, module.key_conv2d, (*own, bias, *options))
            )
    weight = (scale[:, None, None] * made.keys[index] + shift[:, None, None])[:, None].to(dtype)
    for name, layout in LAYOUTS.items():
        for suffix, cudnn in (("", True), (", without cuDNN", False)):
            w = weight.contiguous(memory_format=layout)
            found[f"torch {name}{suffix}"] = (
                partial(_gradients_of_torch, w, cudnn)
                if backward
                else partial(_output_of_torch, w, bias.to(dtype), cudnn)
            )
    return found


def _output(function: Callable[..., None], arguments: tuple[object, ...], x: Tensor, _: Tensor, out: Tensor) -> Tensor:
    function(x, *arguments, out)
    return out


def _gradients(
    function: Callable[..., None],
    arguments: tuple[object, ...],
    sums: tuple[Tensor, ...],
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
) -> Tensor:
    function(dy, x, *arguments, dx, *sums)
    return dx


def _output_of_torch(w: Tensor, bias: Tensor, cudnn: bool, x: Tensor, *_: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=cudnn, benchmark=True):
        return F.conv2d(x, w, bias, padding=K // 2, groups=len(w))


def _gradients_of_torch(w: Tensor, cudnn: bool, dy: Tensor, x: Tensor, _: Tensor) -> Tensor:
    """The weight is frozen."""
    with torch.backends.cudnn.flags(enabled=cudnn, benchmark=True):
        dx: Tensor = torch.ops.aten.convolution_backward(
            dy, x, w, [len(w)], (1, 1), (K // 2,) * 2, (1, 1), False, (0, 0), len(w), (True, False, True)
        )[0]
    return dx


def turns(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: torch.device, cache: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What candidates are called with, four times as much as a cache of so many bytes holds."""
    count = max(4, ceil(4 * cache / (torch.Size(shape).numel() * dtype.itemsize)))
    inputs = [torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(count)]
    return [(x, inputs[(i + count // 2) % count], torch.empty_like(x)) for i, x in enumerate(inputs)]


def seconds(run: Candidate, tensors: list[tuple[Tensor, Tensor, Tensor]], calls: int = 100) -> float:
    """Median time of a call over ten runs of so many, by a graph of one call for each turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, loads and chooses
        for turn in tensors[:3]:
            run(*turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [run(*turn) for turn in tensors]  # and kept, so that no output takes another's place
    replays = max(1, calls // len(tensors))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (replays * len(made)) / 1000)
    return float(sorted(times[2:])[5])


def check(found: dict[str, Candidate], tensors: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """See that implementations compute what PyTorch does.

    Raises:
        RuntimeError: One does not, by more than its dtype's rounding.
    """
    expected = found["torch channels-last"](*tensors[0])
    assert isinstance(expected, Tensor)
    for name, run in found.items():
        if name.startswith("mkf"):
            got = run(*tensors[0])
            assert isinstance(got, Tensor)
            error = (got - expected).float().norm() / expected.float().norm()
            if not error < 4 * torch.finfo(expected.dtype).eps:
                raise RuntimeError(f"{name} is off by {error:.1e}, relative to PyTorch's")


def run(form: str, shape: tuple[int, ...], backward: bool, dtype: torch.dtype = torch.bfloat16) -> Result:
    """Time all candidates on one problem; ratios are to the copy of x."""
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    found = candidates(form, shape, backward, dtype, device)
    tensors = {name: turns(shape, layout, dtype, device, cache) for name, layout in LAYOUTS.items()}
    check(found, tensors["channels-last"])
    times = {
        name: seconds(call, tensors["NCHW" if "NCHW" in name else "channels-last"]) for name, call in found.items()
    }
    rows = [Row(name, own, own / times[COPY], own / times[COPY], own / times[COPY]) for name, own in times.items()]
    what = {"operator": "key_conv2d", "form": form, "shape": shape, "backward": backward, "dtype": str(dtype)}
    return Result(what, COPY, rows)


def main() -> None:
    """Every form on every shape, printed and written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/key_conv2d_gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    results = []
    for backward in (False, True):
        for form in FORMS:
            for shape in SHAPES:
                result = run(form, shape, backward)
                results.append(result)
                write(results, arguments.out)  # each time, so that what ends early loses nothing
                print("backward" if backward else "forward", form, shape)
                for row in result.rows:
                    moved = 3 if backward and row.name.startswith("mkf") else 2  # of the size of x; a copy moves two
                    share = moved / 2 * result.row(COPY).seconds / row.seconds
                    print(f"    {row.name:36} {row.seconds * 1e6:8.1f} us  {share:6.1%} of the copy's bandwidth")


if __name__ == "__main__":
    main()
