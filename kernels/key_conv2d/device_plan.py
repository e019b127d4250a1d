"""What the GPU implementations share: the calls they serve, and the plan as they read it."""

import torch
from torch import Tensor

from mkf.kernels.gpu import keep_if_captured
from mkf.kernels.key_conv2d import KeyPlan, Pair

MOST_TERMS = 2  # beyond it k * k taps are as cheap
DIRECT = 2  # the form of a key of k * k taps; terms - 1 are the others


def why_not_call(x: Tensor, plan: KeyPlan, stride: Pair, padding: Pair, dilation: Pair) -> str | None:
    """Serves float32, bfloat16 and float16, stride 1 and 2, dilation 1 and 'same' zero padding."""
    k = plan.keys.shape[-1]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"float32, bfloat16 and float16 only, not {str(x.dtype).removeprefix('torch.')}"
    if k not in (3, 5, 7, 9, 11):
        return f"odd kernels of 3 to 11 only, not {k}"
    if tuple(stride) not in ((1, 1), (2, 2)):
        return f"stride 1 and 2 only, not {tuple(stride)}"
    if tuple(padding) != (k // 2, k // 2):
        return f"'same' zero padding, {k // 2}, only, not {tuple(padding)}"
    if tuple(dilation) != (1, 1):
        return f"dilation 1 only, not {tuple(dilation)}"
    return None


def records(plan: KeyPlan) -> Tensor:
    """The plan without the keys, (K, 3 + 4 k) float32 on the CPU: form, box, tap, then 2 columns and 2 rows of k taps.

    The form is 0 for one separable term (or none), 1 for two, and `DIRECT` for k * k taps: also for a key of more terms
    and for one whose tap is not in its centre, which is as near to the key as the plan or nearer.
    """
    count, k = plan.keys.shape[:2]
    centred = (plan.tap == 0) | ((plan.tap_row == k // 2) & (plan.tap_column == k // 2))
    separable = ~plan.direct & (plan.terms <= MOST_TERMS) & centred
    form = torch.where(separable, (plan.terms - 1).clamp(min=0), DIRECT)
    factors = torch.zeros(2, count, MOST_TERMS, k, dtype=torch.float32, device="cpu")
    most = min(MOST_TERMS, plan.columns.shape[1])
    factors[0, :, :most], factors[1, :, :most] = plan.columns[:, :most], plan.rows[:, :most]
    # A key of k * k taps must not make its neighbours in a block pay for a box or a tap.
    head = torch.stack([form, plan.box * separable, plan.tap * separable], 1)
    return torch.cat([head, factors[0].flatten(1), factors[1].flatten(1)], 1)


_records: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
KEPT = 256  # records; the oldest go first


def on_device(plan: KeyPlan, index: Tensor) -> tuple[Tensor, Tensor]:
    """`records(plan)`, on the device of a call's index, and the plan's keys, which are there.

    The records are copied the first time: a CUDA graph must not be the first to ask.
    """
    # Plans that share their columns are the same but for keys that train, which records do not hold.
    identity = id(plan.columns), index.device
    known = _records.get(identity)
    if known is None:
        while len(_records) >= KEPT:
            del _records[next(iter(_records))]
        known = records(plan).to(index.device), plan.columns  # with it, so that no other tensor gets its identity
        _records[identity] = known
    keep_if_captured(index, known[0], plan.keys)
    return known[0], plan.keys
