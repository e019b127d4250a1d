"""Statistics of fits against numpy in float64 on all residuals, and that pieces, threads and sources do not matter."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mkf.bank import FilterBank, Layer
from mkf.keys import paper8
from mkf.ops import affine_fit, stream
from mkf.ops.affine_fit import AffineFit
from mkf.ops.fit_statistics import FitStatistics, FitTally, fit_statistics, histogram_quantile

KEYS = paper8()
LEVELS = (0.0, 0.05, 0.5, 0.731, 1.0)


def noise(count: int, k: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, k, k, generator=torch.Generator().manual_seed(seed))


def laced(count: int = 600) -> torch.Tensor:
    """Noise with constant filters and such that are not finite."""
    filters = noise(count)
    filters[::11] = 3.0
    filters[5::17, 2, 3] = torch.nan
    filters[8::23, 6, 6] = -torch.inf
    return filters


def assert_same(one: FitStatistics, other: FitStatistics) -> None:
    assert one.groups == other.groups
    for name in ("dead", "not_finite", "positive", "histogram", "sums", "squares"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def assert_right(statistics: FitStatistics, filters: torch.Tensor, groups: np.ndarray, keys: object = KEYS) -> None:
    """Compare with numpy on the residuals of the reference, computed in float64."""
    fit = affine_fit(filters, keys, backend="reference")
    index, residual, scale = fit.index.numpy(), fit.residual.numpy().astype(float), fit.scale.numpy()
    flat = filters.flatten(1).numpy()
    not_finite = ~np.isfinite(flat).all(1)
    dead = ~not_finite & (flat == flat[:, :1]).all(1)
    bins = statistics.histogram.shape[2]
    for g in range(len(statistics.groups)):
        assert statistics.dead[g] == (dead & (groups == g)).sum()
        assert statistics.not_finite[g] == (not_finite & (groups == g)).sum()
        assert statistics.filters[g] == (groups == g).sum()
        live = ~dead & ~not_finite & (groups == g)
        for j in range(statistics.count.shape[1]):
            own = live & (index == j)
            assert statistics.count[g, j] == own.sum()
            if own.any():
                assert statistics.share[g, j] == pytest.approx(own.sum() / live.sum())
                assert statistics.positive_share[g, j] == pytest.approx((scale[own] > 0).mean())
                assert statistics.mean[g, j] == pytest.approx(residual[own].mean(), abs=1e-6)
                assert statistics.std[g, j] == pytest.approx(residual[own].std(), abs=1e-6)
                for level, value in zip(LEVELS, statistics.quantile(LEVELS)[:, g, j], strict=True):
                    assert abs(value - np.quantile(residual[own], level)) <= 0.5 / bins + 2e-6
            else:
                for value in (statistics.mean, statistics.std, statistics.positive_share, statistics.quantile(0.5)):
                    assert np.isnan(value[g, j])


@pytest.mark.parametrize("bins", [1, 10, 1000, 1024])
def test_noise_with_dead_and_broken_filters(bins: int) -> None:
    filters = laced()
    assert_right(fit_statistics(filters, KEYS, bins=bins), filters, np.zeros(600, int))


def test_trained_filters(data_dir: Path) -> None:
    layers = load_file(data_dir / "filters" / "trained_k7.safetensors")
    filters = torch.cat([layer[:, 0] for layer in layers.values()])
    groups = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers.values()])
    statistics = fit_statistics(filters, KEYS, groups)
    assert statistics.groups == tuple(range(17))
    assert statistics.filters.sum() == 2157
    assert statistics.dead.sum() > 0  # a few of them are exactly zero
    assert_right(statistics, filters, groups)


def test_positive_scales_only() -> None:
    keys = KEYS.filters[:1]
    filters = torch.cat([keys, -keys, noise(50)])
    statistics = fit_statistics(filters, keys, sign="positive")
    residual = affine_fit(filters, keys, sign="positive").residual
    assert residual[1] == 1  # scale 0, yet not dead
    assert statistics.count.tolist() == [[52]]
    assert statistics.mean[0, 0] == pytest.approx(float(residual.mean()), abs=1e-6)
    assert statistics.positive[0, 0] == (affine_fit(filters, keys, sign="positive").scale > 0).sum()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 3))
def test_pieces_and_threads_do_not_matter(sizes: list[int], threads: int) -> None:
    filters, groups = laced(400), torch.arange(400) % 3
    whole = fit_statistics(filters, KEYS, groups)
    tally, start, before = FitTally(8), 0, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        while start < len(filters):
            size = sizes[start % len(sizes)]
            part = affine_fit(filters[start : start + size], KEYS)
            tally.add(part, groups[start : start + size], 3)
            start += size
    finally:
        torch.set_num_threads(before)
    assert_same(tally.result((0, 1, 2)), whole)


@pytest.mark.parametrize("rows", [1, 7, 250, 10_000])
def test_the_size_of_a_piece_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = laced(300)
    whole = fit_statistics(filters, KEYS)
    monkeypatch.setattr(stream, "ROWS", rows)
    monkeypatch.setattr(sys.modules["mkf.ops.fit_statistics"], "BLOCK", 1 + rows // 2)
    assert_same(fit_statistics(filters, KEYS), whole)


def test_sources_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = laced(300)
    whole = fit_statistics(filters, KEYS)
    monkeypatch.setattr(stream, "ROWS_READ", 64)
    array = filters.numpy()
    np.save(tmp_path / "filters.npy", array)
    read_only = array.copy()
    read_only.flags.writeable = False
    bank = FilterBank.from_layers([Layer("a", filters[:120]), Layer("b", filters[120:])], "m")
    bank.save(tmp_path / "bank")
    sources = (
        array, read_only, array.reshape(300, 49), filters.flatten(1), bank, FilterBank.open(tmp_path / "bank"),
        np.load(tmp_path / "filters.npy", mmap_mode="r"), np.load(tmp_path / "filters.npy", mmap_mode="r+"),
    )  # fmt: skip
    for source in sources:
        assert_same(fit_statistics(source, KEYS), whole)
    mapped = np.load(tmp_path / "filters.npy", mmap_mode="r")
    for part in (slice(17, 250), slice(None, None, 3), slice(299, None, -1)):
        assert_same(fit_statistics(mapped[part], KEYS), fit_statistics(array[part].copy(), KEYS))
    assert np.array_equal(mapped, array, equal_nan=True)  # its pages can be read again


def test_changes_to_a_private_mapping_stay(tmp_path: Path) -> None:
    np.save(tmp_path / "filters.npy", noise(2000).numpy())
    mapped = np.load(tmp_path / "filters.npy", mmap_mode="c")
    mapped[:] = 1.0
    assert fit_statistics(mapped, KEYS).dead == 2000
    assert (mapped == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    filters = laced().to(dtype)
    assert_right(fit_statistics(filters, KEYS), filters.double(), np.zeros(600, int))


def test_keys_of_another_size_as_a_tensor() -> None:
    keys = noise(3, k=5)
    filters = noise(100, k=5, seed=1)
    assert_right(fit_statistics(filters, keys), filters, np.zeros(100, int), keys)


def bank_of_layers() -> FilterBank:
    first = [Layer("x", noise(30), 2), Layer("a", laced(50)), Layer("e", noise(5, k=5))]
    second = [Layer("a", noise(40, seed=2), 1), Layer("y", noise(20, seed=3), None)]
    return FilterBank.concat([FilterBank.from_layers(first, "zeta"), FilterBank.from_layers(second, "alpha")])


@pytest.mark.parametrize("rows", [1, 33, 1000])
def test_groups_by_columns(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS_READ", rows)
    bank = bank_of_layers().select(k=7)
    filters = bank.filters
    sizes = [30, 50, 40, 20]
    by_layer = fit_statistics(bank, KEYS, ("model", "layer"))
    assert by_layer.groups == (("zeta", "x"), ("zeta", "a"), ("alpha", "a"), ("alpha", "y"))
    assert_right(by_layer, filters, np.repeat([0, 1, 2, 3], sizes))
    by_model = fit_statistics(bank, KEYS, "model")
    assert by_model.groups == ("zeta", "alpha")
    assert_right(by_model, filters, np.repeat([0, 0, 1, 1], sizes))
    assert fit_statistics(bank, KEYS, ["layer"]).groups == (("x",), ("a",), ("y",))
    by_stride = fit_statistics(bank, KEYS, "stride")
    assert by_stride.groups == (2, None, 1)
    assert_right(by_stride, filters, np.repeat([0, 1, 2, 1], sizes))
    by_channel = fit_statistics(bank, KEYS, "channel")
    assert by_channel.groups == tuple(range(50))


def test_numbered_groups() -> None:
    filters = laced(200)
    groups = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0))
    groups[groups == 4] = 5
    statistics = fit_statistics(filters, KEYS, groups.to(torch.int16))
    assert statistics.groups == tuple(range(9))
    assert statistics.filters[4] == 0
    assert_right(statistics, filters, groups.numpy())
    assert_same(fit_statistics(filters.numpy(), KEYS, groups.tolist()), statistics)


def test_sums_over_keys_and_groups() -> None:
    filters = laced(200)
    groups = np.arange(200) % 5
    statistics = fit_statistics(filters, KEYS, groups)
    assert_same(statistics.over_groups(), fit_statistics(filters, KEYS))
    residual = affine_fit(filters, KEYS).residual.double().numpy()
    live = np.isfinite(residual) & (residual > 0)
    together = statistics.over_keys()
    assert together.count.shape == (5, 1)
    for g in range(5):
        assert together.mean[g, 0] == pytest.approx(residual[live & (groups == g)].mean(), abs=1e-6)
        assert together.std[g, 0] == pytest.approx(residual[live & (groups == g)].std(), abs=1e-6)
    assert statistics.over_keys().over_groups().count.item() == live.sum()


def test_residuals_at_the_ends_and_sums_beyond_64_bits() -> None:
    residual = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.25 - 2**-25])  # the last rounds up
    residual = residual.repeat(20_000)
    count = len(residual)
    tally = FitTally(1, bins=4)
    for _ in range(3):
        tally.add(AffineFit(torch.zeros(count, dtype=torch.int32), torch.ones(count), torch.zeros(count), residual))
    statistics = tally.result()
    units = [round(float(r) * 2**24) for r in residual[:5]]
    assert statistics.histogram.tolist() == [[[60_000, 60_000, 60_000, 120_000]]]
    assert statistics.sums.item() == 60_000 * sum(units)
    assert statistics.squares.item() == 60_000 * sum(u * u for u in units)
    assert statistics.squares.item() > 2**63
    assert statistics.quantile([0, 1]).ravel().tolist() == [0.125, 0.875]


def test_the_spread_of_equal_residuals_is_zero() -> None:
    filters = noise(1).expand(999, 7, 7)
    statistics = fit_statistics(filters, KEYS).over_keys()
    assert statistics.std.item() == 0
    assert statistics.mean.item() == pytest.approx(float(affine_fit(filters[:1], KEYS).residual), abs=2**-25)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_those_of_numpy_on_the_middles_of_bins(bins: list[int], level: float) -> None:
    histogram = np.bincount(bins, minlength=16)
    expected = np.quantile((np.array(bins) + 0.5) / 16, level)
    assert histogram_quantile(histogram, level) == pytest.approx(expected, abs=1e-12)


def test_only_dead_or_broken_filters() -> None:
    for filters, dead in ((torch.ones(20, 7, 7), 20), (torch.full((20, 7, 7), torch.nan), 0)):
        statistics = fit_statistics(filters, KEYS)
        assert (statistics.dead.item(), statistics.not_finite.item()) == (dead, 20 - dead)
        assert statistics.count.sum() == 0
        for value in (statistics.mean, statistics.std, statistics.share, statistics.quantile(0.5)):
            assert np.isnan(value).all()


def test_filters_that_need_gradients() -> None:
    filters = noise(20).requires_grad_()
    assert fit_statistics(filters, KEYS).filters == 20


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS", 40)
    seen: list[tuple[int, int]] = []
    fit_statistics(noise(100), KEYS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(40, 100), (80, 100), (100, 100)]


def test_no_filters() -> None:
    statistics = fit_statistics(torch.empty(0, 7, 7), KEYS)
    assert statistics.filters.tolist() == [0]
    assert np.isnan(statistics.mean).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"filters": FilterBank.concat([])}, ValueError, "empty"),
        ({"filters": bank_of_layers()}, ValueError, r"mixes kernel sizes \(5x5, 7x7\)"),
        ({"filters": noise(3, k=5)}, ValueError, "filters are 5x5 but keys are 7x7"),
        ({"filters": torch.ones(3, 7, 7, dtype=torch.int32)}, TypeError, "int32"),
        ({"groups": "model"}, ValueError, "only a bank has columns"),
        ({"groups": ("a", "b")}, ValueError, "only a bank has columns"),
        ({"filters": bank_of_layers().select(k=7), "groups": "colour"}, ValueError, "no column colour; it has model"),
        ({"groups": torch.zeros(9)}, TypeError, "float32"),
        ({"groups": torch.ones(10, dtype=torch.bool)}, TypeError, "bool"),
        ({"groups": torch.zeros(9, dtype=torch.int64)}, ValueError, r"shape \(9,\).* 10 filters"),
        ({"groups": torch.arange(10) - 1}, ValueError, "hold -1"),
        ({"groups": np.zeros(10, np.uint64)}, TypeError, "uint64: give integers such as int64"),
        ({"groups": ()}, ValueError, "give None for a single group"),
        ({"bins": 0}, ValueError, "bins=0"),
        ({"bins": 2.5}, ValueError, "bins=2.5: use a whole number"),
        ({"bins": 2**25}, ValueError, "bins="),
        ({"sign": "negative"}, ValueError, "sign="),
        ({"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_statistics(**{"filters": noise(10), "keys": KEYS, **arguments})


def test_levels_out_of_range() -> None:
    with pytest.raises(ValueError, match="levels from 0 to 1"):
        fit_statistics(noise(10), KEYS).quantile(1.5)


def test_what_goes_wrong_while_reading_is_raised_and_threads_come_back() -> None:
    class Broken:
        kernel_sizes = (7,)

        def __len__(self) -> int:
            return 5

        def batches(self, rows: int, metadata: object):
            yield noise(2)
            raise OSError("the disk is gone")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(OSError, match="the disk is gone"):
            fit_statistics(Broken(), KEYS)
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt):
            fit_statistics(bank_of_layers().select(k=7), KEYS, progress=_interrupt)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from mkf.bank import FilterBank
from mkf.keys import paper8
from mkf.ops.fit_statistics import fit_statistics

def fit(path):
    source = np.load(path, mmap_mode="r") if path.endswith(".npy") else FilterBank.open(path)
    return int(fit_statistics(source, paper8()).filters[0])

def kilobytes(what):
    # Not ru_maxrss, which in a new process starts at what its parent had.
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

fit(sys.argv[1])
before = kilobytes("VmRSS")
count = fit(sys.argv[2])
print(count, kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["bank", "array.npy"])
def test_memory_does_not_grow_with_the_filters(tmp_path: Path, kind: str) -> None:
    extra = []
    for count in (1000, 250_000, 1_000_000):
        path = tmp_path / f"{count}_{kind}"
        if kind == "bank":
            part = FilterBank.from_layers([Layer("conv", noise(1000))], "m")
            FilterBank.concat([part] * (count // 1000)).save(path)
        else:
            array = np.lib.format.open_memmap(path, "w+", np.float32, (count, 7, 7))
            array[:] = np.arange(49).reshape(7, 7) ** 2
            del array
        if count > 1000:
            script = [sys.executable, "-c", MEMORY, str(tmp_path / f"1000_{kind}"), str(path)]
            output = subprocess.run(script, capture_output=True, text=True, check=True).stdout
            done, kilobytes = map(int, output.split())
            assert done == count
            extra.append(kilobytes)
    assert max(extra) < 50_000  # a million filters have 196 MB
    assert extra[1] - extra[0] < 15_000  # those between, 147 MB


def test_labels_that_are_no_small_numbers() -> None:
    with pytest.raises(ValueError, match="number the groups from 0"):
        fit_statistics(noise(3), KEYS, groups=torch.tensor([0, 1, 10**9]))
