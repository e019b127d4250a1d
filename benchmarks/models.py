"""Whole networks: what their depthwise layers cost, and how much of that keys take away.

No depthwise layer can make a network faster than the same network without any, so that is timed in the same turns:

    share removed = (time of a peer - time with keys) / (time of that peer - time without depthwise layers).

What follows the depthwise layers and is computed along with them (`mkf.nn.fuse_norms`) saves time that was not theirs:
the share without that is told too. Both differences are small beside a step, and equal networks differ by as much, for
where their memory happens to lie. So all variants share the parameters, gradients, buffers and optimizer of what is not
a depthwise layer, the process keeps its memory (`measure.keep_memory`), each difference is the median over the turns,
more rounds help, and the share comes with its spread.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mkf.bank.hub import create
from mkf.benchmarks.key_conv2d import LAYOUTS, fastest
from mkf.benchmarks.measure import Result, keep_memory, take_turns
from mkf.keys import KeySet
from mkf.nn import conversion_report, convert, part_norms

Mode = Literal["inference", "training"]
MKF = "mkf"
APART = "mkf, norms apart"  # its depthwise layers alone, where `convert` fuses them with what follows
NONE = "without depthwise layers"
FROZEN = "nn.Conv2d, weights frozen"
BIAS_ADDED = "F.conv2d + bias, weights frozen"
FREE = "nn.Conv2d"
VARIANTS = MKF, APART, FROZEN, BIAS_ADDED, NONE, FREE

SHARES = {MKF: "share removed", APART: "share removed, norms apart"}

TRAIN = ("shift", "bias")  # as in the paper's text; its answers to reviewers have the bias alone, as the frozen peers

_SAMPLES = 2000

WARM_UP = 2  # rounds after which all the memory that is needed is there


class BiasAdded(nn.Module):
    """A frozen depthwise convolution without its bias, which is added if there is one: the skilled formulation."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, then the bias."""
        conv = self.conv
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y if self.bias is None else y.add_(self.bias)


