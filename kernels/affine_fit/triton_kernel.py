"""The Triton kernel of the affine fit: apart from `triton.py`, because it needs Triton as soon as it is imported."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride"])  # a known stride of 1 would change the order of sums
def affine_fit(
    filters: tl.tensor,
    unit: tl.tensor,
    inverse_norm: tl.tensor,
    key_mean: tl.tensor,
    index: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    residual: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    keys_count: tl.tensor,
    best: tl.tensor,
    k: tl.constexpr,
    positive: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
) -> None:
    """Fit `ROWS` filters, laid out (TAPS, ROWS) and padded to powers of two, against one key after the other.

    Triton decides which thread holds what. Products are float32 sums, not the tensor cores' shorter ones, so the score
    that ranks a key is also its scale, and equal keys stay equal.
    """
    taps: tl.constexpr = k * k
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < count
    t = tl.arange(0, TAPS)
    tap = (t < taps)[:, None]
    within = (t // k).to(tl.int64) * row_stride + (t % k).to(tl.int64) * col_stride
    x = tl.load(filters + within[:, None] + (row * stride)[None, :], mask=tap & here[None, :], other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)

    finite = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 0) == 0
    x = tl.where(finite[None, :], x, 0.0)
    low = tl.min(tl.where(tap, x, float("inf")), 0)
    high = tl.max(tl.where(tap, x, float("-inf")), 0)
    dead = low == high

    # A power of two keeps the sums of tiny and huge filters in range.
    size = tl.maximum(tl.abs(low), tl.abs(high))
    down, up = size > 2.0**60, size < 2.0**-60
    x *= tl.where(down, 2.0**-80, tl.where(up, 2.0**80, 1.0))[None, :]
    back = tl.where(down, 2.0**80, tl.where(up, 2.0**-80, 1.0))

    # The mean leaves twice: once roughly, and then what its rounding left behind.
    rough = tl.sum(x, 0) / taps
    x = tl.where(tap, x - rough[None, :], 0.0)
    rest = tl.sum(x, 0) / taps
    x = tl.where(tap, x - rest[None, :], 0.0)
    reach = tl.where(dead, 1.0, tl.max(tl.abs(x), 0))
    y = (x / reach[None, :]).to(tl.float32)
    squares = tl.sum(y * y, 0)

    last_score = tl.full((ROWS,), float("inf"), tl.float32)
    last = tl.full((ROWS,), -1, tl.int32)
    for b in range(best):
        # The best of the keys that come after the last one taken; equal scores go to the lowest index.
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        won = tl.full((ROWS,), 0, tl.int32)
        a = tl.full((ROWS,), 0.0, tl.float32)
        for j in range(keys_count):
            key = tl.load(unit + j * taps + t, mask=t < taps, other=0.0)
            dot = tl.sum(y * key[:, None], 0)
            score = dot if positive else tl.abs(dot)
            after = (score < last_score) | ((score == last_score) & (j > last))
            better = after & (score > top)
            won = tl.where(better, j, won)
            top = tl.where(better, score, top)
            a = tl.where(better, dot, a)
        last_score, last = top, won
        if positive:
            a = tl.maximum(a, 0.0)

        key = tl.load(unit + (won * taps)[None, :] + t[:, None], mask=tap, other=0.0)
        error = y - a[None, :] * key
        r = tl.minimum(tl.sqrt(tl.sum(error * error, 0) / squares), 1.0)
        slope = a * reach * tl.load(inverse_norm + won)
        height = (rough + rest - slope * tl.load(key_mean + won)) * back
        slope *= back

        nan = float("nan")
        out = row * best + b
        tl.store(index + out, tl.where(finite, tl.where(dead, b, won), -1), mask=here)
        tl.store(scale + out, tl.where(finite, tl.where(dead, 0.0, slope), nan).to(tl.float32), mask=here)
        tl.store(shift + out, tl.where(finite, tl.where(dead, low, height), nan).to(tl.float32), mask=here)
        tl.store(residual + out, tl.where(finite, tl.where(dead, 0.0, r), nan), mask=here)
