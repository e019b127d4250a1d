"""From keys to the plan by which they are convolved with."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mkf.kernels.derived import Derived
from mkf.kernels.key_conv2d import KeyPlan, structure


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError for what is no relative error in [0, 1)."""
    if not (isinstance(tolerance, int | float) and 0 <= tolerance < 1):
        raise ValueError(f"tolerance={tolerance!r}: it is a relative error, in [0, 1)")


def make_plan(keys: Tensor, tolerance: float = 0.0, dtype: torch.dtype = torch.float32) -> KeyPlan:
    """Find the cheapest description of each key; some milliseconds.

    Args:
        keys: (K, k, k).
        tolerance: The largest relative L2 error of a key; 0 for exact, which is to float32 rounding.
        dtype: Of the keys in the plan, float32 or float64.

    Raises:
        ValueError: A key is not finite, or the tolerance is not in [0, 1).
    """
    check_tolerance(tolerance)
    keys = keys.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    values = keys.double().cpu().numpy()
    finite = np.isfinite(values).all((1, 2))
    if not finite.all():
        raise ValueError(f"keys {np.flatnonzero(~finite).tolist()} are not finite: repair them or leave them out")
    plan = _all_direct(*keys.shape[:2])
    found = [structure.find(key, tolerance) for key in values]
    separable = [i for i, key in enumerate(found) if key.multiplications < keys[0].numel()]
    most = max((found[i].rank for i in separable), default=1) or 1
    shape = (len(keys), most, keys.shape[-1])
    plan = KeyPlan(**{name: x.clone() for name, x in vars(plan).items()})
    columns, rows = (torch.zeros(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    plan = replace(plan, keys=keys, columns=columns, rows=rows)
    for i in separable:
        key = found[i]
        plan.direct[i] = False
        plan.terms[i] = key.rank
        plan.columns[i, : key.rank] = key.columns.T
        plan.rows[i, : key.rank] = key.rows
        plan.box[i] = key.box
        for tap in key.taps:
            plan.tap_row[i], plan.tap_column[i], plan.tap[i] = tap
    missed = (torch.from_numpy(values) - plan.dense()).flatten(1).norm(dim=1)
    size = torch.from_numpy(values).flatten(1).norm(dim=1)
    return replace(plan, error=torch.where(size > 0, missed / size, 0.0))


def plan_of(keys: Tensor, tolerance: float | None, dtype: torch.dtype = torch.float32) -> KeyPlan:
    """The plan of keys as they are now, made once as long as they stay what they are (see `mkf.kernels.derived`).

    Args:
        keys: See `make_plan`, as `dtype`.
        tolerance: The same. None takes the keys as k * k taps without looking at them: for keys that train,
            which are others at every step.
        dtype: See `make_plan`.
    """
    if tolerance is None:
        return replace(_all_direct(*keys.shape[:2]), keys=keys.detach().to(dtype).contiguous())
    return _plans(keys, tolerance, dtype)


_plans = Derived(make_plan)


@cache
def _all_direct(count: int, k: int) -> KeyPlan:
    """A plan of k * k taps for every key; its keys are zero."""
    with torch.device("cpu"):  # whatever the default is
        zero, integer = torch.zeros(count, dtype=torch.float32), torch.zeros(count, dtype=torch.int32)
        factors, taps = (torch.zeros(count, n, k, dtype=torch.float32) for n in (1, k))
        direct = torch.ones(count, dtype=torch.bool)
    return KeyPlan(
        keys=taps,
        direct=direct,
        terms=integer,
        columns=factors,
        rows=factors,
        box=zero,
        tap=zero,
        tap_row=integer,
        tap_column=integer,
        error=zero.double(),
    )
