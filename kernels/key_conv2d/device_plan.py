"""What the GPU implementations share: the calls they serve, and the plan as they read it."""

from collections.abc import Callable

import torch
from torch import Tensor

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


class OnDevice:
    """A function of a plan, kept on each device where it was asked for.

    Args:
        function: From a plan to a tensor on the CPU.
        size: How many results are kept; the oldest go first.
    """

    def __init__(self, function: Callable[[KeyPlan], Tensor], size: int = 256) -> None:
        self.function = function
        self.size = size
        self._known: dict[tuple[int, int, torch.device], tuple[Tensor, KeyPlan]] = {}

    def __call__(self, plan: KeyPlan, device: torch.device) -> Tensor:
        """The result on `device`, copied there the first time: a CUDA graph must not be the first to ask.

        A plan is known by two of its tensors: what is in them does not change.
        """
        identity = id(plan.columns), id(plan.keys), device
        known = self._known.get(identity)
        if known is None:
            while len(self._known) >= self.size:
                del self._known[next(iter(self._known))]
            known = self.function(plan).to(device), plan  # kept with it, so that no other tensor gets its identity
            self._known[identity] = known
        return known[0]


_keys_on = OnDevice(lambda plan: plan.keys.float().contiguous())
_records_on = OnDevice(records)


def on_device(plan: KeyPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """`records(plan)` and the keys, (K, k, k) float32, contiguous on `device`. Keys that are there are not copied."""
    keys = plan.keys.float().contiguous() if plan.keys.device == device else _keys_on(plan, device)
    return _records_on(plan, device), keys
