"""Candidates for keys by the paper's autoencoder: every filter becomes one number, and numbers become filters."""

import copy
import io
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mkf._files import replacing
from mkf.keys import KeySet
from mkf.search.clusters import check_count
from mkf.search.objectives import fingerprint
from mkf.search.sample import draw, positive, unit

WIDTHS = (256, 128, 64, 32)
SLOPE = 0.01
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
WARM_UP = 0.1
HELD_OUT = 0.1
ROUND = 100
"""Steps between two looks at the held-out filters, after each of which the state is written."""

BINS = 50
"""Of the histogram over the code axis."""

NEIGHBOURS = 4
"""Of each key on the code axis, that the second round looks at."""

SPACING = 0.004
"""Between neighbours on the code axis."""

SAMPLE = 1 << 20
FORMAT = "mkf.autoencoder"
VERSION = 1

_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of what is made here, whatever torch's defaults are: a seed must give the same network."""


class Round(NamedTuple):
    """A point of the loss curve.

    Attributes:
        step: Steps done.
        train: Mean of 1 - |cos| over the batches since the last point.
        held_out: The same of the held-out filters.
        unevenness: Of the held-out filters' codes, 0 to 4; `autoencoder` tells what it is.
    """

    step: int
    train: float
    held_out: float
    unevenness: float


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A trained autoencoder with a one-dimensional code in [0, 1].

    Attributes:
        history: The loss curve.
        best: The point of it whose network this is.
        histogram: (50,) int64, filters by their code, in bins of equal width over [0, 1].
        filters: Filters it was trained on, including those held out to stop early.
        provenance: How it was trained, in words.
    """

    history: tuple[Round, ...]
    best: Round
    histogram: np.ndarray[Any, np.dtype[np.int64]]
    filters: int
    provenance: str
    _network: "_Network" = field(repr=False)

    @property
    def occupancy(self) -> float:
        """How evenly the code axis is used, from 0 to 1: the entropy of `histogram` relative to that of a level one."""
        shares = self.histogram[self.histogram > 0] / self.histogram.sum()
        return float(-(shares * np.log(shares)).sum() / math.log(len(self.histogram)))

    @property
    def kernel_size(self) -> int:
        """The k of k x k."""
        return self._network.kernel_size

    @torch.no_grad()
    def encode(self, filters: Any) -> Tensor:
        """The codes of filters (N, k, k), (N,) float32 in [0, 1]; NaN for dead filters and those that are not finite.

        A filter and its negative, and all linear shifts of a filter, have the same code.

        Raises:
            ValueError: Filters of another size.
        """
        units = unit(filters)
        if units.filters.shape[-1] != self.kernel_size:
            own, k = units.filters.shape[-1], self.kernel_size
            raise ValueError(f"filters are {own}x{own}, but the autoencoder was trained on {k}x{k}")
        codes = torch.full(units.live.shape, torch.nan, **_PLAIN)
        codes[units.live.cpu()] = self._network.encode(units.filters.to(self._network.device)).cpu()
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The filters of codes (n,): (n, k, k) float32, centred, of norm 1, their largest tap positive."""
        decoded = self._network.decode(codes.to(self._network.device).float()).cpu()
        return positive(unit(decoded).filters)

    def candidates(self, n: int = 50) -> KeySet:
        """The filters of n uniform codes 1/n, 2/n, ..., 1, each named by its code; the paper takes 50, 25 or 10.

        Raises:
            ValueError: n is not 1 to 256.
        """
        check_count(n)
        return self._named(torch.arange(1, n + 1, dtype=torch.float64, device="cpu") / n)

    def around(self, keys: KeySet, n: int = NEIGHBOURS, spacing: float = SPACING) -> KeySet:
        """The keys again, each with n neighbours on the code axis: the candidates of the paper's second round.

        The paper takes 4 neighbours of each of the 10 best and does not say how far away. Here they lie at multiples of
        `spacing` on both sides in turn; .004 divides the distance of 50 candidates evenly. Codes beyond the ends of the
        axis are left out.

        Args:
            keys: Some of `candidates`; their names are their codes.
            n: Neighbours of each key.
            spacing: Distance between neighbours.

        Raises:
            ValueError: Keys whose names are no codes, or more than 256 candidates.
        """
        try:
            codes = [float(name) for name in keys.names]
        except ValueError:
            raise ValueError("the keys' names are no codes: give keys that come from `candidates`") from None
        inside = with_neighbours(codes, n, spacing)
        check_count(len(inside))
        return self._named(torch.tensor(inside, dtype=torch.float64, device="cpu"))

    def _named(self, codes: Tensor) -> KeySet:
        names = [f"{code:.6g}" for code in codes.tolist()]
        return KeySet(self.decode(codes), names, provenance=self.provenance)


