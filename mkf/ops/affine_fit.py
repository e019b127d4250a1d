"""The affine fit: which key each filter is, and the scale and shift that make it one."""

from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mkf.kernels.affine_fit import FitKeys
from mkf.kernels.derived import Derived
from mkf.kernels.registry import choose
from mkf.ops.arguments import (
    centred_keys,
    filters_tensor,
    keys_tensor,
    output_tensors,
    refuse_overlap,
    refuse_transforms,
)
from mkf.ops.combination import affine_combination

EQUAL = 1e-6
"""Keys that leave less of one another are equal: a residual is good to about as much."""


class AffineFit(NamedTuple):
    """A fit of N filters: `filters[i]` is close to `scale[i] * keys[index[i]] + shift[i]`.

    All are tensors of N entries (numpy arrays where the filters were one), or (N, m) with `topk=m`, the best key first.
    With `method="combination"` index and scale are (N, m), shift and residual (N,): `filters[i]` is close to the sum
    over j of `scale[i, j] * keys[index[i, j]]`, plus `shift[i]`.

    Attributes:
        index: int32, the key, counted from 0 (key 0 of `paper8` is named "1"); -1 for a filter that holds NaN or Inf.
        scale: float32, a of a * key + b; 0 for a constant (dead) filter.
        shift: float32, b of a * key + b.
        residual: float32 in [0, 1], ||f - (a * key + b)|| / ||f - mean(f)||: 0 exact, 1 no better than a constant; to
            about 1e-6, by which an exact copy may differ from 0.
    """

    index: Any
    scale: Any
    shift: Any
    residual: Any


def affine_fit(
    filters: Any,
    keys: Any,
    *,
    method: Literal["one", "combination"] = "one",
    sign: Literal["any", "positive"] = "any",
    topk: int | None = None,
    out: AffineFit | None = None,
    backend: str | None = None,
) -> AffineFit:
    """Fit every filter f by the key q and the scalars a, b that minimise ||f - (a * q + b)||.

    With n = k * k taps, means removed (f' = f - mean(f), q' = q - mean(q)) and c = <f', q'> / (||f'|| ||q'||):

        index = argmax |c| (the lowest index among equals),   a = <f', q'> / ||q'||^2,   b = mean(f) - a * mean(q),
        residual = ||f - (a * q + b)|| / ||f'|| = sqrt(1 - c^2).

    This is the least-squares line of equations 1 to 3 of "The Quest for Universal Master Key Filters in DS-CNNs"
    (NeurIPS 2025). Keys that are linear shifts of one another, to a residual of 1e-6, are equal ones for every filter.
    Sums are float32 or better and taken after the mean has left, so a common offset costs nothing; the result for a
    filter does not depend on its neighbours, on the batch or on the number of threads.

    With `method="combination"` several keys serve at once: the scalars a_j and b minimise ||f - (sum_j a_j * q_j + b)||
    over all K keys, or, with `topk=m`, over m of them that are chosen for each filter; `mkf.ops.combination` says how.
    The residual has the same denominator, so it tells what more keys than one would bring.

    Args:
        filters: (N, k, k) or (N, k * k), k odd, 3 to 11; a tensor (float32, float64, bfloat16, float16, any strides),
            a numpy array (the result then is numpy too), or a `FilterBank`. A constant filter is *dead*: index 0,
            scale 0, its value as shift, residual 0. One that holds NaN or Inf gets index -1 and NaN.
        keys: A `KeySet`, or an array (K, k, k), 1 <= K <= 256. The fit is relative to the keys as they are given.
        method: "one" key a filter, or a "combination" of several.
        sign: "any", or "positive" for scales >= 0 only; then the key of largest c (not |c|) wins. Combinations have
            scales of any sign.
        topk: Report the m best keys, best first, in outputs of shape (N, m); of a combination, take m keys.
        out: Tensors or numpy arrays to write the result into: contiguous, on the filters' device, of the shapes and
            dtypes that it would have without, none sharing memory with another or with filters or keys. Then a fit
            allocates nothing for its result.
        backend: Name of an implementation (`mkf env` lists them); automatic if None, or as `MKF_BACKEND` says. There is
            only one of combinations.

    Returns:
        An `AffineFit` on the device of the filters; `out` itself where it was given. Scale, shift and residual have
        gradients with respect to filters and keys (given as a tensor), at the chosen keys; by `backward` and
        `torch.autograd.grad`; forward mode and torch.func are refused, and numpy results have none. A mean over
        residuals counts dead filters as 0 and is NaN with a filter that is not finite: `fit_statistics` leaves both
        out. Scale and shift are infinite where float32 does not reach them, as it may be for float64 filters.

    Raises:
        ValueError: Shapes that are no filters or do not fit together, an empty bank, constant or not finite keys,
            options that exclude one another, or unfit `out`.
        TypeError: A dtype that is no floating-point number, or not that of the output it is meant for.
        RuntimeError: `out` where gradients are required, as torch's functions raise.
        NotImplementedError: Derivatives in forward mode or by torch.func; second ones of a combination whose keys
            require gradients.
        BackendError: The implementation asked for cannot run there.
    """
    if method not in ("one", "combination"):
        raise ValueError(f"method={method!r}: use 'one' or 'combination'")
    if sign not in ("any", "positive"):
        raise ValueError(f"sign={sign!r}: use 'any' or 'positive'")
    if method == "combination" and sign != "any":
        raise ValueError("sign='positive' is for single keys: a combination's scales have any sign")
    if method == "combination" and backend:
        raise ValueError(f"backend={backend!r} is for single keys: leave it out for combinations")
    if not isinstance(backend, str | None):
        raise TypeError(f"backend={backend!r}: give the name of an implementation")
    f = filters_tensor(filters)
    q = keys_tensor(keys, f)
    if topk is not None:
        if isinstance(topk, bool) or not isinstance(topk, Integral) or not 1 <= topk <= len(q):
            raise ValueError(f"topk={topk!r}: expected a whole number from 1 to {len(q)}, the number of keys")
        topk = int(topk)
    refuse_transforms(f, q)

    count, several = (len(f),), (len(f), topk or len(q))
    operator: Any
    options: tuple[Any, ...]
    if method == "combination":
        operator, options = affine_combination, (topk,)
        shapes = AffineFit(index=several, scale=several, shift=count, residual=count)
    else:
        operator, options = torch.ops.mkf.affine_fit, (topk, sign == "positive", backend or "")
        shapes = AffineFit(*[count if topk is None else several] * 4)
    if out is not None:
        if not isinstance(out, AffineFit):
            raise TypeError(f"out: expected an AffineFit of four tensors or arrays, not {type(out).__name__}")
        operator.out(f, q, *options, **output_tensors(out._asdict(), shapes._asdict(), (f, q)))
        return out
    scale, shift, residual, index = operator.default(f, q, *options)
    fit = AffineFit(index, scale, shift, residual)
    return AffineFit(*(x.numpy(force=True) for x in fit)) if isinstance(filters, np.ndarray) else fit


