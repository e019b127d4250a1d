"""The key convolution's GPU kernels against a copy of memory and PyTorch's own: `python -m benchmarks.key_conv2d_gpu`.

Times are CUDA events around many calls on inputs that take turns, so that none finds its input in the cache.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import cycle
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


def plan(terms: tuple[int, ...], tap: bool) -> KeyPlan:
    """Keys of noise with the given separable terms; their values do not matter here."""
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
    return KeyPlan(keys, rank == 0, rank, columns, rows, zero, taps, centre, centre, zero.double())


def seconds(run: Callable[[Tensor], object], inputs: list[Tensor], calls: int = 50) -> float:
    """Median time of a call over ten runs of `calls`."""
    turns = cycle(inputs)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run(next(turns))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls / 1000)
    return float(sorted(times[2:])[5])


def candidates(
    form: str, shape: tuple[int, ...], backward: bool, dtype: torch.dtype
) -> dict[str, Callable[[Tensor], object]]:
    """Functions of x (of dy, if `backward`) that make the output (all gradients)."""
    generator = torch.Generator("cuda").manual_seed(0)
    terms, tap, shifted, blocks = FORMS[form]
    made, channels = plan(terms, tap), shape[1]
    order = torch.arange(channels, device="cuda") // 32 % 8
    index = (order if blocks else order[torch.randperm(channels, device="cuda", generator=generator)]).int()
    scale, shift, bias = torch.randn(3, channels, device="cuda", generator=generator)
    shift *= shifted
    x = torch.randn(shape, device="cuda", generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    options = (1, 1), (K // 2, K // 2), (1, 1)
    found: dict[str, Callable[[Tensor], object]] = {COPY: out.copy_}
    gradients = torch.empty_like(x), *torch.empty(3, channels, device="cuda")
    for implementation in implementations("key_conv2d"):
        if implementation.devices == ("cuda",) and implementation.why_not(x.device) is None:
            module, own = implementation.load(), (made, index, scale, shift)
            found[f"mkf {implementation.name}"] = (
                partial(_call, module.key_conv2d_backward, (x, *own, *options, *gradients))
                if backward
                else partial(_call, module.key_conv2d, (*own, bias, *options, out))
            )
    weight = (scale[:, None, None] * made.keys.cuda()[index] + shift[:, None, None])[:, None].to(dtype)
    for name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        w = weight.contiguous(memory_format=layout)
        if backward:
            ready = x.contiguous(memory_format=layout)
            found[f"torch {name}, weight frozen"] = partial(_gradients, ready, w, layout)
        else:
            found[f"torch {name}"] = partial(_forward, w, bias.to(dtype), layout)
    return found


def _call(function: Callable[..., object], arguments: tuple[object, ...], x: Tensor) -> object:
    return function(x, *arguments)


def _forward(w: Tensor, bias: Tensor, layout: torch.memory_format, x: Tensor) -> Tensor:
    assert x.is_contiguous(memory_format=layout)
    return F.conv2d(x, w, bias, padding=K // 2, groups=len(w))


def _gradients(x: Tensor, w: Tensor, layout: torch.memory_format, dy: Tensor) -> object:
    assert dy.is_contiguous(memory_format=layout)
    wanted = (True, False, True)
    gradients: object = torch.ops.aten.convolution_backward(
        dy, x, w, [len(w)], (1, 1), (K // 2,) * 2, (1, 1), False, (0, 0), len(w), wanted
    )
    return gradients


def run(form: str, shape: tuple[int, ...], backward: bool, dtype: torch.dtype = torch.bfloat16) -> Result:
    """Time all candidates on one problem; ratios are to the copy of x."""
    found = candidates(form, shape, backward, dtype)
    last = [
        torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in "1234"
    ]
    first = [x.contiguous() for x in last]
    times = {name: seconds(call, first if "NCHW" in name else last) for name, call in found.items()}
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
                print("backward" if backward else "forward", form, shape)
                for row in result.rows:
                    moved = (3 if backward else 2) * torch.Size(shape).numel() * 2
                    share = result.row(COPY).seconds / row.seconds * (moved / (2 * torch.Size(shape).numel() * 2))
                    print(f"    {row.name:32} {row.seconds * 1e6:8.1f} us  {share:6.1%} of the copy's bandwidth")
    write(results, arguments.out)


if __name__ == "__main__":
    main()