def autoencoder(
    filters: Any,
    *,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 512,
    evenness: float = 1.0,
    patience: int = 10,
    sample: int = SAMPLE,
    device: str | torch.device | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Autoencoder:
    """Train the paper's autoencoder on a bank's filters; `.candidates(50)` are then keys to choose from.

    As in "The Quest for Universal Master Key Filters in DS-CNNs" (NeurIPS 2025), 3.1.1: filters are centred and of norm
    1; the encoder has four hidden layers with LeakyReLU and ends in one sigmoid code, the decoder mirrors it and ends
    in tanh; the loss is a cosine. What follows the paper does not publish, and is our choice:

    - Sign. A key and its negative are the same key, and two places on the axis for them would be one too many. So the
      encoder sees each filter with its largest tap positive, and the loss is 1 - |cos|.
    - Even use of the codes. To 1 - |cos| is added `evenness` times the unevenness 12 * mean (z_(i) - (i - 1/2) / B)^2,
      with z_(i) the B codes of a batch in ascending order: 0 if they are spread evenly over [0, 1], 1 if all are in the
      middle and 4 if all are at one end.
    - Hidden widths 256, 128, 64, 32, slope .01; AdamW, peak learning rate 2e-3 with linear warm-up over a tenth of the
      steps and cosine decay to 0, weight decay 1e-4.
    - A tenth of the filters is held out; each 100 steps the sum of both terms is measured on them, training stops after
      `patience` times without a lower one, and the best weights are kept.
    - 3x3 filters: the authors say that a wavelet transform in the encoder's input helps; here it is the Haar transform
      (mean, vertical, horizontal and diagonal difference) of each of the four 2x2 windows, 16 numbers more.

    On the CPU the result depends on the filters, the options and the number of threads alone.

    Args:
        filters: A `FilterBank` of one kernel size, a tensor (N, k, k) or (N, k * k), or an array, also memory-mapped.
            Dead filters and those that are not finite are left out.
        seed: Of weights, batches and samples.
        steps: Training steps at most.
        batch_size: Filters a step.
        evenness: Weight of the second term; 0 for none.
        patience: Looks at the held-out filters without progress after which training stops.
        sample: Filters to train on at most; of more a random sample is drawn.
        device: Where to train; where the filters are if None.
        state: A file that holds the training so far, written (atomically) every 100 steps. If it is there already,
            training goes on from it. It is read by `torch.load(weights_only=True)`.
        progress: Called as `progress(done, steps)` every 100 steps.

    Raises:
        ValueError: Fewer than two filters that vary, filters that are all alike, options out of range, several kernel
            sizes, a shape that is no filter's, a device that cannot be used, or a state file that is damaged or of
            another training.
        TypeError: Filters that are no floating-point numbers.
        OSError: The state file cannot be read or written.
    """
    if steps < 1 or batch_size < 2 or patience < 1 or not (0 <= evenness < math.inf):
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, patience={patience}, evenness={evenness}: use at least 1, 2, 1, 0"
        )
    drawn = draw(filters, sample, seed, least=2)
    x = drawn.filters if device is None else _on(device, drawn.filters)
    if float((x.flatten(1) @ x[0].flatten()).abs().min()) > 1 - 1e-6:
        raise ValueError("all filters are linear shifts of a single one: there is nothing to encode")
    options = {"seed": seed, "steps": steps, "batch_size": batch_size, "evenness": evenness, "patience": patience}
    training = _Training(x, options)
    if state is not None:
        training.load(Path(state))
    while not training.finished:
        training.round()
        if state is not None:
            training.save(Path(state))
        if progress is not None:
            progress(training.step, steps)
    if progress is not None:
        progress(steps, steps)
    best, network = training.best, training.best_network()
    with torch.no_grad():
        codes = torch.cat([network.encode(part) for part in x.split(1 << 16)])
    told = f"autoencoder with a 1-D code, seed {seed}, step {best.step} as the best of {training.step}"
    histogram = torch.histc(codes, BINS, 0, 1).long().numpy(force=True)
    return Autoencoder(tuple(training.history), best, histogram, len(x), f"{told}, of {drawn.describe()}", network)


