"""Implementations of `mkf.ops.key_conv2d`: out[n, c] = conv(x[n, c], scale[c] * key[index[c]] + shift[c]) + bias[c].

Each module has `why_not(device)`, the reason it cannot run there, `why_not_call(x, plan, stride, padding, dilation)`,
the reason it cannot serve such a call (None if it can), and two functions that only compute:

    key_conv2d(x, plan, index, scale, shift, bias, stride, padding, dilation, out)
    key_conv2d_backward(dy, x, plan, index, scale, shift, stride, padding, dilation, dx, d_scale, d_shift, d_bias)

`x`, `out`, `dy` and `dx` are (N, C, H, W) of one dtype, all contiguous or all channels-last; `index` is (C,) int32 and
in range, `scale`, `shift` and `bias` (or None) are (C,) float32, all contiguous on the device of x. The gradients
d_scale, d_shift and d_bias are (C,) float32. An output that is None is not asked for; `x` is None where only dx or
d_bias are. The fast implementations serve stride 1 and 2, dilation 1 and 'same' zero padding, k // 2 on every side. No
N, C, H or W is 0. Results do not depend on the number of threads, bit for bit.

One pass over dy and x gives every gradient: with key' the key turned by 180 degrees and z = conv(dy, key'[index]),
s = conv(dy, ones),

    dx = scale * z + shift * s,  d_scale = sum of z * x,  d_shift = sum of s * x,  d_bias = sum of dy,

sums over n, h and w (<dy, conv(x, q)> = <conv(dy, q'), x>, the adjoint), so no gradient of k * k taps is ever formed.
"""

from typing import NamedTuple

from torch import Tensor


class KeyPlan(NamedTuple):
    """K keys of k x k as they are cheapest to convolve with; all tensors on the CPU, contiguous, float32 if not said.

    A key that is not `direct` equals, to the plan's tolerance,

        key[r, c] = sum over t < terms of columns[t, r] * rows[t, c] + box + (tap if (r, c) == (tap_row, tap_column))

    Attributes:
        keys: (K, k, k), as the caller holds them.
        direct: (K,) bool, whether k * k taps are the cheapest; the fields below are then zero.
        terms: (K,) int32, the number of separable terms.
        columns: (K, R, k), vertical factors, R >= 1 the most terms of a key; zero beyond `terms`.
        rows: (K, R, k), horizontal factors.
        box: (K,), the constant in every tap; it joins the shift: scale * box + shift.
        tap: (K,), weight of the one single tap, 0 where there is none.
        tap_row: (K,) int32, its row from the top.
        tap_column: (K,) int32, its column from the left.
        error: (K,) float64, L2 norm of key - plan, relative to the norm of the key.
    """

    keys: Tensor
    direct: Tensor
    terms: Tensor
    columns: Tensor
    rows: Tensor
    box: Tensor
    tap: Tensor
    tap_row: Tensor
    tap_column: Tensor
    error: Tensor
