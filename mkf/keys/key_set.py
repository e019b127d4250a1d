"""KeySet: a handful of filters, checked, scaled and named."""

import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mkf.kernels.key_conv2d import KeyPlan, structure
from mkf.kernels.key_conv2d.plan import make_plan
from mkf.keys import storage

KERNEL_SIZES = (3, 5, 7, 9, 11)
MAX_KEYS = 256  # an index into a key set fits one byte

# A key whose variation is a smaller part of it than this is refused: rounded to float32, its centred version would
# be wrong by up to 2^-24 / 2^-16 = 0.4 %.
MIN_VARIATION = 2.0**-16


class KeySet:
    """An immutable set of K keys, each a k x k filter; a filter f is fitted as f ~ scale * key + shift.

    Each key is kept as it is given but for one positive factor, chosen so that the *centred* key has L2 norm 1:

        key = given / ||given - mean(given)||

    It is not centred, so that a separable key stays separable: `centred()` gives the centred keys. The factor is
    computed in float64. Keys in float32 that are scaled already, to its rounding, are kept bit for bit.

    Args:
        filters: (K, k, k) tensor or array of real numbers, row-major, 1 <= K <= 256, k odd, 3 to 11.
        names: K different words; "1" to "K" where none are given.
        kinds: K descriptions in words, empty where none are given.
        provenance: Where the keys come from.
        licence: Their licence, best as an SPDX identifier; empty where none is known.

    Raises:
        ValueError: Another shape, a value that is not finite, a key that is constant or so nearly constant that float32
            cannot hold its variation, or names or kinds that do not match the keys.
    """

    def __init__(
        self,
        filters: torch.Tensor | ArrayLike,
        names: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        provenance: str = "",
        licence: str = "",
    ) -> None:
        values = _as_float64(filters)
        check_size(len(values), values.shape[-1])
        self._names = _labels("names", names, default=[str(i + 1) for i in range(len(values))])
        self._kinds = _labels("kinds", kinds, default=[""] * len(values))
        self._provenance = provenance
        self._licence = licence
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"names must differ from each other, got {', '.join(self._names)}")
        self._filters = torch.from_numpy(_scaled(values, self._names))

    @property
    def filters(self) -> torch.Tensor:
        """The keys, (K, k, k) float32 on the CPU; a copy, so that writing to it does not change the set."""
        return self._filters.clone()

    @property
    def names(self) -> tuple[str, ...]:
        """K different words."""
        return self._names

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each key is, in words; empty where nobody said."""
        return self._kinds

    @property
    def provenance(self) -> str:
        """Where the keys come from."""
        return self._provenance

    @property
    def licence(self) -> str:
        """The licence of the keys; empty where none is known."""
        return self._licence

    @property
    def kernel_size(self) -> int:
        """The k of k x k."""
        return self._filters.shape[-1]

    def centred(self) -> torch.Tensor:
        """The keys with mean 0 and L2 norm 1, (K, k, k) float32; computed in float64."""
        centred = _centred(self._float64())
        return torch.from_numpy((centred / _norms(centred)).astype(np.float32))

    @cached_property
    def structure(self) -> tuple[structure.Structure, ...]:
        """For each key the cheapest sum of separable terms, a box and a single tap that equals it to float32 rounding.

        Found numerically in the keys as they are stored, on first use; see `mkf.keys.Structure`.
        """
        return tuple(structure.find(key) for key in self._float64())

    def plan(self, tolerance: float = 0.0) -> KeyPlan:
        """How a convolution with these keys is cheapest: `print(keys.plan())` shows multiply-adds per output and error.

        It is what `mkf.ops.key_conv2d` computes by, found anew at each call. See `mkf.kernels.key_conv2d.KeyPlan`.

        Args:
            tolerance: The largest relative L2 error that a key may be described with, in [0, 1). With 0 it is exact to
                float32 rounding, which saves nothing for keys that are not separable, such as the published ones.
        """
        return make_plan(self._filters, tolerance)

    def rank_residuals(self) -> torch.Tensor:
        """How well sums of r separable terms approximate each key, (K, k) float64.

        Entry [i, r - 1] is min ||key_i - A|| over all A of rank r, which is sqrt(sum of sigma_j^2 over j > r) with
        sigma the singular values of the stored key. As a centred key has norm 1, it is relative to that norm.
        """
        return torch.from_numpy(structure.rank_residuals(self._float64()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KeySet":
        """Read a file that `save` wrote, or the text format that the eight published keys come in.

        The text has a line `Filter NAME:` before the k rows of k numbers of each key. What the file is, is decided by
        its content. Text says nothing about kinds and licence, so these stay empty.

        Raises:
            ValueError: A damaged file or one of another format, naming the file and, in a text, the line.
            OSError: The file cannot be read.
        """
        contents = storage.read(path)
        try:
            return cls(**contents._asdict())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `load` restores exactly: tensor `filters`, all else as metadata.

        The file appears at once and whole: one that was there before survives a write that fails.

        Raises:
            OSError: The folder does not exist or cannot be written.
        """
        storage.write(
            path, storage.Contents(self._filters.numpy(), self.names, self.kinds, self.provenance, self.licence)
        )

    def __len__(self) -> int:
        return len(self._filters)

    def __getitem__(self, which: int | slice | Sequence[int]) -> "KeySet":
        """The key set of some of the keys, which keep their names: `keys[6]`, `keys[:4]`, `keys[[0, 6]]`."""
        chosen = np.atleast_1d(np.arange(len(self))[which]).tolist()
        return KeySet(
            self._filters[chosen],
            [self.names[i] for i in chosen],
            [self.kinds[i] for i in chosen],
            self.provenance,
            self.licence,
        )

    def __iter__(self) -> Iterator["KeySet"]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySet) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        k = self.kernel_size
        shown = list(self.names) if len(self) <= 16 else [*self.names[:8], "...", self.names[-1]]
        source = f" from {self.provenance}" if self.provenance else ""
        return f"<KeySet of {len(self)} {k}x{k} {'key' if len(self) == 1 else 'keys'} ({', '.join(shown)}){source}>"

    def _float64(self) -> NDArray[np.float64]:
        return self._filters.numpy().astype(np.float64)

    def _identity(self) -> tuple[object, ...]:
        bits = self._filters.numpy().tobytes()
        return self._filters.shape, bits, self.names, self.kinds, self.provenance, self.licence


