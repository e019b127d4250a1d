"""What the page's script draws: keys, members of the family, and the atlas of filters in 8 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mkf.analysis.identification import Identification
from mkf.analysis.natural import NaturalKeys
from mkf.analysis.page.text import base64_text
from mkf.analysis.statistics import SampledFilters, key_labels
from mkf.keys.family import KINDS

if TYPE_CHECKING:
    from mkf.analysis.statistics import Analysis

ATLAS_BYTES = 1_600_000
"""Bytes of filters in the atlas, before base64 makes them a third longer; so a page stays below about 6 MB."""

MOST_PER_CELL = 48
"""Filters of one layer and key in the atlas, at most."""


def atlas_size(layers: int, keys: int, k: int) -> int:
    """How many filters of each layer and key a page has room for, 1 to `MOST_PER_CELL`."""
    return min(MOST_PER_CELL, max(1, ATLAS_BYTES // ((k * k + 6) * max(layers * keys, 1))))


def script_data(analysis: Analysis, found: Identification | None, natural: NaturalKeys | None) -> dict[str, Any]:
    """The JSON document that the script reads; filters are `k * k` numbers row by row."""
    keys = analysis.keys
    models, samples = [], []
    for model in analysis.models:
        layers = []
        for layer in model.layers:
            sampled = [0] * len(keys) if layer.sample is None else np.bincount(layer.sample.index, minlength=len(keys))
            layers.append({"name": layer.layer, "sampled": [int(count) for count in sampled]})
            if layer.sample is not None:
                samples.append(layer.sample.take(np.argsort(layer.sample.index, kind="stable")))
        models.append({"name": model.model, "layers": layers})
    labels = key_labels(keys)
    data = {
        "k": keys.kernel_size,
        "names": [f"{number} {label}" for number, label in enumerate(labels, 1)],
        "keys": _unit(keys.filters.numpy()),
        "models": models,
        "atlas": {"filters": "", "residual": "", "channel": "", "positive": ""},
    }
    if samples:
        sample = SampledFilters.join(samples)
        flat = sample.filters.reshape(len(sample), keys.kernel_size**2).astype(np.float64)
        flat = (flat - flat.mean(1, keepdims=True)) * np.where(sample.scale < 0, -1, 1)[:, None]
        levels = np.rint(127 * flat / np.abs(flat).max(1, keepdims=True)).astype(np.int8)
        data["atlas"] = {
            "filters": base64_text(levels.tobytes()),
            "residual": base64_text(np.rint(255 * sample.residual).astype(np.uint8).tobytes()),
            "channel": base64_text(sample.channel.astype("<u4").tobytes()),
            "positive": base64_text((sample.scale > 0).astype(np.uint8).tobytes()),
        }
    if found is not None:
        data["kinds"] = _unit(_kind_members(found, keys.kernel_size))
    if natural is not None:
        data["natural"] = _unit(natural.keys.filters.numpy())
    return data


def _kind_members(found: Identification, k: int) -> Any:
    """For each kind the member at the median scales of its filters, (kinds, k, k)."""
    members = np.zeros((len(KINDS), k, k))
    for number, kind in enumerate(KINDS):
        of_kind = found.index == number
        if of_kind.any():
            s_x, s_y = (float(np.median(x[of_kind])) for x in (found.scale_x, found.scale_y))
            alpha = float(np.median(found.alpha[of_kind]))
            second = s_y**2 if kind.separable else 1.0 if alpha == math.inf else alpha / (1 + alpha)
            members[number] = kind.members(torch.tensor([[s_x**2, second]], dtype=torch.float64), k)[0, 0].numpy()
    return members


def _unit(filters: Any) -> list[list[float]]:
    """Filters centred and of norm 1, as lists of k * k numbers of three decimals; zero stays zero."""
    flat = filters.reshape(len(filters), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    return [[round(x, 3) for x in row] for row in (flat / np.where(norm > 0, norm, 1)).tolist()]
