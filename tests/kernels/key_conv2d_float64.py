"""The key convolution and its gradients in plain float64 numpy, written apart from mkf, tap by tap."""

import numpy as np


def filters(keys, index, scale, shift):
    """(C, k, k): scale * key + shift."""
    return scale[:, None, None] * keys[index] + shift[:, None, None]


def convolution(x, weight, bias, stride):
    """out[n, c, i, j] = b[c] + sum over r, s of w[c, r, s] * x[n, c, stride * i + r - k//2, stride * j + s - k//2]."""
    k = weight.shape[-1]
    height, width = (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((*x.shape[:2], height, width))
    for r, s in np.ndindex(k, k):
        out += weight[:, r, s][:, None, None] * _window(padded, r, s, stride, height, width)
    return out + (0 if bias is None else bias[:, None, None])


def gradients(dy, x, keys, index, scale, shift, stride):
    """dx, d_scale, d_shift and d_bias; those of scale and shift by way of the gradient of the filters."""
    weight, k = filters(keys, index, scale, shift), keys.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    d_padded, d_weight = np.zeros_like(padded), np.zeros_like(weight)
    for r, s in np.ndindex(k, k):
        d_weight[:, r, s] = (dy * _window(padded, r, s, stride, *dy.shape[2:])).sum((0, 2, 3))
        window = _window(d_padded, r, s, stride, *dy.shape[2:])
        window += weight[:, r, s][:, None, None] * dy
    inner = slice(k // 2, -(k // 2))
    return (
        d_padded[:, :, inner, inner],
        (d_weight * keys[index]).sum((1, 2)),
        d_weight.sum((1, 2)),
        dy.sum((0, 2, 3)),
    )


def _window(padded, r, s, stride, height, width):
    return padded[:, :, r : r + stride * height : stride, s : s + stride * width : stride][:, :, :height, :width]