def check_size(count: int, kernel_size: int) -> None:
    """Refuse, with a ValueError, a number of keys or a kernel size that a key set cannot have."""
    if kernel_size not in KERNEL_SIZES:
        raise ValueError(
            f"keys of {kernel_size}x{kernel_size}: the kernel size must be 3, 5, 7, 9 or 11; crop or pad them"
        )
    if not 1 <= count <= MAX_KEYS:
        raise ValueError(f"a key set holds 1 to {MAX_KEYS} keys, got {count}: select some of them")


def _as_float64(filters: torch.Tensor | ArrayLike) -> NDArray[np.float64]:
    """The keys as a float64 array (K, k, k)."""
    try:
        if filters.is_complex() if isinstance(filters, torch.Tensor) else np.iscomplexobj(filters):
            raise TypeError("they are complex")
        if isinstance(filters, torch.Tensor):
            filters = filters.cpu().to(torch.float64).numpy(force=True)
        if filters is None:
            raise TypeError("this is None; mkf.keys.paper8() are those of the paper")
        if isinstance(filters, str):
            raise TypeError("this is a word; mkf.keys.parse(word) makes keys of those that the command line takes")
        values = np.array(filters, dtype=np.float64, order="C")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"keys must be real numbers of shape (K, k, k): {error}") from error
    if values.ndim != 3 or values.shape[1] != values.shape[2]:
        raise ValueError(f"keys must have the shape (K, k, k), got {values.shape}{_shape_advice(values.shape)}")
    return values


def _shape_advice(shape: tuple[int, ...]) -> str:
    match shape:
        case (height, width) if height == width:
            return ": give a single key as filters[None]"
        case (_, area) if math.isqrt(area) ** 2 == area:
            return f": reshape flat keys with filters.reshape(-1, {math.isqrt(area)}, {math.isqrt(area)})"
        case (_, 1, _, _):
            return ": take the filters of a depthwise weight with weight[:, 0]"
        case _:
            return ""


def _labels(what: str, labels: Sequence[str] | None, default: list[str]) -> tuple[str, ...]:
    """One word per key, the default where none are given."""
    if labels is None:
        return tuple(default)
    is_list = isinstance(labels, Sequence) and not isinstance(labels, str)
    if not is_list or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{what} must be a list of strings, got {labels!r}")
    if len(labels) != len(default):
        raise ValueError(f"{what} must hold one string for each of the {len(default)} keys, got {len(labels)}")
    return tuple(labels)


def _scaled(values: NDArray[np.float64], names: Sequence[str]) -> NDArray[np.float32]:
    """Each key divided by the norm of its centred version, unless it is a float32 one whose norm is 1 to rounding."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    finite = np.isfinite(rounded).all((1, 2))
    if not finite.all():
        bad = names[int(np.argmin(finite))]
        raise ValueError(
            f"key {bad} has values that are not finite in float32 (NaN or infinity): repair or leave it out"
        )
    size = _norms(values)
    variation = _norms(_centred(values))
    varies = (variation > MIN_VARIATION * size)[:, 0, 0]
    for name, key, key_varies in zip(names, values, varies, strict=True):
        if key.min() == key.max():
            raise ValueError(f"key {name} is constant: leave it out, a constant is what `shift` stands for")
        if not key_varies:
            raise ValueError(
                f"key {name} is constant to within 2^-16 of its norm, too little for float32 to hold what varies: "
                "subtract the mean first, filters - filters.mean((1, 2), keepdims=True), or leave the key out"
            )
    # Rounding each tap of a scaled key by at most half of eps moves the norm by no more than this; a key with a large
    # offset and more digits than float32 has was not rounded, so that its norm tells whether it is scaled.
    is_scaled = (values == rounded).all((1, 2), keepdims=True)
    is_scaled &= np.abs(variation - 1) <= np.finfo(np.float32).epsneg * size
    return np.where(is_scaled, values, values / variation).astype(np.float32)


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    centred: NDArray[np.float64] = values - values.mean((1, 2), keepdims=True)
    return centred


def _norms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The L2 norm of each key, shape (K, 1, 1)."""
    norms: NDArray[np.float64] = np.linalg.norm(values, axis=(1, 2), keepdims=True)
    return norms