def with_neighbours(codes: Iterable[float], n: int = NEIGHBOURS, spacing: float = SPACING) -> list[float]:
    """Codes and n neighbours of each, those on the axis, in ascending order and each once."""
    steps = [0, *((i + 2) // 2 * (-1) ** i for i in range(n))]
    dense = (code + step * spacing for code in codes for step in steps)
    return sorted({round(code, 6) for code in dense if 0 <= code <= 1})


def _on(device: str | torch.device, x: Tensor) -> Tensor:
    try:
        return x.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


class _Network(nn.Module):
    """Encoder and decoder."""

    wavelets: Tensor

    def __init__(self, k: int):
        super().__init__()
        self.kernel_size = k
        wavelets = _haar(k) if k == 3 else torch.zeros(k * k, 0, **_PLAIN)
        self.register_buffer("wavelets", wavelets, persistent=False)
        self.encoder = _layers((k * k + self.wavelets.shape[1], *WIDTHS, 1), nn.Sigmoid())
        self.decoder = _layers((1, *WIDTHS[::-1], k * k), nn.Tanh())

    @property
    def device(self) -> torch.device:
        return self.wavelets.device

    def encode(self, filters: Tensor) -> Tensor:
        """Codes (N,) of unit filters (N, k, k)."""
        flat = positive(filters).flatten(1)
        codes: Tensor = self.encoder(torch.cat([flat, flat @ self.wavelets], 1))
        return codes[:, 0]

    def decode(self, codes: Tensor) -> Tensor:
        """Filters (N, k, k), not yet centred, of codes (N,)."""
        filters: Tensor = self.decoder(codes[:, None])
        return filters.view(-1, self.kernel_size, self.kernel_size)


class _Training:
    """Everything that changes from step to step, and its way to a file and back."""

    def __init__(self, x: Tensor, options: dict[str, Any]):
        self._identity = {"format": FORMAT, "version": VERSION, "filters": fingerprint([x]), **options}
        self._options = options
        order = torch.from_numpy(np.random.default_rng(options["seed"]).permutation(len(x))).to(x.device)
        held_out = max(1, round(HELD_OUT * len(x)))
        self._held_out, self._train = x[order[:held_out]], x[order[held_out:]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options["seed"])
            self._network = _Network(x.shape[-1]).to(x.device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self._best = _copy(self._network)  # the weights of `best`
        self._stale = 0
        self.step = 0
        self.history: list[Round] = []

    @property
    def finished(self) -> bool:
        return bool(self.step >= self._options["steps"] or self._stale >= self._options["patience"])

    @property
    def best(self) -> Round:
        """The look at the held-out filters that found the lowest loss, the first of equal ones."""
        return min(self.history, key=lambda entry: entry.held_out + self._options["evenness"] * entry.unevenness)

    def best_network(self) -> _Network:
        network = copy.deepcopy(self._network)
        network.load_state_dict(self._best)
        return network.eval().requires_grad_(False)

    def round(self) -> None:
        """Train up to 100 steps, then look at the held-out filters."""
        seed = np.random.SeedSequence((self._options["seed"], self.step)).generate_state(1)[0]
        rng = torch.Generator().manual_seed(int(seed))
        batch_size, evenness = self._options["batch_size"], self._options["evenness"]
        end = min(self.step + ROUND, self._options["steps"])
        total = torch.zeros((), dtype=torch.float32, device=self._train.device)
        begun = self.step
        while self.step < end:
            for group in self._optimizer.param_groups:
                group["lr"] = LEARNING_RATE * self._schedule()
            rows = torch.randint(len(self._train), (batch_size,), generator=rng, device="cpu").to(self._train.device)
            batch = self._train[rows]
            codes = self._network.encode(batch)
            loss = _cosine_loss(batch, self._network.decode(codes))
            self._optimizer.zero_grad()
            (loss + evenness * _unevenness(codes)).backward()
            self._optimizer.step()
            total += loss.detach()
            self.step += 1
        with torch.no_grad():
            codes = self._network.encode(self._held_out)
            held_out = float(_cosine_loss(self._held_out, self._network.decode(codes)))
            unevenness = float(_unevenness(codes))
        self.history.append(Round(self.step, float(total) / (end - begun), held_out, unevenness))
        if self.best is self.history[-1]:
            self._best, self._stale = _copy(self._network), 0
        else:
            self._stale += 1

    def _schedule(self) -> float:
        """The learning rate relative to its peak: linear warm-up, then half a cosine."""
        steps: int = self._options["steps"]
        warm_up = max(1, round(WARM_UP * steps))
        if self.step < warm_up:
            return (self.step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (self.step - warm_up) / max(1, steps - warm_up)))

    def save(self, path: Path) -> None:
        content = {
            "identity": self._identity,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
            "stale": self._stale,
            "step": self.step,
            "history": [list(entry) for entry in self.history],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(content, file)

    def load(self, path: Path) -> None:
        """Go on from a file, if it is there."""
        if not path.exists():
            return
        file = io.BytesIO(path.read_bytes())  # a file that cannot be read is told as such
        try:
            content = torch.load(file, map_location=self._train.device, weights_only=True)
            differs = [name for name, value in self._identity.items() if content["identity"].get(name) != value]
            if not differs:
                self._network.load_state_dict(content["network"])
                self._optimizer.load_state_dict(content["optimizer"])
                self._best, self._stale, self.step = content["best"], content["stale"], content["step"]
                self.history = [Round(*entry) for entry in content["history"]]
                return
        except Exception as error:  # of a damaged file torch raises nearly anything, its OSError and ValueError too
            raise ValueError(f"{path} is damaged or no training's state: delete it to start anew") from error
        raise ValueError(
            f"{path} belongs to another training ({', '.join(differs)} differ): name another file, or delete it"
        )


def _layers(widths: tuple[int, ...], last: nn.Module) -> nn.Sequential:
    """Linear layers with LeakyReLU between them and `last` at the end."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, **_PLAIN), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers[:-1], last)


def _haar(k: int) -> Tensor:
    """(k * k, 4 * (k - 1)^2): the orthonormal Haar transform of every 2x2 window of a k x k filter."""
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], **_PLAIN) / 2
    columns = []
    for row in range(k - 1):
        for column in range(k - 1):
            for sign in signs:
                basis = torch.zeros(k, k, **_PLAIN)
                basis[row : row + 2, column : column + 2] = sign.view(2, 2)
                columns.append(basis.flatten())
    return torch.stack(columns, 1)


def _cosine_loss(filters: Tensor, decoded: Tensor) -> Tensor:
    """Mean of 1 - |cos|."""
    return (1 - F.cosine_similarity(filters.flatten(1), decoded.flatten(1), dim=1).abs()).mean()


def _unevenness(codes: Tensor) -> Tensor:
    """12 times the mean squared distance of the sorted codes (B,) from an even spread."""
    even = (torch.arange(len(codes), dtype=codes.dtype, device=codes.device) + 0.5) / len(codes)
    return 12 * (codes.sort().values - even).square().mean()


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