def _prepare(keys: Tensor) -> FitKeys:
    """Keys that are linear shifts of one another get the unit of the first, so that no rounding chooses between them.

    Scale and shift remain those of each key, by its own norm and mean.
    """
    q = centred_keys(keys)
    return FitKeys(_shared(q.unit).float(), q.norm.reciprocal().float(), q.mean.float())


def _shared(unit: Tensor) -> Tensor:
    """For each key the unit of the first one that it equals, of most keys its own, with the sign it equals it with."""
    nearly_one = 1 - EQUAL**2 / 2
    if unit.is_cpu:  # by numpy's plain loops: torch's would wait for threads, which a forked process has not
        u = unit.numpy()
        cosines = np.einsum("ik,jk->ij", u, u)
        index = (np.abs(cosines) > nearly_one).argmax(1)
        return torch.from_numpy(np.sign(np.take_along_axis(cosines, index[:, None], 1)) * u[index])
    cosine = unit @ unit.T
    first = (cosine.abs() > nearly_one).int().argmax(1)
    return cosine.gather(1, first[:, None]).sign() * unit[first]


_prepared = Derived(_prepare, 32)


def _run(filters: Tensor, keys: Tensor, topk: int | None, positive: bool, backend: str) -> tuple[Tensor, ...]:
    outputs = _empty(filters, keys, topk, positive, backend)
    _fit(filters, keys, positive, backend, *outputs)
    return outputs


def _run_out(
    filters: Tensor, keys: Tensor, topk: int | None, positive: bool, backend: str, *,
    scale: Tensor, shift: Tensor, residual: Tensor, index: Tensor,
) -> None:  # fmt: skip
    outputs = {"scale": scale, "shift": shift, "residual": residual, "index": index}
    refuse_overlap({"filters": filters, "keys": keys}, outputs)
    _fit(filters, keys, positive, backend, **outputs)
    torch.autograd.graph.increment_version(list(outputs.values()))


def _fit(
    filters: Tensor, keys: Tensor, positive: bool, backend: str,
    scale: Tensor, shift: Tensor, residual: Tensor, index: Tensor,
) -> None:  # fmt: skip
    implementation = choose("affine_fit", filters.device, backend or None)
    if len(filters) == 0:
        return
    ranked = (x if x.ndim == 2 else x[:, None] for x in (index, scale, shift, residual))
    # On a GPU anew at each call: what one stream prepared, another must wait for.
    prepared = _prepared(keys.detach()) if keys.is_cpu else _prepare(keys)
    implementation.load().affine_fit(filters.detach(), prepared, positive, *ranked)


