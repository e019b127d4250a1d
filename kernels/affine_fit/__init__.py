"""Implementations of `mkf.ops.affine_fit`.

Each module has `why_not(device)` and

    affine_fit(filters, keys, positive, index, scale, shift, residual)

with `filters` (N, k, k) in float32, float64, bfloat16 or float16 and with any strides, N >= 1, `keys` a `FitKeys` on
the same device, and four contiguous outputs (N, m), int32 and three times float32, for the m best keys.
"""

from typing import NamedTuple

from torch import Tensor


class FitKeys(NamedTuple):
    """Keys as a fit needs them.

    Attributes:
        unit: (K, k*k) float32, the keys centred and divided by their norm.
        inverse_norm: (K,) float32, 1 / norm of the centred key as the caller holds it.
        mean: (K,) float32, mean of the key as the caller holds it.
    """

    unit: Tensor
    inverse_norm: Tensor
    mean: Tensor
