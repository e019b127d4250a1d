"""The keys of natural images: leading eigenvectors of small patches, and images put together from them."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mkf.keys import KeySet
from mkf.keys.key_set import check_size

Image = NDArray[np.float64]

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_ROWS = 64  # of an image at a time: what is kept of its patches stays small


@dataclass(frozen=True, eq=False)
class NaturalKeys:
    """Leading eigenvectors of the patches of an image.

    Attributes:
        keys: The n eigenvectors of largest eigenvalue, as keys (n, k, k).
        variance: All k * k eigenvalues, descending, float64, in squared grey levels.
    """

    keys: KeySet
    variance: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """Each eigenvector's share of the variance, (k * k,), of sum 1."""
        share: NDArray[np.float64] = self.variance / self.variance.sum()
        return share


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An image put together from keys.

    Attributes:
        image: (H, W) float64, H and W cut to whole patches.
        original: The same part of the image itself.
    """

    image: Image
    original: Image

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB, the peak being the original's range."""
        error = float(np.square(self.image - self.original).mean())
        return float(10 * np.log10(np.ptp(self.original) ** 2 / error)) if error else float("inf")


def natural_keys(image: Any = None, size: int = 7, sigma: float = 1.0, n: int = 8) -> NaturalKeys:
    """The leading eigenvectors of an image's patches under a Gaussian window.

    From every size x size patch p (one at each pixel) its mean is subtracted, and the rest weighted by the window
    w = exp(-(r^2 + c^2) / (2 sigma^2)), r and c counted from the centre: x = w (p - mean(p)). The keys are the
    eigenvectors of mean(x x^T) with the largest eigenvalues, each with its largest tap positive. Their authors
    found those of any natural image to resemble keys 5 to 8; that the mean goes before the window is our reading.

    Args:
        image: (H, W) grey or (H, W, 3) colour values, which are made grey by ITU-R BT.601; the path of a picture; or
            None for the cameraman that scikit-image brings (the extra `images`; nothing is downloaded).
        size: k, odd, 3 to 11.
        sigma: Standard deviation of the window in pixels.
        n: How many eigenvectors.

    Raises:
        ValueError: An image smaller than a patch, flat, not finite or of another shape; size, sigma or n out of range.
        ImportError: No image is given and scikit-image is not installed.
        OSError: The picture cannot be read.

    Source: the review discussion of "The Quest for Universal Master Key Filters in DS-CNNs" (NeurIPS 2025).
    """
    check_size(n, size)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma={sigma}: the window needs a positive width in pixels")
    if n > size**2 - 1:
        raise ValueError(f"n={n}: patches of {size}x{size} without their mean have {size**2 - 1} dimensions")
    grey, name = _grey(image)
    if min(grey.shape) < size:
        raise ValueError(f"the image is {grey.shape[0]}x{grey.shape[1]}: smaller than a patch of {size}x{size}")
    if np.ptp(grey) == 0:
        raise ValueError("the image is flat: its patches have no variance")
    r = np.arange(size) - size // 2
    window = np.exp(-(r[:, None] ** 2 + r**2) / (2 * sigma**2)).ravel()
    moment, count = np.zeros((size**2, size**2)), 0
    for start in range(0, len(grey) - size + 1, _ROWS):
        rows = grey[start : start + _ROWS + size - 1]
        patches = np.lib.stride_tricks.sliding_window_view(rows, (size, size)).reshape(-1, size**2)
        x = (patches - patches.mean(1, keepdims=True)) * window
        moment += x.T @ x
        count += len(x)
    variance, vectors = np.linalg.eigh(moment / count)
    leading = vectors[:, ::-1].T[:n]
    largest = np.take_along_axis(leading, np.abs(leading).argmax(1)[:, None], 1)
    keys = KeySet(
        (leading * np.sign(largest)).reshape(n, size, size),
        kinds=[f"eigenvector {i + 1} of natural patches" for i in range(n)],
        provenance=f"eigenvectors of {size}x{size} patches of {name} under a Gaussian window of sigma {sigma:g}",
    )
    return NaturalKeys(keys, variance[::-1].clip(min=0))


def reconstruct(image: Any, keys: KeySet, crop: int = 5) -> Reconstruction:
    """Put an image together from keys: each patch is its mean plus the nearest linear combination of all keys.

    The keys are cropped to their central crop x crop and centred; the patches do not overlap, and rows and columns left
    over at the lower and right border are cut off. Of keys that depend on one another to float32's rounding only what
    is independent counts.

    Args:
        image: As `natural_keys` takes it.
        keys: K keys of k x k, k >= crop.
        crop: Side of a patch, odd.

    Raises:
        ValueError: A crop that is even or larger than the keys, or an image smaller than a patch.
    """
    k = keys.kernel_size
    if crop % 2 == 0 or not 1 < crop <= k:
        raise ValueError(f"crop={crop}: use an odd number from 3 to the keys' {k}")
    grey, _ = _grey(image)
    height, width = (side // crop for side in grey.shape)
    if not height * width:
        raise ValueError(f"the image is {grey.shape[0]}x{grey.shape[1]}: smaller than a patch of {crop}x{crop}")
    edge = (k - crop) // 2
    basis = keys.centred().double().numpy()[:, edge : k - edge, edge : k - edge].reshape(len(keys), -1)
    basis = basis - basis.mean(1, keepdims=True)
    rounding = np.finfo(np.float32).eps * max(basis.shape)  # what dependent keys have left beside one another
    original = grey[: height * crop, : width * crop]
    patches = original.reshape(height, crop, width, crop).swapaxes(1, 2).reshape(-1, crop**2)
    mean = patches.mean(1, keepdims=True)
    nearest = mean + (patches - mean) @ (np.linalg.pinv(basis, rcond=rounding) @ basis)
    rebuilt = nearest.reshape(height, width, crop, crop).swapaxes(1, 2).reshape(original.shape)
    return Reconstruction(rebuilt, original)


def default_image() -> Path:
    """The cameraman, 512 x 512 grey, among scikit-image's files; only found, so nothing is imported or downloaded.

    Raises:
        ImportError: scikit-image is not installed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise ImportError("the default picture comes with scikit-image: pip install 'mkf[images]', or give an image")
    return Path(found.origin).parent / "data" / "camera.png"


def _grey(image: Any) -> tuple[Image, str]:
    """An image as float64 (H, W), and what to call it."""
    name = "an image"
    if image is None:
        image = default_image()
    if isinstance(image, str | os.PathLike):
        from PIL import Image as Pictures

        path, name = Path(image), Path(image).name
        with Pictures.open(path) as picture:
            # Numpy reads 16 bits in either order of bytes, where Pillow's own conversion would clip some to 255.
            grey = picture.mode in ("L", "I", "F") or picture.mode.startswith("I;16")
            image = np.asarray(picture if grey else picture.convert("RGB"))
    values = np.asarray(image, np.float64)
    if values.ndim == 3 and values.shape[2] == 3:
        values = values @ np.array(_GREY)
    if values.ndim != 2:
        raise ValueError(f"the image has shape {values.shape}: expected (H, W), or (H, W, 3) for colours")
    if not np.isfinite(values).all():
        raise ValueError("the image holds NaN or infinity")
    return values, name
