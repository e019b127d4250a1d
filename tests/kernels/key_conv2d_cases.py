"""Calls of the key convolution with plans made by hand, and what float64 says of their results.

The reference writes the filters out and leaves the rest to `torch.nn.functional.conv2d` and autograd in float64.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from mkf.kernels.key_conv2d import KeyPlan

# A key: (separable terms, or None for k * k taps; whether there is a box; where the tap is, if there is one)
ONE, BOX, TWO, THREE = (1, False, None), (1, True, None), (2, False, None), (3, False, None)
TAPPED, LAPLACIAN, OFF_CENTRE = (1, False, "centre"), (2, True, "centre"), (1, False, "corner")
ZERO, DIRECT = (0, False, None), (None, False, None)
EVERY = (ONE, BOX, TWO, THREE, TAPPED, LAPLACIAN, OFF_CENTRE, ZERO, DIRECT)

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of the sum of the terms' sizes


def plan_by_hand(kinds, k, generator):
    """A KeyPlan of random keys of the given kinds."""
    count, most = len(kinds), 3
    direct, terms = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int32)
    columns, rows = torch.zeros(2, count, most, k)
    box, tap = torch.zeros(2, count)
    tap_row, tap_column = torch.zeros(2, count, dtype=torch.int32)
    keys = torch.empty(count, k, k)
    for i, (rank, has_box, place) in enumerate(kinds):
        if rank is None:
            direct[i], keys[i] = True, torch.randn(k, k, generator=generator)
            continue
        terms[i] = rank
        columns[i, :rank], rows[i, :rank] = torch.randn(2, rank, k, generator=generator)
        key = columns[i].T.double() @ rows[i].double()
        if has_box:
            box[i] = torch.randn((), generator=generator)
            key += box[i]
        if place is not None:
            tap[i] = 2 + torch.rand((), generator=generator)
            at = (k // 2, k // 2) if place == "centre" else (0, k - 1)
            tap_row[i], tap_column[i] = at
            key[at] += tap[i]
        keys[i] = key.float()
    return KeyPlan(keys, direct, terms, columns, rows, box, tap, tap_row, tap_column, torch.zeros(count).double())


class Case:
    """One call, forward and backward, on fresh random tensors.

    Args:
        shape: (N, C, H, W) of x.
        kinds: The keys, see `EVERY`; channels draw them at random.
        shifted: Whether shifts are other than 0.
    """

    def __init__(
        self, shape, k, stride, dtype, channels_last, kinds=(ONE,), shifted=True, biased=True, seed=0, device="cpu"
    ):
        generator = torch.Generator().manual_seed(seed)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.channels_last, self.dtype, self.k, self.stride = channels_last, dtype, k, stride
        plan = plan_by_hand(kinds, k, generator)
        self.plan = replace(plan, keys=plan.keys.to(device))
        channels = shape[1]
        self.x = self._tensor(shape, generator, device)
        self.dy = self._tensor((*shape[:2], *((n - 1) // stride + 1 for n in shape[2:])), generator, device)
        self.index = torch.randint(len(kinds), (channels,), generator=generator, dtype=torch.int32).to(device)
        scale, shift, bias = torch.randn(3, channels, generator=generator)
        self.scale = scale.to(device)
        self.shift = (shift * shifted).to(device)
        self.bias = bias.to(device) if biased else None
        self.device = device

    def _tensor(self, shape, generator, device):
        return torch.randn(shape, generator=generator).to(device, self.dtype).contiguous(memory_format=self.layout)

    def _options(self):
        return (self.stride,) * 2, (self.k // 2,) * 2, (1, 1)

    def empty(self, like):
        """An output like a tensor, full of NaN."""
        return torch.full_like(like, torch.nan)

    def forward(self, function):
        """The output of an implementation's `key_conv2d`."""
        out = self.empty(self.dy)
        function(self.x, self.plan, self.index, self.scale, self.shift, self.bias, *self._options(), out)
        return out

    def backward(self, function, wanted=(True, True, True, True)):
        """(dx, d_scale, d_shift, d_bias) of an implementation's `key_conv2d_backward`, None where not `wanted`."""
        outputs = (self.empty(self.x), *(self.empty(self.scale) for _ in range(3)))
        asked = [o if w else None for o, w in zip(outputs, wanted, strict=True)]
        x = self.x if wanted[1] or wanted[2] else None
        function(self.dy, x, self.plan, self.index, self.scale, self.shift, *self._options(), *asked)
        return asked

    def _double(self):
        """X, keys of the channels, scale and shift, in float64 on the CPU."""
        x = self.x.cpu().double().contiguous()
        keys = self.plan.keys.cpu()[self.index.cpu().long()].double()
        return x, keys, self.scale.cpu().double(), self.shift.cpu().double()

    def check_forward(self, out):
        """Every output is within rounding of float64's."""
        x, keys, scale, shift = self._double()
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.cpu().double()
        expected = self._conv(x, self._filters(keys, scale, shift), bias)
        size = self._conv(x.abs(), self._filters(keys.abs(), scale.abs(), shift.abs()), bias.abs())
        assert out.is_contiguous(memory_format=self.layout)
        self._assert_near(out, expected, size, self.dtype)

    def check_backward(self, gradients):
        """Every gradient that is not None is within rounding of autograd's in float64."""
        x, keys, scale, shift = self._double()
        dy = self.dy.cpu().double().contiguous()
        leaves = [t.requires_grad_() for t in (x, scale, shift)]
        out = self._conv(x, self._filters(keys, scale, shift), None)
        expected = [*torch.autograd.grad(out, leaves, dy), dy.sum((0, 2, 3))]
        x, scale, shift = (t.detach() for t in leaves)
        filters = self._filters(keys.abs(), scale.abs(), shift.abs())
        options = {"stride": self.stride, "padding": self.k // 2, "groups": len(scale)}
        d_filters = torch.nn.grad.conv2d_weight(x.abs(), filters.shape, dy.abs(), **options)[:, 0]
        sizes = (
            torch.nn.grad.conv2d_input(x.shape, filters, dy.abs(), **options),
            (d_filters * keys.abs()).sum((1, 2)),
            d_filters.sum((1, 2)),
            dy.abs().sum((0, 2, 3)),
        )
        for got, value, size, dtype in zip(gradients, expected, sizes, (self.dtype, *[torch.float32] * 3), strict=True):
            if got is not None:
                self._assert_near(got, value, size, dtype)

    def _filters(self, keys, scale, shift):
        return (scale[:, None, None] * keys + shift[:, None, None])[:, None]

    def _conv(self, x, filters, bias):
        return F.conv2d(x, filters, bias, self.stride, self.k // 2, groups=len(filters))

    def _assert_near(self, got, expected, size, dtype):
        assert got.dtype == dtype
        error = (got.cpu().double() - expected).abs()
        worst = (error / (size + 1e-30)).max().item()
        assert worst < EPSILON[dtype], f"off by {worst:.2e} of the sum of the terms' sizes"
