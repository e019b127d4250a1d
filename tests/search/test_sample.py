"""What a search makes of filters before it looks at them."""

import numpy as np
import pytest
import torch

from mkf.bank import FilterBank, Layer
from mkf.search.sample import draw, positive, unit


def filters(count=200, k=5, seed=0):
    return torch.randn(count, k, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unit_filters_have_mean_zero_and_norm_one(dtype):
    x = (3e4 * filters() + 1e4).to(dtype)
    x[3] = 7
    x[5, 0, 0] = torch.nan
    x[6, 1, 1] = torch.inf
    units = unit(x)
    assert units.not_finite == 2
    assert units.live.tolist() == [i not in (3, 5, 6) for i in range(200)]
    expected = x[units.live].double().flatten(1)
    expected = expected - expected.mean(1, keepdim=True)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert units.filters.dtype == torch.float32
    torch.testing.assert_close(units.filters.flatten(1).double(), expected, atol=1e-6, rtol=0)


def test_sizes_from_tiny_to_huge_and_variation_that_float32_cannot_hold():
    x = filters(4).double()
    x[0] *= 1e-300
    x[1] *= 1e300
    x[2] = 1 + 1e-9 * x[2]
    units = unit(x)
    assert units.live.tolist() == [True, True, False, True]
    torch.testing.assert_close(units.filters.flatten(1).norm(dim=1), torch.ones(3))


def test_a_flat_array_and_a_bank_are_the_same_filters():
    x = filters(k=3)
    bank = FilterBank.from_layers([Layer("a", x)], "m")
    for source in (x, x.flatten(1), x.numpy(), x.flatten(1).numpy().astype(np.float64), bank):
        assert torch.equal(draw(source).filters, unit(x).filters)


def test_a_sample_is_uniform_in_order_and_the_same_however_the_source_is_cut(tmp_path):
    x = filters(40_000, 3)
    x[::100] = 1
    FilterBank.from_layers([Layer("a", x)], "m").save(tmp_path / "bank")
    np.save(tmp_path / "x.npy", x.numpy())
    sources = (x, FilterBank.open(tmp_path / "bank"), np.load(tmp_path / "x.npy", mmap_mode="r"))
    samples = [draw(source, 1000, seed=4) for source in sources]
    for sample in samples:
        assert (len(sample.filters), sample.total, sample.dead, sample.not_finite) == (1000, 40_000, 400, 0)
        assert torch.equal(sample.filters, samples[0].filters)
    live = unit(x).filters.flatten(1)
    position = {tuple(row): i for i, row in enumerate(live.tolist())}
    at = [position[tuple(row)] for row in samples[0].filters.flatten(1).tolist()]
    assert at == sorted(set(at))
    assert abs(np.mean(at) / len(live) - 0.5) < 0.04  # 4 standard deviations
    assert not torch.equal(draw(x, 1000, seed=5).filters, samples[0].filters)


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"3 keys need at least as many filters that vary, and there are 2 \(4 filters"
    ):
        draw(torch.stack([*filters(2), torch.zeros(5, 5), torch.ones(5, 5)]), least=3)
    with pytest.raises(ValueError, match=r"shape \(10, 1, 1\)"):
        unit(torch.randn(10, 1, 1))
    with pytest.raises(ValueError, match="shape"):
        unit(torch.randn(10, 5, 7))
    with pytest.raises(TypeError, match="int64"):
        unit(torch.ones(10, 5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="mixes kernel sizes"):
        draw(FilterBank.from_layers([Layer("a", filters(k=3)), Layer("b", filters(k=5))], "m"))
    with pytest.raises(ValueError, match="sample=2: this search needs at least 3"):
        draw(torch.randn(5, 7, 7), 2, least=3)
    with pytest.raises(ValueError, match="seed=-1: give a whole number"):
        draw(torch.randn(5, 7, 7), seed=-1)
    with pytest.raises(ValueError, match="sample=0"):
        draw(filters(), 0)
    broken = filters()
    broken[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left out 1 filters that hold NaN"):
        assert draw(broken).not_finite == 1


def test_positive_turns_the_largest_tap_up():
    x = filters(50)
    turned = positive(x).flatten(1)
    assert torch.equal(turned.amax(1), x.flatten(1).abs().amax(1))
    assert ((turned == x.flatten(1)).all(1) | (turned == -x.flatten(1)).all(1)).all()
