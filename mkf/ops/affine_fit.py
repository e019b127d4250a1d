"""The affine fit: which key each filter is, and the scale and shift that make it one."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys
from mkf.kernels.extension import DTYPES
from mkf.kernels.registry import choose

KERNEL_SIZES = (3, 5, 7, 9, 11)
MAX_KEYS = 256


class AffineFit(NamedTuple):
    """A fit of N filters: `filters[i]` is close to `scale[i] * keys[index[i]] + shift[i]`.

    All are tensors of N entries (numpy arrays where the filters were one), or (N, m) with `topk=m`, the best key first.

    Attributes:
        index: int32, the key; -1 for a filter that holds NaN or Inf.
        scale: float32, a of a * key + b; 0 for a constant (dead) filter.
        shift: float32, b of a * key + b.
        residual: float32 in [0, 1], ||f - (a * key + b)|| / ||f - mean(f)||: 0 exact, 1 no better than a constant.
    """

    index: Any
    scale: Any
    shift: Any
    residual: Any


def affine_fit(
    filters: Any,
    keys: Any,
    *,
    sign: Literal["any", "positive"] = "any",
    topk: int | None = None,
    backend: str | None = None,
) -> AffineFit:
    """Fit every filter f by the key q and the scalars a, b that minimise ||f - (a * q + b)||.

    With n = k * k taps, means removed (f' = f - mean(f), q' = q - mean(q)) and c = <f', q'> / (||f'|| ||q'||):

        index = argmax |c| (the lowest index among equals),   a = <f', q'> / ||q'||^2,   b = mean(f) - a * mean(q),
        residual = ||f - (a * q + b)|| / ||f'|| = sqrt(1 - c^2).

    This is the least-squares line of equations 1 to 3 of "The Quest for Universal Master Key Filters in DS-CNNs"
    (NeurIPS 2025). Sums are float32 or better and taken after the mean has left, so a common offset costs nothing; the
    result for a filter does not depend on its neighbours, on the batch or on the number of threads.

    Args:
        filters: (N, k, k) or (N, k * k), k odd, 3 to 11; a tensor (float32, float64, bfloat16, float16, any strides),
            a numpy array (the result then is numpy too), or a `FilterBank`. A constant filter is *dead*: index 0,
            scale 0, its value as shift, residual 0. One that holds NaN or Inf gets index -1 and NaN.
        keys: A `KeySet`, or an array (K, k, k), 1 <= K <= 256. The fit is relative to the keys as they are given.
        sign: "any", or "positive" for scales >= 0 only; then the key of largest c (not |c|) wins.
        topk: Report the m best keys, best first, in outputs of shape (N, m).
        backend: Name of an implementation (`mkf env` lists them); automatic if None, or as `MKF_BACKEND` says.

    Returns:
        An `AffineFit` on the device of the filters. Scale, shift and residual have gradients with respect to filters
        and keys (given as a tensor), at the chosen key; by `backward` and `torch.autograd.grad`, not in forward mode.
        A mean over residuals counts dead filters as 0 and is NaN with a filter that is not finite: `fit_statistics`
        leaves both out.

    Raises:
        ValueError: Shapes that are no filters or do not fit together, an empty bank, constant or not finite keys.
        TypeError: A dtype that is no floating-point number.
        BackendError: The implementation asked for cannot run there.
    """
    if sign not in ("any", "positive"):
        raise ValueError(f"sign={sign!r}: use 'any' or 'positive'")
    as_numpy = isinstance(filters, np.ndarray)
    f = as_filters(filters)
    q = _keys(keys, f)
    if topk is not None and not 1 <= topk <= len(q):
        raise ValueError(f"topk={topk}: there are {len(q)} keys")
    scale, shift, residual, index = torch.ops.mkf.affine_fit(f, q, topk or 1, sign == "positive", backend or "")
    fit = AffineFit(index, scale, shift, residual)
    if topk is None:
        fit = AffineFit(*(x.squeeze(1) for x in fit))
    return AffineFit(*(x.numpy(force=True) for x in fit)) if as_numpy else fit


def _tensor(x: Any, what: str) -> Tensor:
    """A floating-point tensor of an array, or of an object that holds its filters as `.filters`."""
    x = getattr(x, "filters", x)
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative or any(s % x.itemsize or s < 0 for s in x.strides) or not x.flags.writeable:
            x = x.astype(x.dtype.newbyteorder("="), order="C")
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: expected a tensor or a numpy array, not {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{what} are not a dense tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{what} are {x.dtype}: convert them to float32, float64, bfloat16 or float16")
    return x


def as_filters(filters: Any) -> Tensor:
    """What `affine_fit` takes for filters as a tensor (N, k, k) of any layout, or its refusal."""
    f = _tensor(filters, "filters")
    if f.ndim == 2 and f.shape[1] in [k * k for k in KERNEL_SIZES]:
        k = KERNEL_SIZES[[k * k for k in KERNEL_SIZES].index(f.shape[1])]
        f = f.unflatten(1, (k, k))
    if f.ndim != 3 or f.shape[1] != f.shape[2] or f.shape[1] not in KERNEL_SIZES:
        hint = " (squeeze the weight of a Conv2d: weight[:, 0])" if f.ndim == 4 else ""
        raise ValueError(
            f"filters have shape {tuple(f.shape)}: expected (N, k, k) or (N, k*k) with k one of {KERNEL_SIZES}{hint}"
        )
    if len(f) == 0 and hasattr(filters, "filters"):
        raise ValueError("there are no filters to fit: the bank is empty")
    return f


def _keys(keys: Any, filters: Tensor) -> Tensor:
    q = _tensor(keys, "keys")
    if q.ndim != 3 or q.shape[1] != q.shape[2] or not 1 <= len(q) <= MAX_KEYS:
        raise ValueError(f"keys have shape {tuple(q.shape)}: expected (K, k, k) with 1 <= K <= {MAX_KEYS}")
    if q.shape[1:] != filters.shape[1:]:
        k, own = filters.shape[1], q.shape[1]
        raise ValueError(
            f"filters are {k}x{k} but keys are {own}x{own}: use keys of {k}x{k}, or select(k={own}) filters"
        )
    return q.to(filters.device)


def _prepare(keys: Tensor) -> FitKeys:
    """Centre and normalise in float64, refusing keys that cannot be."""
    q = keys.detach().flatten(1).double()
    mean = q.mean(1, keepdim=True)
    centred = q - mean
    norm = centred.norm(dim=1)
    # Below float32's rounding of a constant; the comparison is also false for NaN and for zero.
    usable = (norm > 1e-7 * q.norm(dim=1)) & norm.isfinite()
    recording = q.is_cuda and torch.cuda.is_current_stream_capturing()  # then nothing may wait for the GPU
    if not recording and not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise ValueError(f"keys {bad} are constant or not finite, so no filter can be a scaled copy of them")
    unit = centred / norm[:, None]
    return FitKeys(unit.float(), norm.reciprocal().float(), mean.flatten().float())


def _run(filters: Tensor, keys: Tensor, topk: int, positive: bool, backend: str) -> tuple[Tensor, ...]:
    scale, shift, residual, index = _empty(filters, keys, topk, positive, backend)
    implementation = choose("affine_fit", filters.device, backend or None)
    if filters.shape[0] == 0:
        return scale, shift, residual, index
    implementation.load().affine_fit(filters.detach(), _prepare(keys), positive, index, scale, shift, residual)
    return scale, shift, residual, index


def _empty(filters: Tensor, keys: Tensor, topk: int, positive: bool, backend: str) -> tuple[Tensor, ...]:
    shape = (filters.shape[0], topk)
    scale, shift, residual = (filters.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return scale, shift, residual, filters.new_empty(shape, dtype=torch.int32)


_library = torch.library.Library("mkf", "DEF")
_library.define(  # the integer output last: opcheck adds the outputs up in their order
    "affine_fit(Tensor filters, Tensor keys, int topk, bool positive, str backend)"
    " -> (Tensor scale, Tensor shift, Tensor residual, Tensor index)"
)
_library.impl("affine_fit", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::affine_fit", _empty, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    filters, keys, _, positive, _ = inputs
    scale, _, residual, index = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(filters, keys, index, scale, residual)
    ctx.positive = positive


def _backward(ctx: Any, d_scale: Tensor, d_shift: Tensor, d_residual: Tensor, _: Any) -> tuple[Any, ...]:
    """Gradients at the chosen key, e = f' - a q' being what the fit leaves (it is orthogonal to q' and to constants).

    da/df = q' / |q'|^2            db/df = 1/n - mean(q) da/df         dr/df = e / (r |f'|^2) - r f' / |f'|^2
    da/dq = (e - a q') / |q'|^2    db/dq = -a/n - mean(q) da/dq        dr/dq = -a e / (r |f'|^2)

    Where the residual is 0, or a scale is held at 0 by `sign="positive"`, the zero subgradient is taken. A dead filter
    only moves its shift; a filter that is not finite gets gradient 0.
    """
    filters, keys, index, scale, residual = ctx.saved_tensors
    dtype = torch.promote_types(torch.promote_types(filters.dtype, keys.dtype), torch.float32)
    f, q = filters.flatten(1).to(dtype), keys.flatten(1).to(dtype)
    taps = f.shape[1]
    finite = index[:, :1] >= 0
    f = torch.where(finite, f, 0)
    f = f - f.mean(1, keepdim=True)
    f_squares = f.square().sum(1, keepdim=True)
    q_mean = q.mean(1, keepdim=True)
    q_centred = q - q_mean
    q_squares = q_centred.square().sum(1, keepdim=True)

    d_filters, d_keys = torch.zeros_like(f), torch.zeros_like(q)
    for rank in range(index.shape[1]):
        j = index[:, rank].clamp(min=0)
        a, r, da, db, dr = (x[:, rank : rank + 1].to(dtype) for x in (scale, residual, d_scale, d_shift, d_residual))
        moves = finite & ((a > 0) if ctx.positive else (f_squares > 0))
        a, r, da, dr, db = (
            torch.where(m, x, 0) for m, x in ((moves, a), (moves, r), (moves, da), (moves, dr), (finite, db))
        )
        key = q_centred[j]
        e = f - a * key
        da = (da - torch.where(moves, db * q_mean[j], 0)) / q_squares[j]
        per_e = torch.where(r > 0, dr / (r * f_squares), 0)
        per_f = torch.where(r > 0, dr * r / f_squares, 0)
        d_filters += da * key + db / taps + per_e * e - per_f * f
        d_keys.index_add_(0, j, da * (e - a * key) - db * a / taps - per_e * a * e)
    return d_filters.view(filters.shape).to(filters.dtype), d_keys.view(keys.shape).to(keys.dtype), None, None, None


torch.library.register_autograd("mkf::affine_fit", _backward, setup_context=_setup_context, lib=_library)
