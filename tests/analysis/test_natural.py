"""Eigenvectors of patches against a direct computation, and what they look like on a real picture."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mkf
from mkf.analysis import identify, match, natural_keys, reconstruct


def picture(height: int = 60, width: int = 50, seed: int = 0) -> np.ndarray:
    """Smooth noise."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.normal(size=(height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    return np.fft.irfft2(spectrum / frequency, (height, width)) * 40 + 128


@pytest.mark.parametrize(("size", "sigma"), [(3, 0.8), (7, 1.0)])
def test_against_a_loop(size: int, sigma: float) -> None:
    image = picture(75, 31)  # more rows than are read at a time
    found = natural_keys(image, size, sigma, n=4)
    r, c = np.mgrid[:size, :size] - size // 2
    window = np.exp(-(r**2 + c**2) / (2 * sigma**2))
    rows = []
    for top in range(75 - size + 1):
        for left in range(31 - size + 1):
            patch = image[top : top + size, left : left + size]
            rows.append(((patch - patch.mean()) * window).ravel())
    variance, vectors = np.linalg.eigh(np.cov(np.array(rows).T, bias=True) + np.outer(*[np.mean(rows, 0)] * 2))
    np.testing.assert_allclose(found.variance, variance[::-1].clip(0), atol=1e-8 * variance.max())
    assert found.share.sum() == pytest.approx(1)
    assert np.abs(match(found.keys, vectors[:, ::-1].T[:4].reshape(4, size, size)).cosine).min() > 1 - 1e-6
    flat = found.keys.filters.flatten(1).numpy()
    assert (np.take_along_axis(flat, np.abs(flat).argmax(1)[:, None], 1) > 0).all()


def test_the_cameraman_resembles_keys_five_six_and_eight() -> None:
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("the default picture comes with scikit-image, which is not installed")
    found = natural_keys()
    kinds = [name.partition(",")[0] for name in identify(found.keys).name[:3]]
    assert kinds == ["Gaussian", "central difference in x", "central difference in y"]
    pairs = match(found.keys[:3], mkf.keys.paper8()[4:])
    assert pairs.second.tolist() == [3, 0, 1]
    assert np.abs(pairs.cosine).min() > 0.89
    rebuilt = reconstruct(None, found.keys)
    assert rebuilt.image.shape == (510, 510)
    assert 26 < rebuilt.psnr < 27


def test_all_keys_rebuild_the_image() -> None:
    image = picture()
    everything = natural_keys(image, 5, n=24).keys
    rebuilt = reconstruct(image, everything)
    assert rebuilt.original.shape == (60, 50)
    np.testing.assert_allclose(rebuilt.image, rebuilt.original, atol=1e-3)


def test_a_reconstruction_is_the_nearest() -> None:
    image, keys = picture(23, 17), mkf.keys.paper8()
    rebuilt = reconstruct(image, keys)
    assert rebuilt.image.shape == (20, 15)
    basis = np.column_stack([keys.filters.double().numpy()[:, 1:6, 1:6].reshape(8, -1).T, np.ones(25)])
    basis[:, :8] -= basis[:, :8].mean(0)
    patch = image[5:10, 10:15].ravel()
    nearest = basis @ np.linalg.lstsq(basis, patch)[0]
    np.testing.assert_allclose(rebuilt.image[5:10, 10:15].ravel(), nearest, atol=1e-6)
    error = np.square(rebuilt.image - image[:20, :15]).mean()
    assert rebuilt.psnr == pytest.approx(10 * np.log10(np.ptp(image[:20, :15]) ** 2 / error))
    assert rebuilt.psnr > reconstruct(image, keys[:4]).psnr


def test_dependent_keys_rebuild_no_more_than_those_they_depend_on() -> None:
    image, two = picture(), mkf.keys.paper8()[[0, 4]].filters
    mixed = torch.randn(46, 2, generator=torch.Generator().manual_seed(0)) @ two.flatten(1)
    keys = mkf.KeySet(torch.cat([two, mixed.view(-1, 7, 7)]))
    assert reconstruct(image, keys).psnr == pytest.approx(reconstruct(image, mkf.KeySet(two)).psnr, abs=1e-3)
    tiny = mkf.KeySet(two * torch.tensor([1, 1e-12])[:, None, None])  # a key's size is no matter
    assert reconstruct(image, tiny).psnr == pytest.approx(reconstruct(image, mkf.KeySet(two)).psnr, abs=1e-3)


def test_images_of_all_sorts(tmp_path: Path) -> None:
    grey = picture(40, 30).clip(0, 255).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wanted = natural_keys(grey)
    assert natural_keys(tmp_path / "grey.png").variance == pytest.approx(wanted.variance)
    assert "grey.png" in natural_keys(str(tmp_path / "grey.png")).keys.provenance
    assert natural_keys(np.repeat(grey[:, :, None], 3, 2)).variance == pytest.approx(wanted.variance)
    Image.fromarray(np.repeat(grey[:, :, None], 3, 2)).save(tmp_path / "colour.png")
    assert natural_keys(tmp_path / "colour.png").variance == pytest.approx(wanted.variance)


def test_pictures_of_16_bits_in_either_order_of_bytes(tmp_path: Path) -> None:
    deep = (picture(40, 30) * 200).clip(0, 65535).astype(np.uint16)
    wanted = natural_keys(deep)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        path = tmp_path / "deep.tif"
        Image.frombytes(mode, (30, 40), deep.astype(order).tobytes()).save(path)
        with Image.open(path) as opened:
            assert opened.mode == mode
        assert natural_keys(path).variance == pytest.approx(wanted.variance)
        assert (reconstruct(path, wanted.keys).original == deep[:40, :30]).all()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture()
    for bad, said in (
        (image[:6], "smaller than a patch"),
        (np.ones((20, 20)), "flat"),
        (image * np.nan, "NaN"),
        (np.zeros((2, 20, 20, 3)), "expected"),
    ):
        with pytest.raises(ValueError, match=said):
            natural_keys(bad)
    for options, said in (({"size": 4}, "kernel size"), ({"sigma": 0}, "sigma"), ({"size": 3, "n": 9}, "dimensions")):
        with pytest.raises(ValueError, match=said):
            natural_keys(image, **options)
    for crop in (4, 9, 1):
        with pytest.raises(ValueError, match="crop"):
            reconstruct(image, mkf.keys.paper8(), crop)
    with pytest.raises(FileNotFoundError):
        natural_keys(tmp_path / "none.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mkf\[images\]"):
        natural_keys()
    assert "skimage" not in sys.modules
