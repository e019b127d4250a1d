"""The page's download of every filter's fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from mkf.ops.affine_fit import affine_fit

if TYPE_CHECKING:
    from mkf.bank import FilterBank
    from mkf.keys import KeySet

FORMAT = "mkf.fits/1"

MOST_FILTERS = 100_000
"""Fits of more filters are not put into a page; as base64 so many are about 2.4 MB."""


def fits_file(bank: FilterBank, keys: KeySet) -> bytes:
    """The fits of a bank's filters to the keys, f ~ scale * key + shift, as a safetensors file.

    Six tensors of N entries, a filter each in the bank's order: `index` (int16, counted from 0, -1 where a filter is
    not finite), `scale`, `shift` and `residual` (float32, relative to the stored keys, as `mkf.affine_fit` returns
    them), `layer` and `channel` (unsigned, of the smallest type that holds them). The metadata has `format`
    "mkf.fits/1", and `layers`, a JSON list of [model, layer] that `layer` counts in from 0.

    Args:
        bank: Filters of the keys' size.
        keys: At most 256.
    """
    from safetensors.numpy import save

    model, layer = (bank.metadata[name].combine_chunks().dictionary_encode() for name in ("model", "layer"))
    code = model.indices.to_numpy().astype(np.int64) * len(layer.dictionary) + layer.indices.to_numpy()
    codes, number = np.unique(code, return_inverse=True)
    names = [
        [model.dictionary[int(m)].as_py(), layer.dictionary[int(n)].as_py()]
        for m, n in zip(*np.divmod(codes, len(layer.dictionary)), strict=True)
    ]
    fit = affine_fit(bank, keys)
    tensors = {
        "index": fit.index.numpy().astype(np.int16),
        **{name: getattr(fit, name).numpy() for name in ("scale", "shift", "residual")},
        "layer": _small(number),
        "channel": _small(bank.metadata["channel"].to_numpy()),
    }
    content: bytes = save(tensors, {"format": FORMAT, "layers": json.dumps(names)})
    return content


def _small(numbers: np.ndarray) -> np.ndarray:
    """The same whole numbers, at least 0, in the smallest unsigned type."""
    return numbers.astype(np.min_scalar_type(int(numbers.max())))
