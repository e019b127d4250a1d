"""Combinations of keys: the least-squares fit of a filter by several keys at once.

Reviewers of "The Quest for Universal Master Key Filters in DS-CNNs" asked how much closer linear combinations of the
keys come to a filter than one key does; the papers give no method, so what follows is our choice.

With means removed (f' = f - mean(f), u_j = (q_j - mean(q_j)) / ||q_j - mean(q_j)||) the numbers c minimise
||f' - sum_j c_j u_j||, and

    scale_j = c_j / ||q_j - mean(q_j)||,   shift = mean(f) - sum_j scale_j * mean(q_j),
    residual = ||f' - sum_j c_j u_j|| / ||f'||.

*All K keys* enter by the pseudo-inverse of their matrix u. At most k*k - 1 of them are independent; where they are not
(singular values below float32's epsilon * max(K, k*k) of the largest count as zero, as in `numpy.linalg.matrix_rank`)
the c of least norm is taken.

*m keys* of each filter are chosen greedily, and come in the order of choice: first the key that fits best, the same as
for a single key, then always the one that lowers the residual most together with those chosen before (orthogonal least
squares: Chen, Billings, Luo 1989, "Orthogonal least squares methods and their application to non-linear system
identification"; orthogonal matching pursuit differs in that it compares keys without removing from them what the
chosen ones span). Equal ones: the lowest index. A key that adds nothing, because the chosen ones span it or the filter,
gets scale 0. The choice is not always the best of all sets of m keys.

Everything is computed in float64 by matrix products on some thousand filters at a time. The residual is taken from the
difference, so it is right however small it is. Unlike with single keys, results on another number of threads or of
filters may differ in the last digit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mkf.ops.arguments import CentredKeys, centred_keys, refuse_overlap

DEPENDENT = torch.finfo(torch.float32).eps
"""Of keys of norm 1, for each of max(K, k*k): what dependent keys in float32 may have left beside one another."""

NOTHING = 1e-14
"""Of a filter of norm 1: a correlation, or a residual, that is only rounding."""

TIE = 1e-12
"""Relative difference of two keys' gains that is only rounding."""

WORKING_BYTES = 16 << 20
"""What a piece of filters takes while it is fitted; on a GPU 64 times that, for it to be busy."""


class _Piece(NamedTuple):
    """R filters with their means removed, and divided by their size to keep squares in range.

    Attributes:
        centred: (R, n) float64, y = f' / size; 0 where a filter is not live.
        size: (R,) float64, largest magnitude.
        mean: (R,) float64.
        finite: (R,) bool, without NaN and Inf.
        live: (R,) bool, finite and not constant.
    """

    centred: Tensor
    size: Tensor
    mean: Tensor
    finite: Tensor
    live: Tensor


def _piece(filters: Tensor) -> _Piece:
    f = filters.flatten(1).double()
    low, high = f.amin(1), f.amax(1)  # not aminmax, which older versions of torch do not differentiate
    finite = low.isfinite() & high.isfinite()
    live = finite & (low < high)
    size = torch.where(live, torch.maximum(-low, high), 1)
    x = (f / size[:, None]).masked_fill_(~live[:, None], 0)
    mean = x.mean(1)
    return _Piece(x.sub_(mean[:, None]), size, torch.where(live, mean * size, low), finite, live)