def _empty(filters: Tensor, keys: Tensor, topk: int | None, positive: bool, backend: str) -> tuple[Tensor, ...]:
    shape = (filters.shape[0],) if topk is None else (filters.shape[0], topk)
    scale, shift, residual = (filters.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return scale, shift, residual, filters.new_empty(shape, dtype=torch.int32)


_library = torch.library.Library("mkf", "DEF")
_ARGUMENTS = "Tensor filters, Tensor keys, int? topk, bool positive, str backend"
_library.define(  # the integer output last: opcheck adds the outputs up in their order
    f"affine_fit({_ARGUMENTS}) -> (Tensor scale, Tensor shift, Tensor residual, Tensor index)"
)
_library.impl("affine_fit", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::affine_fit", _empty, lib=_library)
_library.define(
    f"affine_fit.out({_ARGUMENTS}, *, Tensor(a!) scale, Tensor(b!) shift, Tensor(c!) residual, Tensor(d!) index) -> ()"
)
_library.impl("affine_fit.out", _run_out, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::affine_fit.out", lambda *_, **__: None, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    filters, keys, _, positive, _ = inputs
    _, _, residual, index = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(filters, keys, index, residual)
    ctx.positive = positive


def _backward(ctx: Any, d_scale: Tensor, d_shift: Tensor, d_residual: Tensor, _: Any) -> tuple[Any, ...]:
    """Gradients at the chosen key, e = f' - a q' being what the fit leaves (it is orthogonal to q' and to constants).

    da/df = q' / |q'|^2            db/df = 1/n - mean(q) da/df         dr/df = e / (r |f'|^2) - r f' / |f'|^2
    da/dq = (e - a q') / |q'|^2    db/dq = -a/n - mean(q) da/dq        dr/dq = -a e / (r |f'|^2)

    They are computed with y = f' / size, so that squares of tiny and huge filters stay in range, and r = |e| / |y| of
    this very e: near an exact copy that of the fit differs by rounding, and e / r would be too long. Where the residual
    is 0, or a scale is held at 0 by `sign="positive"`, the zero subgradient is taken. A dead filter only moves its
    shift; a filter that is not finite gets gradient 0.
    """
    filters, keys, *outputs = ctx.saved_tensors
    outputs = [x if x.ndim == 2 else x[:, None] for x in (*outputs, d_scale, d_shift, d_residual)]
    index, residual, d_scale, d_shift, d_residual = outputs
    dtype = torch.promote_types(torch.promote_types(filters.dtype, keys.dtype), torch.float32)
    f, q = filters.flatten(1).to(dtype), keys.flatten(1).to(dtype)
    taps = f.shape[1]
    finite = index[:, :1] >= 0
    f = torch.where(finite, f, 0)
    live = f.amax(1, keepdim=True) > f.amin(1, keepdim=True)
    size = torch.where(live, f.abs().amax(1, keepdim=True), 1)
    y = f / size
    y = y - y.mean(1, keepdim=True)
    squares = y.square().sum(1, keepdim=True)
    q_mean = q.mean(1, keepdim=True)
    q_centred = q - q_mean
    q_squares = q_centred.square().sum(1, keepdim=True)

    d_filters, d_keys = torch.zeros_like(f), torch.zeros_like(q)
    for rank in range(index.shape[1]):
        j = index[:, rank].clamp(min=0)
        da, db, dr = (x[:, rank : rank + 1].to(dtype) for x in (d_scale, d_shift, d_residual))
        key = q_centred[j]
        a = (y * key).sum(1, keepdim=True) / q_squares[j]
        moves = live & (a > 0) if ctx.positive else live
        a, da, dr, db = (torch.where(m, x, 0) for m, x in ((moves, a), (moves, da), (moves, dr), (finite, db)))
        e = y - a * key
        left = moves & (residual[:, rank : rank + 1] > 0)
        r = torch.where(left, (e.square().sum(1, keepdim=True) / squares).sqrt(), 0)
        da = (da - torch.where(moves, db * q_mean[j], 0)) / q_squares[j]
        per_e = torch.where(r > 0, dr / (r * squares), 0)
        per_y = torch.where(r > 0, dr * r / squares, 0)
        d_filters += da * key + db / taps + (per_e * e - per_y * y) / size
        d_keys.index_add_(0, j, (da * (e - a * key) - db * a / taps) * size - per_e * a * e)
    return d_filters.view(filters.shape).to(filters.dtype), d_keys.view(keys.shape).to(keys.dtype), None, None, None


torch.library.register_autograd("mkf::affine_fit", _backward, setup_context=_setup_context, lib=_library)
