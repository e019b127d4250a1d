"""Implementations of `mkf.ops.affine_fit`.

Each module has `why_not(device)` and

    affine_fit(filters, keys, positive, index, scale, shift, residual)

with `filters` (N, k, k) in float32, float64, bfloat16 or float16 and with any strides, N >= 1, `keys` a `FitKeys` on
the same device, and four contiguous outputs (N, m), int32 and three times float32, for the m best keys.
"""

from typing import Any, NamedTuple

from torch import Tensor

from mkf.kernels.extension import DTYPES


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


def problem(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> dict[str, Any]:
    """The same as addresses, sizes and strides: the arguments that the extension's functions have in common."""
    count, best = index.shape
    return {
        "filters": filters.data_ptr(),
        "dtype": DTYPES[filters.dtype],
        "count": count,
        "stride": filters.stride(0),
        "row_stride": filters.stride(1),
        "col_stride": filters.stride(2),
        "k": filters.shape[1],
        "keys": keys.unit.data_ptr(),
        "inverse_norms": keys.inverse_norm.data_ptr(),
        "key_means": keys.mean.data_ptr(),
        "keys_count": len(keys.unit),
        "best": best,
        "positive": positive,
        "index": index.data_ptr(),
        "scale": scale.data_ptr(),
        "shift": shift.data_ptr(),
        "residual": residual.data_ptr(),
    }
