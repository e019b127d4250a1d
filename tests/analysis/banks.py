"""Small banks with known filters."""

import torch
from torch import nn

import mkf
from mkf.bank import FilterBank


def bank_of(*layers: torch.Tensor) -> FilterBank:
    """A bank of one model whose depthwise layers hold these filters (C, k, k); the layers are named 0, 1, ..."""
    model = nn.Sequential()
    for filters in layers:
        channels, k, _ = filters.shape
        conv = nn.Conv2d(channels, channels, k, groups=channels)
        conv.weight.data = filters.float().unsqueeze(1).clone()
        model.append(conv)
    return FilterBank.from_model(model)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shifted(keys: mkf.KeySet, index: list[int], scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Exact linear shifts of keys."""
    return scale * keys.filters[index] + shift