class Subsample(nn.Module):
    """What is left of a depthwise layer without its filters: its stride."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride

    def forward(self, x: Tensor) -> Tensor:
        """Every `stride`-th row and column."""
        return x if self.stride == (1, 1) else x[..., :: self.stride[0], :: self.stride[1]]


def variants(
    model: nn.Module, keys: KeySet, order: str = "blocks", train: Iterable[str] = TRAIN
) -> dict[str, nn.Module]:
    """A network with keys, of which `train` trains, and beside it the same with its peers, all with keys' filters.

    What is not a depthwise layer has the parameters and buffers of `model`, not copies.
    """
    with_keys = convert(_sharing(model), keys, assign="uniform", order=order, train=train)  # type: ignore[arg-type]
    frozen, added, none = (_sharing(model) for _ in range(3))
    for name, layer in list(with_keys.named_modules()):
        if hasattr(layer, "to_conv2d"):
            for peer, make in ((frozen, nn.Identity), (added, BiasAdded), (none, Subsample)):
                conv = layer.to_conv2d()
                conv.weight.requires_grad_(False)
                peer.set_submodule(name, conv if peer is frozen else make(conv))
    own = {MKF: with_keys}
    if any(layer.norm_fused for layer in conversion_report(with_keys).layers):
        own[APART] = _sharing(with_keys)
        part_norms(own[APART])
    return {**own, FROZEN: frozen, BIAS_ADDED: added, NONE: none, FREE: model}


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules, but not of their parameters and buffers."""
    return deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def run(
    name: str,
    keys: KeySet,
    mode: Mode = "training",
    batch: int = 8,
    size: int = 224,
    order: str = "blocks",
    rounds: int = 5,
    names: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    train: Iterable[str] = TRAIN,
    patience: float | None = None,
) -> Result:
    """Time a step of a timm model in all its variants and both layouts, in turns, relative to `NONE`.

    A step is one pass without gradients, or forward, cross-entropy, backward and AdamW, fused, so that what is not of
    interest takes the least. `names` keeps those whose name starts with one of them, such as "mkf" or "nn.Conv2d,
    weights frozen, channels-last", and the baseline. `train` is of the layers with keys.

    Raises:
        ValueError: No name starts so, or the model takes no images of this size.
    """
    train = tuple(train)
    torch.manual_seed(0)
    model = create(name, pretrained=False).model.to(dtype)
    images, labels = torch.randn(batch, 3, size, size, dtype=dtype), torch.randint(0, 10, (batch,))
    try:
        with torch.inference_mode():
            model.eval()(images[:1])
    except (RuntimeError, AssertionError) as error:  # torch's and timm's ways to refuse an image, as a small one
        raise ValueError(f"{name} takes no images of {size}x{size}: {error}") from error
    baseline = f"{NONE}, channels-last"
    wanted = None if names is None else (baseline, *names)
    found: dict[str, Callable[[], object]] = {}
    for layout, memory_format in LAYOUTS.items():
        made = variants(deepcopy(model).to(memory_format=memory_format), keys, order, train)
        networks = {f"{variant}, {layout}": network for variant, network in made.items()}
        if wanted is not None:
            networks = {name: network for name, network in networks.items() if name.startswith(wanted)}
        for network in networks.values():
            network.to(memory_format=memory_format)
        found |= _steps(networks, images.contiguous(memory_format=memory_format), labels, mode)
    if wanted is not None and not any(candidate.startswith(wanted[1:]) for candidate in found):
        raise ValueError(f"no variant's name starts with {' or '.join(wanted[1:])}; there are {', '.join(VARIANTS)}")
    found = dict(sorted(found.items(), key=lambda item: VARIANTS.index(item[0].rpartition(", ")[0])))
    keep_memory()
    for _ in range(WARM_UP):
        for step in found.values():
            step()
    what: dict[str, Any] = {"model": name, "mode": mode, "batch": batch, "size": size, "order": order}
    what |= {"train": list(train)} if mode == "training" else {}
    what |= {"keys": list(keys.names), "dtype": str(dtype).removeprefix("torch.")}
    result = take_turns(found, baseline, what, rounds, patience=patience)
    measured = {row.name.rpartition(", ")[0] for row in result.rows}
    for own, label in SHARES.items():
        if own in measured:
            peers = [peer for peer in (FROZEN, BIAS_ADDED, FREE) if peer in measured]
            result.derived[label] = {peer: share_removed(result, peer, own) for peer in peers}
    return result


class Share(NamedTuple):
    """A share of time, and the 10th and 90th percentile of what other samples of as many turns would have shown."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


def share_removed(result: Result, peer: str, name: str = MKF) -> Share:
    """Part of the peer's depthwise time that is gone, each in its fastest layout: a ratio of medians over turns.

    Its spread is that of turns drawn with replacement (the bootstrap), always the same ones.
    """
    turns = [result.row(fastest(result, variant)).turns for variant in (peer, name, NONE)]
    peers, own, none = torch.tensor(turns, dtype=torch.float64)
    gone, cost = peers - own, peers - none
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(peers), (_SAMPLES, len(peers)), generator=generator)
    shares = gone[drawn].quantile(0.5, 1) / cost[drawn].quantile(0.5, 1)
    low, high = shares.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return Share((gone.quantile(0.5) / cost.quantile(0.5)).item(), low, high)


def times_as_long(result: Result) -> dict[str, float]:
    """Time of each variant in its fastest layout / that of `NONE` in its own, median over turns."""
    made = dict.fromkeys(row.name.rpartition(", ")[0] for row in result.rows)
    none = fastest(result, NONE)
    return {variant: result.times_faster(none, fastest(result, variant)) for variant in made}


def _steps(
    networks: dict[str, nn.Module], images: Tensor, labels: Tensor, mode: Mode
) -> dict[str, Callable[[], object]]:
    """A step of each of some networks that share parameters."""
    if not networks:
        return {}
    for network in networks.values():
        network.train(mode == "training")
    if mode == "inference":

        def infer(network: nn.Module) -> object:
            with torch.inference_mode():
                return network(images)

        return {name: partial(infer, network) for name, network in networks.items()}
    trained = dict.fromkeys(p for network in networks.values() for p in network.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # passes over what a network does not have

    def step(network: nn.Module) -> object:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    return {name: partial(step, network) for name, network in networks.items()}
