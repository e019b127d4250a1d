"""The affine fit in plain float64 numpy, written apart from mkf, and the rule by which a fit agrees with it."""

import numpy as np

FLOAT32 = np.finfo(np.float32).eps


def line_of_best_key(filters, keys, positive=False):
    """All quantities for every (filter, key) pair, by the textbook formulas of a least-squares line."""
    y = np.asarray(filters, np.float64).reshape(len(filters), 1, -1)
    x = np.asarray(keys, np.float64).reshape(1, len(keys), -1)
    x_mean, y_mean = x.mean(2, keepdims=True), y.mean(2, keepdims=True)
    a = ((x - x_mean) * (y - y_mean)).sum(2) / ((x - x_mean) ** 2).sum(2)
    if positive:
        a = np.maximum(a, 0)
    b = y_mean[..., 0] - a * x_mean[..., 0]
    error = np.sqrt(((y - a[..., None] * x - b[..., None]) ** 2).sum(2))
    return a, b, error / np.sqrt(((y - y_mean) ** 2).sum(2))


def assert_agrees(fit, filters, keys, positive=False, ties=1e-6):
    """The fit has the best key (or one that is as good within rounding) and its scale, shift and residual.

    Args:
        fit: What is tested.
        filters: (N, k, k) as the implementation saw them: finite, none constant.
        keys: (K, k, k).
        positive: Whether only scales >= 0 were allowed.
        ties: How much worse than the best residual a chosen key may be.
    """
    filters, keys = np.asarray(filters, np.float64), np.asarray(keys, np.float64)
    index, scale, shift, residual = (np.asarray(x) for x in fit)
    assert (index.dtype, scale.dtype, shift.dtype, residual.dtype) == ("int32", "float32", "float32", "float32")
    assert ((index >= 0) & (index < len(keys))).all()
    a, b, r = line_of_best_key(filters, keys, positive)
    rows = np.arange(len(filters))
    a, b, chosen = a[rows, index], b[rows, index], r[rows, index]
    np.testing.assert_array_less(chosen, r.min(1) + ties)

    size = np.abs(filters).max((1, 2))
    spread = np.sqrt(((filters - filters.mean((1, 2), keepdims=True)) ** 2).sum((1, 2)))
    key_spread = np.sqrt(((keys - keys.mean((1, 2), keepdims=True)) ** 2).sum((1, 2)))[index]
    key_mean = np.abs(keys.mean((1, 2)))[index]
    scale_error = 1e-5 * np.abs(a) + 8 * FLOAT32 * spread / key_spread
    assert (np.abs(scale - a) <= scale_error).all()
    assert (np.abs(shift - b) <= 1e-5 * np.abs(b) + 4 * FLOAT32 * size + scale_error * key_mean).all()
    np.testing.assert_array_less(np.abs(residual - chosen), 1e-6 + 1e-5 * chosen)
