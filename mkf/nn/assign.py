"""Which channel gets which key when a network is trained from scratch."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Order = Literal["blocks", "random"]

BLOCKS = (32, 16, 8, 4, 2, 1)
"""Channels that a block may have: 32 are a warp of a GPU and a few vectors of a CPU, which then run a single key."""

OFF = 1 / 8
"""How far the number of channels of a key may be from its share, relative to it, to make larger blocks."""


def assign_keys(
    channels: int,
    count: int,
    assign: str | Sequence[float] = "uniform",
    order: Order = "blocks",
    rotation: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The key of each channel, (channels,) int32 on the CPU.

    Each key has its share of the channels, rounded. In blocks, the channels of a key stand together, their number a
    multiple of 32 where the shares allow it (16, 8, 4, 2, 1 where not). That is a choice of ours: the paper reports
    that drawing the keys uniformly or in the proportions of trained models works similarly, and says nothing about
    their order, which a network that is trained from scratch is free in.

    Args:
        channels: Number of channels.
        count: Number of keys, K.
        assign: "uniform", or K numbers in proportion to the shares, none negative and not all zero.
        order: "blocks", or "random" for a random permutation.
        rotation: The key that the first block has, counted round: a number that goes up from layer to layer keeps a
            residual channel from meeting the same key in every layer.
        generator: For the permutation; torch's global one if None.

    Raises:
        ValueError: Proportions of another number or sign, or an unknown word.
    """
    if order not in ("blocks", "random"):
        raise ValueError(f"order={order!r}: use 'blocks' or 'random'")
    shares = _shares(count, assign)
    keys = np.roll(np.arange(count), -rotation)
    index = np.repeat(keys, _numbers(channels, shares[keys])).astype(np.int32)
    if order == "random":
        index = index[torch.randperm(channels, generator=generator, device="cpu").numpy()]
    return torch.from_numpy(index)


def _shares(count: int, assign: str | Sequence[float]) -> NDArray[np.float64]:
    if isinstance(assign, str):
        if assign != "uniform":
            raise ValueError(f"assign={assign!r}: use 'uniform', {count} proportions, or 'fit' where there are filters")
        return np.full(count, 1 / count)
    shares = np.array(assign, dtype=np.float64)
    if shares.shape != (count,) or not np.isfinite(shares).all() or (shares < 0).any() or not shares.any():
        raise ValueError(f"assign={assign!r}: expected {count} proportions, one for each key, none negative, not all 0")
    shares /= shares.sum()
    return shares


def _numbers(channels: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many channels each key gets, in the largest blocks that keep the shares."""
    wanted = channels * shares
    for block in BLOCKS:
        if channels % block == 0:
            numbers: NDArray[np.int64] = block * _largest_remainders(channels // block, shares)
            if (np.abs(numbers - wanted) <= OFF * wanted).all():
                return numbers
    return _largest_remainders(channels, shares)


def _largest_remainders(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers of that sum, nearest to the shares; of equal remainders the first is rounded up."""
    exact = total * shares
    numbers: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    up = np.argsort(numbers - exact, kind="stable")[: total - numbers.sum()]
    numbers[up] += 1
    return numbers
