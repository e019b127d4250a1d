"""Small banks for the tests."""

import pytest
import torch

from mkf.bank import FilterBank, Layer


@pytest.fixture
def small_bank() -> FilterBank:
    """Two models of 7x7 and 5x5 filters, in an order that is not alphabetical."""
    generator = torch.Generator().manual_seed(0)

    def layer(name: str, channels: int, k: int, stride: int | None) -> Layer:
        return Layer(name, torch.randn(channels, k, k, generator=generator), stride)

    first = [layer("b.conv", 6, 7, 2), layer("a.conv", 4, 5, 1), layer("c.conv", 5, 7, None)]
    return FilterBank.concat(
        [
            FilterBank.from_layers(first, "zeta", source="made here", licence="CC0-1.0"),
            FilterBank.from_layers([layer("x", 3, 7, 1)], "alpha"),
        ]
    )
