"""The Triton kernel of the key convolution: apart from `triton.py`, because it needs Triton once it is imported."""

import triton
import triton.language as tl


@triton.jit
def tap_column(column: tl.tensor, q: int, k: tl.constexpr, stride: tl.constexpr, backward: tl.constexpr) -> tl.tensor:
    """The input column that tap column q of an output column meets; -1 where it meets none."""
    if not backward:
        return column * stride - k // 2 + q
    at = column + k // 2 - q
    return tl.where((at >= 0) & (at % stride == 0), at // stride, -1)


@triton.jit
def key_conv2d(
    x: tl.tensor,  # dy if backward
    factor: tl.tensor,  # x if backward and a sum with it is asked for
    out: tl.tensor,  # dx if backward
    sums: tl.tensor,  # (tiles, 3, channels) if backward and a sum is asked for
    records: tl.tensor,  # (keys, 3 + 4 k), see device_plan.py
    keys: tl.tensor,  # (keys, k, k)
    index: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    bias: tl.tensor,
    channels: tl.tensor,
    in_h: tl.tensor,
    in_w: tl.tensor,
    out_h: tl.tensor,
    out_w: tl.tensor,
    in_n: tl.tensor,  # strides of x, and then of out and factor
    in_c: tl.tensor,
    in_y: tl.tensor,
    in_x: tl.tensor,
    out_n: tl.tensor,
    out_c: tl.tensor,
    out_y: tl.tensor,
    out_x: tl.tensor,
    k: tl.constexpr,
    stride: tl.constexpr,
    backward: tl.constexpr,
    has_bias: tl.constexpr,
    wants_out: tl.constexpr,
    wants_sums: tl.constexpr,
    wants_factor: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Make (ROWS, COLUMNS, CHANNELS) outputs of one image.

    With z the convolution with the keys and s that with ones, an output is scale * z + shift * s + bias. An input row
    is convolved horizontally once for all output rows of the tile, which stand in one accumulator.
    """
    half: tl.constexpr = k // 2
    record: tl.constexpr = 3 + 4 * k
    tiles_c = tl.cdiv(channels, CHANNELS)
    tiles_x = tl.cdiv(out_w, COLUMNS)
    tiles_y = tl.cdiv(out_h, ROWS)
    tile = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * CHANNELS + tl.arange(0, CHANNELS)
    column = tile % tiles_x * COLUMNS + tl.arange(0, COLUMNS)
    top = tile // tiles_x % tiles_y * ROWS
    row = top + tl.arange(0, ROWS)
    n = (tile // tiles_x // tiles_y).to(tl.int64)
    here = c < channels
    x += n * in_n + c.to(tl.int64)[None, :] * in_c  # of the channels, (1, CHANNELS)

    key = tl.load(index + c, mask=here, other=0)
    record_of_key = records + key * record
    form = tl.load(record_of_key, mask=here, other=0.0)
    box = tl.load(record_of_key + 1, mask=here, other=0.0)
    centre = tl.load(record_of_key + 2, mask=here, other=0.0)
    a = tl.load(scale + c, mask=here, other=0.0)
    b = tl.load(shift + c, mask=here, other=0.0)
    worst = tl.max(form, 0)
    has_centre = tl.max(tl.abs(centre), 0) > 0
    has_box = wants_factor | (tl.max(tl.maximum(tl.abs(b), tl.where(worst < 2, tl.abs(box), 0.0)), 0) > 0)
    if worst == 2:  # all by taps
        box = tl.zeros_like(box)
        centre = tl.zeros_like(centre)

    if backward:  # the first and the last input row that an output row of the tile meets
        first = tl.maximum(top - half + stride - 1, 0) // stride
        last = tl.minimum((top + ROWS - 1 + half) // stride, in_h - 1)
    else:
        first = tl.maximum(top * stride - half, 0)
        last = tl.minimum((top + ROWS - 1) * stride + half, in_h - 1)

    z = tl.zeros((ROWS, COLUMNS, CHANNELS), tl.float32)
    s = tl.zeros((ROWS, COLUMNS, CHANNELS), tl.float32)
    for y in range(first, last + 1):
        line = x + tl.cast(y, tl.int64) * in_y
        # The row of the key by which this input row counts for each output row.
        r = row + half - stride * y if backward else y + half - stride * row
        meets = (r >= 0) & (r < k)
        if worst == 2:
            for q in range(k):
                at = tap_column(column, q, k, stride, backward)
                inside = ((at >= 0) & (at < in_w))[:, None] & here[None, :]
                value = tl.load(line + at.to(tl.int64)[:, None] * in_x, mask=inside, other=0.0).to(tl.float32)
                taps = tl.load(
                    keys + (key * (k * k) + q)[None, :] + (r * k)[:, None],
                    mask=meets[:, None] & here[None, :],
                    other=0.0,
                )
                z += tl.where(meets[:, None, None], taps[:, None, :] * value[None, :, :], 0.0)
        else:
            for term in range(worst.to(tl.int32) + 1):
                across = tl.zeros((COLUMNS, CHANNELS), tl.float32)
                for q in range(k):
                    at = tap_column(column, q, k, stride, backward)
                    inside = ((at >= 0) & (at < in_w))[:, None] & here[None, :]
                    value = tl.load(line + at.to(tl.int64)[:, None] * in_x, mask=inside, other=0.0).to(tl.float32)
                    weight = tl.load(record_of_key + 3 + (2 + term) * k + q, mask=here, other=0.0)
                    across += tl.where(inside, weight[None, :] * value, 0.0)
                down = tl.load(
                    record_of_key[None, :] + 3 + term * k + r[:, None], mask=meets[:, None] & here[None, :], other=0.0
                )
                z += tl.where(meets[:, None, None], down[:, None, :] * across[None, :, :], 0.0)
        if has_box:
            across = tl.zeros((COLUMNS, CHANNELS), tl.float32)
            for q in range(k):
                at = tap_column(column, q, k, stride, backward)
                inside = ((at >= 0) & (at < in_w))[:, None] & here[None, :]
                across += tl.load(line + at.to(tl.int64)[:, None] * in_x, mask=inside, other=0.0).to(tl.float32)
            s += tl.where(meets[:, None, None], across[None, :, :], 0.0)

    # The input at the centre of each filter; if backward, the entries of dy, each in one place of one tile.
    middle = tl.zeros((ROWS, COLUMNS, CHANNELS), tl.float32)
    if has_centre | wants_sums:
        at_y = row // stride if backward else row * stride
        at_x = column // stride if backward else column * stride
        has_y, has_x = at_y < in_h, at_x < in_w
        if backward:
            has_y, has_x = has_y & (row % stride == 0), has_x & (column % stride == 0)
        middle = tl.load(
            x[None, :, :] + (at_y.to(tl.int64) * in_y)[:, None, None] + (at_x.to(tl.int64) * in_x)[None, :, None],
            mask=(has_y[:, None] & has_x[None, :])[:, :, None] & here[None, None, :],
            other=0.0,
        ).to(tl.float32)
        z += centre[None, None, :] * middle
    # Fused by its name and not by the compiler, which would do so only where it knows that there is a box.
    z = tl.where(has_box, tl.fma(tl.broadcast_to(box[None, None, :], z.shape), s, z), z)

    written = ((row < out_h)[:, None] & (column < out_w)[None, :])[:, :, None] & here[None, None, :]
    place = (
        n * out_n
        + (row.to(tl.int64) * out_y)[:, None, None]
        + (column.to(tl.int64) * out_x)[None, :, None]
        + (c.to(tl.int64) * out_c)[None, None, :]
    )
    if wants_out:
        shifted = tl.where(has_box, b[None, None, :] * s, 0.0)
        result = tl.fma(tl.broadcast_to(a[None, None, :], z.shape), z, shifted)
        if has_bias:
            result += tl.load(bias + c, mask=here, other=0.0)[None, None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=written)
    if wants_sums:
        part = sums + tile.to(tl.int64) * 3 * channels + c
        tl.store(part + 2 * channels, tl.sum(tl.sum(middle, 0), 0), mask=here)
        if wants_factor:
            f = tl.load(factor + place, mask=written, other=0.0).to(tl.float32)
            tl.store(part, tl.sum(tl.sum(tl.where(written, z * f, 0.0), 0), 0), mask=here)
            tl.store(part + channels, tl.sum(tl.sum(tl.where(written, s * f, 0.0), 0), 0), mask=here)