def _pieces(count: int, keys: Tensor, topk: int | None) -> Iterator[slice]:
    """Slices of filters of which one fits into the working memory."""
    taps, several = keys[0].numel(), topk or 0
    columns = 8 * (taps + len(keys)) + several * (2 * taps + several)
    budget = WORKING_BYTES if keys.device.type == "cpu" else 64 * WORKING_BYTES
    rows = max(1, budget // (8 * columns))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


class _Solution(NamedTuple):
    """The c that minimise ||y - sum_j c_j u_j||, for R filters.

    Attributes:
        keys: (R, m) int64, their numbers j.
        c: (R, m) float64.
        dual: From w, (R, m), to the h with <u_i, sum_j h_j u_j> = w_i; c is the h of w_i = <u_i, y>.
    """

    keys: Tensor
    c: Tensor
    dual: Callable[[Tensor], Tensor]


def _with_all(q: CentredKeys) -> Callable[[Tensor], _Solution]:
    """All keys, for filters y (R, n)."""
    inverse = torch.linalg.pinv(q.unit, rtol=DEPENDENT * max(q.unit.shape))
    index = torch.arange(len(q.unit), device=inverse.device)
    return lambda y: _Solution(index.expand(len(y), -1), y @ inverse, lambda w: w @ inverse.T @ inverse)


def _with_few(y: Tensor, q: CentredKeys, topk: int, given: Tensor | None = None) -> _Solution:
    """For each filter the `topk` keys that are best one after the other, or those given, by orthogonalisation."""
    chosen = torch.empty(len(y), topk, dtype=torch.int64, device=y.device)
    adds = torch.empty_like(chosen, dtype=torch.bool)
    directions = y.new_empty(len(y), topk, y.shape[1])  # orthonormal; 0 for a key that adds nothing
    energy = y.new_ones(len(y), len(q.unit))  # squared norm of what the directions leave of each key
    least = (DEPENDENT * max(q.unit.shape)) ** 2
    noise = NOTHING**2 * y.square().sum(1, keepdim=True)
    left = y
    for step in range(topk):
        squares = (left @ q.unit.T).square()
        gain = torch.where((energy > least) & (squares > noise), squares / energy, 0)
        gain.scatter_(1, chosen[:, :step], -1)
        good = gain >= gain.amax(1, keepdim=True) * (1 - TIE)
        j = good.int().argmax(1, keepdim=True) if given is None else given[:, step : step + 1]  # the first of them
        chosen[:, step : step + 1] = j
        adds[:, step : step + 1] = gain.gather(1, j) > 0
        direction, before = q.unit[j[:, 0]], directions[:, :step]
        for _ in range(2):  # once is not enough where keys are nearly dependent
            direction = direction - ((direction[:, None] @ before.mT) @ before)[:, 0]
        direction = torch.where(adds[:, step : step + 1], direction / direction.norm(dim=1, keepdim=True), 0)
        directions[:, step] = direction
        left = left - (left * direction).sum(1, keepdim=True) * direction
        energy -= (direction @ q.unit.T).square()
    # Key t is the sum over s <= t of triangle[t, s] * direction s.
    triangle = torch.where(adds[:, :, None], q.unit[chosen] @ directions.mT, torch.diag_embed((~adds).to(y)))

    def keys_of(along: Tensor) -> Tensor:
        c: Tensor = torch.linalg.solve_triangular(triangle.mT, along, upper=True)
        return c[:, :, 0]

    def dual(w: Tensor) -> Tensor:
        return keys_of(torch.linalg.solve_triangular(triangle, torch.where(adds, w, 0)[:, :, None], upper=False))

    return _Solution(chosen, keys_of(directions @ y[:, :, None]), dual)


def _sum(index: Tensor, values: Tensor, keys: Tensor) -> Tensor:
    """The sum over j of each filter's values times its keys, (R, n)."""
    return _table(index, values, len(keys)) @ keys


def _table(index: Tensor, values: Tensor, columns: int) -> Tensor:
    return values.new_zeros(len(values), columns).scatter_(1, index, values)


def _run_out(
    filters: Tensor, keys: Tensor, topk: int | None, *,
    scale: Tensor, shift: Tensor, residual: Tensor, index: Tensor,
) -> None:  # fmt: skip
    outputs = {"scale": scale, "shift": shift, "residual": residual, "index": index}
    refuse_overlap({"filters": filters, "keys": keys}, outputs)
    _fit(filters, keys, topk, **outputs)


def _run(filters: Tensor, keys: Tensor, topk: int | None) -> tuple[Tensor, ...]:
    scale, shift, residual, index = _empty(filters, keys, topk)
    _fit(filters, keys, topk, scale=scale, shift=shift, residual=residual, index=index)
    return scale, shift, residual, index


def _fit(
    filters: Tensor, keys: Tensor, topk: int | None, *,
    scale: Tensor, shift: Tensor, residual: Tensor, index: Tensor,
) -> None:  # fmt: skip
    q = centred_keys(keys)
    solve = _with_all(q) if topk is None else partial(_with_few, q=q, topk=topk)
    for rows in _pieces(len(filters), keys, topk):
        piece = _piece(filters[rows])
        j, c, _ = solve(piece.centred)
        left = piece.centred - _sum(j, c, q.unit)
        a = c * piece.size[:, None] / q.norm[j]
        b = piece.mean - (a * q.mean[j]).sum(1)
        r = (left.norm(dim=1) / piece.centred.norm(dim=1)).clamp(max=1)

        finite = piece.finite
        scale[rows] = torch.where(finite[:, None], a, torch.nan)
        shift[rows] = torch.where(finite, b, torch.nan)
        residual[rows] = torch.where(finite, torch.where(piece.live, r, 0), torch.nan)
        index[rows] = torch.where(finite[:, None], j, -1)


def _empty(filters: Tensor, keys: Tensor, topk: int | None) -> tuple[Tensor, ...]:
    count, several = (filters.shape[0],), (filters.shape[0], keys.shape[0] if topk is None else topk)
    scale, shift, residual = (filters.new_empty(shape, dtype=torch.float32) for shape in (several, count, count))
    return scale, shift, residual, filters.new_empty(several, dtype=torch.int32)


_library = torch.library.Library("mkf", "FRAGMENT")
_library.define(
    "affine_combination(Tensor filters, Tensor keys, int? topk)"
    " -> (Tensor scale, Tensor shift, Tensor residual, Tensor index)"
)
_library.impl("affine_combination", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::affine_combination", _empty, lib=_library)
_library.define(
    "affine_combination.out(Tensor filters, Tensor keys, int? topk, *,"
    " Tensor(a!) scale, Tensor(b!) shift, Tensor(c!) residual, Tensor(d!) index) -> ()"
)
_library.impl("affine_combination.out", _run_out, "CompositeExplicitAutograd")
torch.library.register_fake("mkf::affine_combination.out", lambda *_, **__: None, lib=_library)

affine_combination = torch.ops.mkf.affine_combination


def _gradients(
    filters: Tensor, keys: Tensor, topk: int | None, index: Tensor,
    d_scale: Tensor, d_shift: Tensor, d_residual: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients at the chosen keys, for y = f' / size, e = y - sum_j c_j u_j and r = ||e|| / ||y||.

    With w = dL/dc, h the solution for the products w instead of <y, u_j>, and p = sum_j h_j u_j:

        dL/dy = p + dL/dr (e / r - r y) / ||y||^2,    dL/du_j = h_j e - c_j p - dL/dr c_j e / (r ||y||^2).

    Where the residual is 0 the zero subgradient is taken. A dead filter only moves its shift; one that is not finite
    gets gradient 0. Dependent keys are differentiated as if they stayed dependent.
    """
    q = centred_keys(keys)
    taps, every = q.unit.shape[1], _with_all(q)
    d_filters = filters.new_empty(filters.shape)
    d_unit, d_norm, d_mean = (torch.zeros_like(x) for x in q)
    for rows in _pieces(len(filters), keys, topk):
        piece = _piece(filters[rows])
        y, size, live = piece.centred, piece.size[:, None], piece.live[:, None]
        j = index[rows].long().clamp(min=0)
        c, dual = (every(y) if topk is None else _with_few(y, q, topk, given=j))[1:]
        e = y - _sum(j, c, q.unit)
        squares = y.square().sum(1, keepdim=True)
        r = (e.square().sum(1, keepdim=True) / squares).sqrt()

        da, db, dr = (x.double() for x in (d_scale[rows], d_shift[rows, None], d_residual[rows, None]))
        db = torch.where(piece.finite[:, None], db, 0)
        da = torch.where(live, da - db * q.mean[j], 0)
        moves = live & (r > NOTHING)
        per_e, per_y = (torch.where(moves, x, 0) for x in (dr / (r * squares), dr * r / squares))
        h = dual(da * size / q.norm[j])
        p = _sum(j, h, q.unit)
        d_filters[rows] = ((p + per_e * e - per_y * y) / size + db / taps).view(-1, *filters.shape[1:])

        a = c * size / q.norm[j]
        h, c, per_norm, per_mean = (_table(j, x, len(q.unit)) for x in (h, c, da * a, db * a))
        d_unit += h.T @ e - c.T @ (p + per_e * e)
        d_norm -= per_norm.sum(0) / q.norm
        d_mean -= per_mean.sum(0)
    along = (d_unit * q.unit).sum(1, keepdim=True)
    d_centred = (d_unit - along * q.unit) / q.norm[:, None] + d_norm[:, None] * q.unit
    d_keys = d_centred + d_mean[:, None] / taps
    return d_filters, d_keys.view(keys.shape).to(keys.dtype)


_library.define(
    "affine_combination_gradients(Tensor filters, Tensor keys, int? topk, Tensor index,"
    " Tensor d_scale, Tensor d_shift, Tensor d_residual) -> (Tensor, Tensor)"
)
_library.impl("affine_combination_gradients", _gradients, "CompositeExplicitAutograd")
# Made of torch's operations, it is differentiated through them where second derivatives are asked for: with respect to
# the filters, as the keys are prepared without a graph.
_library.impl("affine_combination_gradients", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake(
    "mkf::affine_combination_gradients",
    lambda filters, keys, *_: (filters.new_empty(filters.shape), keys.new_empty(keys.shape)),
    lib=_library,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    filters, keys, ctx.topk = inputs
    index = output[3]
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(filters, keys, index)


def _backward(ctx: Any, d_scale: Tensor, d_shift: Tensor, d_residual: Tensor, _: Any) -> tuple[Any, ...]:
    filters, keys, index = ctx.saved_tensors
    if torch.is_grad_enabled() and keys.requires_grad:  # create_graph=True
        raise NotImplementedError(
            "second derivatives of a combination are those with respect to filters alone, and the keys require "
            "gradients too: give keys.detach()"
        )
    gradients = torch.ops.mkf.affine_combination_gradients
    return *gradients(filters, keys, ctx.topk, index, d_scale, d_shift, d_residual), None


torch.library.register_autograd("mkf::affine_combination", _backward, setup_context=_setup_context, lib=_library)
