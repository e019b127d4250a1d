"""The key convolution against one copy of its activations and against free and frozen convolutions.

Every candidate is a layer that runs forward, or forward and backward with gradients of x and of what trains in it, in
both layouts. The baseline is the copy of x to the output: no layer can be faster, so 1 / ratio is the fraction of the
floor that it reaches.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mkf import keys as key_sets
from mkf.benchmarks.measure import Result, keep_memory, take_turns
from mkf.benchmarks.peers.key_conv2d import PEERS
from mkf.kernels import registry
from mkf.kernels.extension import DTYPES as _DTYPES
from mkf.keys import KeySet
from mkf.nn import KeyConv2d

COPY = "copy"
MKF = "mkf"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES if dtype != torch.float64}
Mode = Literal["forward", "backward"]

# (N, C, H = W): the depthwise layers of ConvNeXt-T at 224 x 224, one of them for a single image.
SHAPES = ((8, 96, 56), (8, 192, 28), (8, 384, 14), (8, 768, 7), (1, 96, 56))

# What the keys of a layer can be: which keys, whether shifts are other than zero, whether equal keys lie in blocks.
CASES: dict[str, tuple[Callable[[], KeySet], bool, bool]] = {
    "published": (key_sets.paper8, True, False),
    "analytic, random order": (lambda: key_sets.analytic("B"), True, False),
    "analytic, blocks": (lambda: key_sets.analytic("B"), True, True),
    "rank 1, blocks, no shift": (lambda: _rank_one(key_sets.analytic("B")), False, True),
}


def _rank_one(keys: KeySet) -> KeySet:
    """The analytic keys but the seventh, which is two terms and a tap."""
    return KeySet(torch.cat([keys.filters[:6], keys.filters[7:]]))


def layer(case: str, channels: int, backend: str | None = None) -> KeyConv2d:
    """The layer of a case, in which scale, shift and bias train; a shift that is zero does not."""
    if case not in CASES:
        raise ValueError(f"there is no case {case!r}; there are {', '.join(CASES)}")
    make_keys, shifted, blocks = CASES[case]
    keys = make_keys()
    generator = torch.Generator().manual_seed(0)
    made = KeyConv2d(
        channels,
        keys.kernel_size,
        keys,
        padding=keys.kernel_size // 2,
        order="blocks" if blocks else "random",
        generator=generator,
        train=("scale", "shift", "bias") if shifted else ("scale", "bias"),
        backend=backend,
    )
    with torch.no_grad():
        for parameter in (made.scale, made.shift, made.bias):
            if parameter is not None and (shifted or parameter is not made.shift):
                parameter.normal_(generator=generator)
    return made


def candidates(
    shape: tuple[int, int, int],
    case: str = "published",
    mode: Mode = "forward",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    names: Iterable[str] | None = None,
) -> dict[str, Callable[[], object]]:
    """The copy, ours and the peers in both layouts; `names` keeps those whose name starts with one of them.

    In other types than float32, ours in float32 takes turns with them.
    """
    batch, channels, size = shape
    x = torch.randn(batch, channels, size, size).to(device, dtype)
    ours = layer(case, channels).to(device)
    layers: dict[str, Callable[[Tensor], Tensor]] = {MKF: ours}
    for implementation in registry.implementations("key_conv2d")[1:]:
        if implementation.why_not(x.device) is None and implementation.name != "reference":
            layers[f"{MKF} {implementation.name}"] = layer(case, channels, implementation.name).to(device)
    weight, bias = ours.weight.detach().to(dtype), ours.bias.detach().to(dtype)  # type: ignore[union-attr]
    if dtype != torch.float32:
        layers[f"{MKF}, float32"] = layer(case, channels).to(device)

    copy = torch.empty_like(x)
    found: dict[str, Callable[[], object]] = {COPY: lambda: copy.copy_(x)}
    for name, candidate in layers.items():
        for layout, memory_format in LAYOUTS.items():
            own = x.float() if name.endswith("float32") else x
            found[f"{name}, {layout}"] = _step(candidate, own.contiguous(memory_format=memory_format), mode)
    for name, make in PEERS.items():
        for layout, memory_format in LAYOUTS.items():
            peer = make(weight.to(memory_format=memory_format), bias)
            found[f"{name}, {layout}"] = _step(peer, x.contiguous(memory_format=memory_format), mode)
    if names is not None:
        wanted = tuple(names)
        if not any(name.startswith(wanted) for name in found):
            raise ValueError(f"no candidate's name starts with {' or '.join(wanted)}; there are {', '.join(found)}")
        found = {name: run for name, run in found.items() if name == COPY or name.startswith(wanted)}
    return found


def _step(layer: Callable[[Tensor], Tensor], x: Tensor, mode: Mode) -> Callable[[], object]:
    """One call of a layer on x, forward or with the gradients."""
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return layer(x)

        return forward
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    dy = torch.randn_like(x)
    trained = [p for p in layer.parameters() if p.requires_grad] if isinstance(layer, nn.Module) else []

    def forward_and_backward() -> object:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    return forward_and_backward


def run(
    shape: tuple[int, int, int],
    case: str = "published",
    mode: Mode = "forward",
    dtype: str = "float32",
    rounds: int = 15,
    names: Iterable[str] | None = None,
    patience: float | None = None,
) -> Result:
    """Time all candidates on one problem, in turns, relative to the copy of x.

    The process keeps its memory: else the system's pages for an output cost more than many a layer, and whom they hit
    is chance.
    """
    keep_memory()
    what = {"operator": "key_conv2d", "shape": list(shape), "case": case, "mode": mode, "dtype": dtype}
    result = take_turns(candidates(shape, case, mode, DTYPES[dtype], names=names), COPY, what, rounds, 0.004, patience)
    if any(row.name.rpartition(", ")[0] == MKF for row in result.rows):
        for label, first_call in ((f"times as long as {MKF}", False), ("the same, the first call of a turn", True)):
            ratios = times_as_long([result], first_call)
            result.derived[label] = {name: ratio for name, (ratio,) in ratios.items()}
    return result


def fastest(result: Result, name: str) -> str:
    """The layout of a candidate, by its name without one, that took the least time."""
    rows = [row for row in result.rows if row.name in {f"{name}, {layout}" for layout in LAYOUTS}]
    return min(rows, key=lambda row: row.seconds).name


def times_as_long(results: Sequence[Result], first_call: bool = False) -> dict[str, list[float]]:
    """Time of each candidate but the copy / that of `MKF`, both in their fastest layouts, for each of the results.

    With `first_call` that of the first call of each turn, when the caches are full of what others left there.
    """
    names = [row.name.removesuffix(", NCHW") for row in results[0].rows if row.name.endswith(", NCHW")]
    return {name: [r.times_faster(fastest(r, MKF), fastest(r, name), first_call) for r in results] for name in names}
