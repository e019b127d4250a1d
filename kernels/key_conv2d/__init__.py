"""Implementations of `mkf.ops.key_conv2d`: out[n, c] = conv(x[n, c], scale[c] * key[index[c]] + shift[c]) + bias[c].

Each module has `why_not(device)`, the reason it cannot run there, `why_not_call(x, plan, stride, padding, dilation)`,
the reason it cannot serve such a call (None if it can; of x only shape, dtype, strides and device count, as the answer
is kept), and two functions that only compute:

    key_conv2d(x, plan, index, scale, shift, bias, stride, padding, dilation, out)
    key_conv2d_backward(dy, x, plan, index, scale, shift, stride, padding, dilation, dx, d_scale, d_shift, d_bias)

`x`, `out`, `dy` and `dx` are (N, C, H, W) of one dtype, all contiguous or all channels-last; `index` is (C,) int32 and
in range, `scale`, `shift` and `bias` (or None) are (C,) float32, all contiguous on the device of x; scale and shift are
finite where that can be known without waiting for a GPU. The gradients d_scale, d_shift and d_bias are (C,) float32.
Where x is float64, which only the reference serves, all that is float32 here is float64. An output that is None is not
asked for; `x` is None where only dx or d_bias are. `stride`, `padding` and `dilation` are pairs (vertical, horizontal).
The fast implementations serve stride 1 and 2, dilation 1 and 'same' zero padding, k // 2 on every side. No N, C, H or W
is 0. Results do not depend on the number of threads, bit for bit.

A module may have a third function, `bind(x, plan, index, scale, shift, stride, padding, dilation)`, whose result is a
`Bound` of its own and knows from the beginning what the two functions find out at every call.

One pass over dy and x gives every gradient: with key' the key turned by 180 degrees and z = conv(dy, key'[index]),
s = conv(dy, ones),

    dx = scale * z + shift * s,  d_scale = sum of z * x,  d_shift = sum of s * x,  d_bias = sum of dy,

sums over n, h and w (<dy, conv(x, q)> = <conv(dy, q'), x>, the adjoint), so no gradient of k * k taps is ever formed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mkf.kernels.key_conv2d.structure import multiplications

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """K keys of k x k as they are cheapest to convolve with; contiguous tensors, float32 if not said otherwise.

    A key that is not `direct` equals, to the plan's tolerance,

        key[r, c] = sum over t < terms of columns[t, r] * rows[t, c] + box + (tap if (r, c) == (tap_row, tap_column))

    A plan is never written to, and the same keys get the same object again while they are in use, so what an
    implementation derives from a plan can be kept with it: plans are equal only to themselves.
    Only keys that train get a new one each time.

    Attributes:
        keys: (K, k, k), as the caller holds them and on the device of x; all else is on the CPU.
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

    def multiply_adds(self, shift: bool = False) -> Tensor:
        """Multiply-adds per output of each key, (K,) int32: 2 k a term, 1 a tap, 2 k for a box, k * k if no cheaper.

        Args:
            shift: Count for a filter with a shift, which is a box that the key's own box shares.
        """
        k = self.keys.shape[-1]
        parts = zip(self.direct.tolist(), self.terms.tolist(), self.box.tolist(), self.tap.tolist(), strict=True)
        counts = [
            k * k if direct else multiplications(k, terms, shift or box != 0, int(tap != 0))
            for direct, terms, box, tap in parts
        ]
        return torch.tensor(counts, dtype=torch.int32, device="cpu")

    def dense(self) -> Tensor:
        """The keys as the plan describes them, (K, k, k) float64 on the CPU."""
        dense = self.columns.double().mT @ self.rows.double() + self.box.double()[:, None, None]
        dense[torch.arange(len(dense), device="cpu"), self.tap_row, self.tap_column] += self.tap.double()
        return torch.where(self.direct[:, None, None], self.keys.detach().double().cpu(), dense)

    def describe(self) -> str:
        """A table with a line for each key: its parts, its multiply-adds per output, and what the plan misses of it."""
        lines = ["index  made of                              multiply-adds  with a shift    error"]
        numbers = zip(self.multiply_adds().tolist(), self.multiply_adds(shift=True).tolist(), strict=True)
        for i, (alone, shifted) in enumerate(numbers):
            error = self.error[i].item()
            lines.append(f"{i:5}  {self._parts(i):35}  {alone:13}  {shifted:12}  {error:7.2g}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    def _parts(self, i: int) -> str:
        if self.direct[i]:
            return f"{self.keys.shape[-1] ** 2} taps"
        terms = int(self.terms[i])
        parts = [f"{terms} separable term{'s' if terms > 1 else ''}"] if terms else []
        if self.box[i] != 0:
            parts.append("box")
        if self.tap[i] != 0:
            parts.append(f"tap at ({self.tap_row[i]}, {self.tap_column[i]})")
        return " + ".join(parts) or "nothing"


@dataclass(frozen=True, slots=True)
class Bound:
    """The two functions of an implementation with all settled but the data, for every x of one size, dtype and layout.

    They read the memory of plan, index, scale and shift, which whoever calls them holds.

    Attributes:
        forward: Of x, bias and out, as `key_conv2d`.
        backward: Of dy, x, dx, d_scale, d_shift and d_bias, as `key_conv2d_backward`.
        forward_norm: Of x, bias, out, the LayerNorm's weight, bias and eps, and normalized = LayerNorm(out) over the
            channels of every pixel; out may be None. Itself None where there is no such kernel.
        backward_norm: Of the gradient of normalized, out, weight, eps, x, dx, d_scale, d_shift, d_bias, d_norm_weight
            and d_norm_bias; from dx on each may be None, as may x where only dx, d_bias and those of the norm are
            asked for.
    """

    forward: Callable[[Tensor, Tensor | None, Tensor], None]
    backward: Callable[..., None]
    forward_norm: Callable[..., None] | None = None
    backward_norm: Callable[..., None] | None = None

    @classmethod
    def of(cls, module: ModuleType, x: Tensor, *settled: Any) -> "Bound":
        """Of an implementation, for x and plan, index, scale, shift, stride, padding and dilation."""
        if hasattr(module, "bind"):
            bound: Bound = module.bind(x, *settled)
            return bound
        *filters, stride, padding, dilation = settled

        def forward(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
            module.key_conv2d(x, *filters, bias, stride, padding, dilation, out)

        def backward(dy: Tensor, x: Tensor | None, *gradients: Tensor | None) -> None:
            module.key_conv2d_backward(dy, x, *settled, *gradients)

        return cls(forward, backward)
