"""Planted members of the family come back; the published keys have the kinds they were published with."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import ive

import mkf
from mkf.analysis import identify
from mkf.analysis.identification import CONSTANT, NAMES
from mkf.bank import FilterBank
from mkf.keys.gaussian import SCALES
from mkf.keys.published import KINDS as PUBLISHED

from .banks import bank_of, noise

# Each kind's profiles along y and x, as sums of weight * T(n + step).
SMOOTH, SECOND, CENTRAL = {0: 1}, {-1: 1, 0: -2, 1: 1}, {-1: 0.5, 1: -0.5}
AHEAD, BEHIND = {-1: 1, 0: -1}, {1: 1, 0: -1}
PROFILES = {
    "Gaussian": (SMOOTH, SMOOTH),
    "one-sided difference in y, below": (AHEAD, SMOOTH),
    "one-sided difference in x, right": (SMOOTH, AHEAD),
    "one-sided difference in y, above": (BEHIND, SMOOTH),
    "one-sided difference in x, left": (SMOOTH, BEHIND),
    "central difference in x": (SMOOTH, CENTRAL),
    "central difference in y": (CENTRAL, SMOOTH),
    "second difference in x": (SMOOTH, SECOND),
    "second difference in y": (SECOND, SMOOTH),
    "mixed second difference": (CENTRAL, CENTRAL),
}
DOG = "difference of Gaussians"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small operations: on a busy machine their threads would wait for one another most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def profile(weights: dict[int, float], s: float, k: int) -> np.ndarray:
    n = np.arange(k) - k // 2
    return sum(weight * ive(np.abs(n + step), s**2) for step, weight in weights.items())


def member(kind: str, s_x: float, s_y: float, alpha: float, k: int = 7) -> np.ndarray:
    """A member of the family, written from its formula with SciPy's Bessel functions."""
    if kind != DOG:
        rows, columns = PROFILES[kind]
        return np.outer(profile(rows, s_y, k), profile(columns, s_x, k))
    smooth, second = profile(SMOOTH, s_x, k), profile(SECOND, s_x, k)
    laplacian = np.outer(second, smooth) + np.outer(smooth, second)
    if np.isinf(alpha):
        return -laplacian
    delta = np.zeros((k, k))
    delta[k // 2, k // 2] = 1
    return delta - alpha * laplacian


def planted(
    count: int,
    k: int,
    relative_noise: float,
    seed: int = 0,
    most_of_dog: float = 1.0,
    alphas: tuple[float, float] = (0.25, 2),
) -> tuple[np.ndarray, ...]:
    """Filters a * g + b + noise of random kinds, scales .3 to 1.3; of a difference of Gaussians to `most_of_dog`."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice([*PROFILES, DOG], count)
    scales = rng.uniform(0.3, 1.3, (count, 2))
    of_dog = kinds == DOG
    scales[of_dog] = rng.uniform(0.3, most_of_dog, (of_dog.sum(), 1))
    alpha = np.where(of_dog, rng.uniform(*alphas, count), np.nan)
    amplitude, offset = rng.choice([-1, 1], count) * rng.lognormal(size=count), rng.normal(size=count)
    filters = np.stack([member(*row, k) for row in zip(kinds, *scales.T, alpha, strict=True)])
    filters *= amplitude[:, None, None]
    centred = filters - filters.mean((1, 2), keepdims=True)
    error = rng.normal(size=filters.shape)
    error *= (np.linalg.norm(centred, axis=(1, 2)) / np.linalg.norm(error, axis=(1, 2)))[:, None, None]
    return filters + offset[:, None, None] + relative_noise * error, kinds, scales, alpha, amplitude, offset


@pytest.mark.parametrize("k", [5, 7, 11])
def test_planted_members_come_back(k: int) -> None:
    filters, kinds, scales, alpha, amplitude, offset = planted(1500, k, 0.0)
    found = identify(filters)
    assert (found.kind == kinds).all()
    assert np.abs(np.stack([found.scale_x, found.scale_y], 1) - scales).max() < 0.001
    np.testing.assert_allclose(found.alpha, alpha, rtol=2e-3)
    np.testing.assert_allclose(found.amplitude, amplitude, rtol=2e-3)
    np.testing.assert_allclose(found.offset, offset, atol=2e-3)
    assert found.residual.max() < 1e-3
    assert (found.sign == np.sign(amplitude)).all()


def test_in_3x3_only_kinds_that_hold_the_same_filters_are_taken_for_one_another() -> None:
    filters, kinds, scales, *_ = planted(3000, 3, 0.0)
    found = identify(filters)
    other = found.kind != kinds
    assert set(kinds[other]) == {DOG, "second difference in x", "second difference in y"}
    assert set(found.kind[other]) == {"Gaussian"}
    assert found.residual.max() < 1e-3, "they are that filter exactly"
    assert 0.4 < other[kinds == DOG].mean() < 0.55
    assert (~other).mean() > 0.94
    of_kind = kinds == "central difference in x"
    np.testing.assert_allclose(found.scale_y[of_kind], scales[of_kind, 1], atol=1e-3)


@pytest.mark.parametrize(("k", "of_all", "of_dog"), [(3, 0.923, 0.32), (5, 0.984, 0.83), (7, 0.995, 0.94)])
def test_how_many_keep_their_name_under_noise(k: int, of_all: float, of_dog: float) -> None:
    """As docs/search.md has it; differences of Gaussians that are nearly single taps lose theirs."""
    filters, kinds, *_ = planted(3000, k, 0.1)
    same = identify(filters).kind == kinds
    assert same.mean() == pytest.approx(of_all, abs=0.01)
    assert same[kinds == DOG].mean() == pytest.approx(of_dog, abs=0.06)


@pytest.mark.parametrize(("k", "of_all", "of_dog"), [(3, 0.913, 0.19), (5, 0.958, 0.55), (7, 0.970, 0.67)])
def test_how_many_keep_it_where_more_are_nearly_single_taps(k: int, of_all: float, of_dog: float) -> None:
    filters, kinds, *_ = planted(3000, k, 0.1, most_of_dog=1.3, alphas=(0.1, 1.5))
    same = identify(filters).kind == kinds
    assert same.mean() == pytest.approx(of_all, abs=0.012)
    assert same[kinds == DOG].mean() == pytest.approx(of_dog, abs=0.06)


def test_scales_survive_noise() -> None:
    filters, kinds, scales, *_ = planted(3000, 7, 0.1)
    found = identify(filters)
    same = found.kind == kinds
    assert np.median(np.abs(np.stack([found.scale_x, found.scale_y], 1) - scales)[same]) < 0.03
    assert found.residual.max() < 0.11


def test_a_single_tap_is_a_gaussian_of_scale_zero_also_with_noise() -> None:
    taps = np.zeros((500, 7, 7))
    taps[:, 3, 3] = 1
    error = np.random.default_rng(0).normal(size=taps.shape)
    taps[1:] += 0.1 * error[1:] / np.linalg.norm(error[1:], axis=(1, 2), keepdims=True)
    found = identify(taps)
    assert found.kind[0] == "Gaussian"
    assert found.scale_x[0] == found.scale_y[0] == 0
    assert found.residual[0] < 1e-7
    assert (found.kind == "Gaussian").mean() > 0.99


def test_the_laplacian_is_the_difference_of_gaussians_of_infinite_alpha() -> None:
    found = identify(-5 * member(DOG, 0.8, 0.8, np.inf)[None] + 2)
    assert found.name[0] == "negative difference of Gaussians"
    assert found.alpha[0] == np.inf
    assert found.scale_x[0] == found.scale_y[0] == pytest.approx(0.8, abs=1e-3)
    assert found.amplitude[0] == pytest.approx(-5, rel=1e-3)
    assert found.offset[0] == pytest.approx(2, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 1))
def test_no_member_is_nearer(seed: int, share: float) -> None:
    """Against a general minimiser started in many places, on filters far from and near to the family."""
    filters = planted(1, 7, share, seed)[0]
    [f] = filters
    found = identify(filters)
    [kind], [residual] = found.kind, found.residual

    def left(p: np.ndarray, name: str) -> float:
        g = member(name, p[0], p[0 if name == DOG else 1], np.tan(p[1]) if name == DOG else np.nan)
        g, centred = g - g.mean(), f - f.mean()
        return 1 - (g * centred).sum() ** 2 / (g**2).sum() / (centred**2).sum()

    rng = np.random.default_rng(seed)
    best = {}
    for name in (*PROFILES, DOG):
        upper = (2, np.pi / 2 - 1e-9) if name == DOG else (2, 2)
        starts = rng.uniform(0, upper, (30, 2))
        start = min(starts, key=lambda p: left(p, name))
        best[name] = minimize(left, start, (name,), bounds=[(0, limit) for limit in upper]).fun
    assert residual**2 <= best[kind] + 1e-5
    assert min(best.values()) >= residual**2 - 0.05**2 - 1e-5  # the margin of the difference of Gaussians
    if kind == DOG:
        assert min(best.values()) >= residual**2 - 1e-5


def test_the_published_keys_are_what_they_were_published_as() -> None:
    found = identify(mkf.keys.paper8())
    assert tuple(found.name) == PUBLISHED
    assert found.residual[[6, 7]].max() < 0.08


@pytest.mark.parametrize("method", ["A", "B", "C1", "C2", "D1", "D2"])
def test_the_analytic_keys(method: str) -> None:
    found = identify(mkf.keys.analytic(method))
    assert tuple(found.name) == PUBLISHED
    scales = SCALES[method]
    np.testing.assert_allclose([found.scale_x, found.scale_y], scales, atol=1e-3)
    assert found.alpha[6] == pytest.approx(0.5256, abs=1e-3)
    separable = [0, 1, 2, 3, 7]  # keys 5 and 6 are too wide for the window's border to be the background
    moments = np.stack([found.moment_scale_x, found.moment_scale_y])[:, separable]
    np.testing.assert_allclose(moments, np.array(scales)[:, separable], atol=0.01)


def test_the_published_file(data_dir: Path) -> None:
    assert tuple(identify(mkf.KeySet.load(data_dir / "keys" / "paper8.txt")).name) == PUBLISHED


def test_signs_have_names() -> None:
    keys = mkf.keys.analytic("B").filters
    assert identify(-keys).name.tolist() == [
        "one-sided difference in y, - below", "one-sided difference in x, - right",
        "one-sided difference in y, - above", "one-sided difference in x, - left",
        "central difference in x, + right", "central difference in y, + above",
        "negative difference of Gaussians", "negative Gaussian",
    ]  # fmt: skip


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("kind", [kind for kind in PROFILES if kind != "Gaussian"])
def test_turning_a_filter_turns_its_kind(kind: str, axis: str) -> None:
    turned = np.flip(member(kind, 0.6, 0.9, np.nan), 1 if axis == "x" else 0)
    [found] = identify(turned[None].copy()).kind
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    name, _, side = kind.partition(", ")
    assert found == (f"{name}, {opposite[side]}" if side and f"in {axis}" in name else kind)


def test_moments_are_a_second_estimate() -> None:
    filters, kinds, scales, *_ = planted(1000, 11, 0.0, seed=3)
    found = identify(filters)
    moments = np.stack([found.moment_scale_x, found.moment_scale_y], 1)
    none = np.stack([np.isin(kinds, [DOG, f"second difference in {axis}"]) for axis in "xy"], 1)
    assert (np.isnan(moments) == none).all()
    narrow = ~none & (scales.max(1, keepdims=True) < 1)
    assert np.abs(moments - scales)[narrow].max() < 0.02


def test_a_variance_that_does_not_grow_with_the_scale_tells_none() -> None:
    """In 3 x 3 a central difference has all its energy in the outer taps, at any scale."""
    for axis in "xy":
        found = identify(np.stack([member(f"central difference in {axis}", s, s, np.nan, 3) for s in (0.3, 0.6, 0.9)]))
        along, across = found.moment_scale_x, found.moment_scale_y
        if axis == "y":
            along, across = across, along
        assert np.isnan(along).all()
        assert np.isfinite(across).all()


def test_dead_and_broken_filters() -> None:
    filters = noise(6, 7, 7)
    filters[1], filters[2] = 0, -3.5
    filters[3, 0, 0], filters[4, 6, 6] = torch.nan, torch.inf
    found = identify(filters)
    assert found.index[[1, 2]].tolist() == [CONSTANT] * 2
    assert found.index[[3, 4]].tolist() == [-1] * 2
    assert found.kind[1:5].tolist() == found.name[1:5].tolist() == ["constant"] * 2 + ["not finite"] * 2
    assert found.offset[[1, 2]].tolist() == [0, -3.5]
    assert found.residual[[1, 2]].tolist() == found.amplitude[[1, 2]].tolist() == [0, 0]
    assert np.isnan(found.residual[3:5]).all()
    assert np.isnan(found.scale_x[1:5]).all()
    assert found.sign[1:5].tolist() == [0] * 4
    alone = identify(filters[[0, 5]])
    assert found.index[[0, 5]].tolist() == alone.index.tolist()
    assert found.residual[[0, 5]].tolist() == pytest.approx(alone.residual.tolist(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_tiny_and_huge_filters(scale: float) -> None:
    keys = mkf.keys.analytic("B")
    assert identify(keys.filters.double() * scale).index.tolist() == identify(keys).index.tolist()


@pytest.mark.parametrize("scale", [1e-170, 1e-50, 1e50, 1e160, 1e300])
@pytest.mark.filterwarnings("error")
def test_filters_beyond_the_range_of_float32(scale: float) -> None:
    """Amplitude and offset are held at the range's ends, so that the sign is still the filter's."""
    filters = np.stack([member(kind, 0.8, 0.9, np.nan) for kind in PROFILES] * 2)
    filters[len(PROFILES) :] *= -1
    filters = np.concatenate([filters, np.full((1, 7, 7), 2.0)])
    wanted, found = identify(filters), identify(filters * scale)
    assert found.name.tolist() == wanted.name.tolist()
    for name in ("scale_x", "scale_y", "residual", "moment_scale_x", "moment_scale_y"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-5)
    assert (found.sign == wanted.sign).all()
    assert np.isfinite(found.amplitude).all()
    assert np.isfinite(found.offset).all()
    limits = np.finfo(np.float32)
    beyond = (limits.tiny if scale < 1 else limits.max) * wanted.sign[:-1]
    assert found.amplitude[:-1].tolist() == beyond.tolist()


@pytest.mark.parametrize("power", [-30, 40])
def test_powers_of_two_change_nothing_but_amplitude_and_offset(power: int) -> None:
    filters = planted(200, 5, 0.1)[0]
    wanted, found = identify(filters), identify(filters * 2.0**power)
    for name in ("index", "scale_x", "scale_y", "alpha", "residual", "moment_scale_x"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for name in ("amplitude", "offset"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name) * np.float32(2.0**power))


def test_everything_is_made_where_the_filters_are() -> None:
    """What is made elsewhere, as a CUDA filter's results on the CPU, stands here on torch's device without values."""
    filters = torch.cat([torch.from_numpy(planted(60, 7, 0.1)[0]), torch.ones(1, 7, 7), torch.full((1, 7, 7), np.nan)])
    wanted = identify(filters)  # which also makes the grids
    with torch.device("meta"):
        found = identify(filters)
    for name in ("index", "scale_x", "scale_y", "alpha", "amplitude", "offset", "residual", "moment_scale_x"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    filters = torch.from_numpy(planted(300, 7, 0.1)[0])
    wanted, found = identify(filters), identify(filters.cuda())
    assert found.index.tolist() == wanted.index.tolist()
    for name in ("scale_x", "scale_y", "amplitude", "offset", "residual"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert tuple(identify(mkf.keys.paper8().filters.to(dtype)).name) == PUBLISHED


def test_sources_are_alike(tmp_path: Path) -> None:
    filters = noise(70, 7, 7)
    bank = bank_of(filters)
    bank.save(tmp_path / "bank")
    wanted = identify(filters)
    transposed = filters.mT.contiguous().mT  # the same values with other strides
    for other in (filters.numpy(), filters.flatten(1), transposed, bank, FilterBank.open(tmp_path / "bank")):
        found = identify(other)
        assert len(found) == 70
        for name in ("index", "scale_x", "scale_y", "amplitude", "offset", "residual"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    filters, seen = noise(50, 5, 5), []
    wanted = identify(filters)
    monkeypatch.setattr("mkf.analysis.identification._ROWS", 16)
    found = identify(filters, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert found.index.tolist() == wanted.index.tolist()


def test_no_filters_are_nothing() -> None:
    assert len(identify(torch.empty(0, 7, 7))) == 0


def test_the_smallest_window() -> None:
    """In 3 x 3 kinds overlap, and the first one is told; whatever it is, it fits."""
    filters, kinds, *_ = planted(500, 3, 0.0)
    found = identify(filters)
    assert found.residual.max() < 1e-3
    one_sided = np.char.startswith(kinds, "one-sided")
    assert (found.kind == kinds)[one_sided].all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected"):
        identify(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match="convert them"):
        identify(torch.zeros(3, 7, 7, dtype=torch.int32))
    with pytest.raises(ValueError, match="mixes kernel sizes"):
        identify(bank_of(noise(2, 7, 7), noise(2, 5, 5)))
    with pytest.raises(ValueError, match="empty"):
        identify(bank_of(noise(2, 7, 7)).select(model="none"))


def test_real_filters(data_dir: Path) -> None:
    bank = FilterBank.from_checkpoint(data_dir / "filters" / "trained_k7.safetensors")
    found = identify(bank)
    assert (found.index == CONSTANT).sum() == 6
    by_kind = dict(zip(*np.unique(found.kind, return_counts=True), strict=True))
    assert by_kind["Gaussian"] + by_kind[DOG] > 1200
    assert set(by_kind) <= set(NAMES)
    # The family holds filters that the keys do not, so it is nearer than any of the eight analytic ones.
    fit = mkf.affine_fit(bank, mkf.keys.analytic("B"))
    assert (found.residual <= fit.residual.numpy() + 0.05).all()
    assert found.residual.mean() < fit.residual.mean() - 0.1
