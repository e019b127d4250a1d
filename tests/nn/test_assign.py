"""Which channel gets which key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkf.nn.assign import assign_keys

CONVNEXT_V2_B = (2.77, 3.71, 3.33, 3.55, 3.08, 6.34, 24.17, 53.05)  # per cent of its filters


def numbers(index: torch.Tensor, count: int = 8) -> list[int]:
    return torch.bincount(index, minlength=count).tolist()


def runs(index: torch.Tensor) -> list[int]:
    return torch.unique_consecutive(index).tolist()


@pytest.mark.parametrize(("channels", "each"), [(96, 12), (192, 24), (384, 48), (768, 96), (8, 1)])
def test_uniform(channels: int, each: int) -> None:
    index = assign_keys(channels, 8)
    assert index.dtype == torch.int32
    assert numbers(index) == [each] * 8
    assert runs(index) == list(range(8))


def test_shares_are_kept_and_blocks_as_large_as_they_allow() -> None:
    index = assign_keys(768, 8, CONVNEXT_V2_B)
    for number, share in zip(numbers(index), CONVNEXT_V2_B, strict=True):
        assert abs(number - 7.68 * share) <= 0.96 * share  # an eighth
        assert number % 4 == 0
    assert numbers(assign_keys(1024, 8)) == [128] * 8
    assert [
        n % 32
        for n in numbers(
            assign_keys(2048, 4, [1, 2, 3, 4.1]),
        )[:4]
    ] == [0] * 4
    assert numbers(assign_keys(64, 3, [0, 1, 0]), 3) == [0, 64, 0]


def test_rotation_moves_the_first_key() -> None:
    for rotation in range(20):
        index = assign_keys(96, 8, rotation=rotation)
        assert runs(index) == [(rotation + i) % 8 for i in range(8)]
        assert numbers(index) == [12] * 8
        shares = assign_keys(960, 8, CONVNEXT_V2_B, rotation=rotation)
        assert numbers(shares) == numbers(assign_keys(960, 8, CONVNEXT_V2_B))
        assert shares[0] == rotation % 8


def test_random_order_is_seeded() -> None:
    one, two, other = (
        assign_keys(384, 8, order="random", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort().values, assign_keys(384, 8))
    torch.manual_seed(5)
    one = assign_keys(384, 8, order="random")
    torch.manual_seed(5)
    assert torch.equal(one, assign_keys(384, 8, order="random"))


@settings(deadline=None)
@given(st.integers(1, 1500), st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(any), st.integers(0, 100))
def test_every_channel_has_a_key_with_a_share(channels: int, shares: list[float], rotation: int) -> None:
    index = assign_keys(channels, len(shares), shares, rotation=rotation)
    assert len(index) == channels
    total = sum(shares)
    for number, share in zip(numbers(index, len(shares)), shares, strict=True):
        exact = channels * share / total
        assert abs(number - exact) <= max(1, exact / 8) + 1e-6
        assert number == 0 or share > 0


@pytest.mark.parametrize(
    ("assign", "order", "message"),
    [
        ("normal", "blocks", "use 'uniform', 8 proportions, or 'fit'"),
        ("fit", "blocks", "'fit' where there are filters"),
        ([1.0] * 7, "blocks", "expected 8 proportions"),
        ([0.0] * 8, "blocks", "not all 0"),
        ([-1.0] + [1.0] * 7, "blocks", "none negative"),
        ([float("nan")] * 8, "blocks", "expected 8 proportions"),
        ("uniform", "sorted", "'blocks' or 'random'"),
    ],
)
def test_what_is_refused(assign, order, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_keys(96, 8, assign, order)
