"""What follows from the values of a small tensor, computed once as long as they stay what they are."""

from collections.abc import Callable, Hashable
from ctypes import string_at
from threading import RLock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mkf.kernels.gpu import is_capturing

T = TypeVar("T")


def values_of(tensor: Tensor) -> Hashable:
    """What changes when the values of a contiguous tensor are written to, as long as the tensor is kept.

    Those of a tensor on the CPU are its bytes (for a few kB a microsecond), so nothing that is written goes unnoticed,
    whichever way. To read a tensor on a GPU would wait for everything queued there; what changes is its address or its
    version counter, so all of torch's in-place functions count, but writing through `.data`, DLPack or a kernel of
    one's own does not. A tensor made there in inference mode has no version counter: its values never equal others.
    """
    if tensor.is_cpu:
        return string_at(tensor.data_ptr(), tensor.nbytes)
    return object() if tensor.is_inference() else (tensor.device, tensor.data_ptr(), tensor._version)


_Last = tuple[Hashable, T, Tensor | None]  # the values of a tensor, what follows from them, and it, if on a GPU


class Derived(Generic[T]):
    """A function of a small tensor that is called again only for other values, as `values_of` tells them.

    A tensor that the function would first convert is better given as it is: on a GPU, a new one has unknown values.

    Args:
        function: Takes the tensor and what is given with it.
        size: How many results are kept; the oldest go first.
    """

    def __init__(self, function: Callable[..., T], size: int = 256) -> None:
        self.function = function
        self.size = size
        self._last: dict[Hashable, _Last[T]] = {}  # by place, so that bytes need not be hashed
        self._known: dict[Hashable, tuple[T]] = {}
        self._lock = RLock()  # what goes may call whatever waits for its end

    def __call__(self, tensor: Tensor, *arguments: Hashable) -> T:
        """The function's result for a tensor.

        Raises:
            RuntimeError: The tensor is new, on a GPU, and a CUDA graph is being captured, where nothing can be read.
        """
        if tensor.is_cpu:
            tensor = tensor.resolve_neg().contiguous()
        values = values_of(tensor)
        where = tensor.data_ptr() if tensor.is_cpu else (values, tensor.stride())
        place = where, tensor.shape, tensor.dtype, arguments
        last = self._last.get(place)
        if last is None or last[0] != values:
            last = self._look_up(values, tensor, arguments)
            self._put(self._last, place, last)
        return last[1]

    def _look_up(self, values: Hashable, tensor: Tensor, arguments: tuple[Hashable, ...]) -> _Last[T]:
        if is_capturing(tensor):
            raise RuntimeError(
                "a CUDA graph is being captured, and a tensor whose values must be read is new, was written to or was "
                "made in inference mode: call once before the capture with one that stays as it is"
            )
        seen = values
        if tensor.is_meta:
            seen = values, tensor.stride()
        elif not tensor.is_cpu:
            # What was written to often holds what it held, as buffers that DDP broadcasts.
            seen = values_of(tensor.detach().cpu().resolve_neg().contiguous())
        identity = seen, tensor.shape, tensor.dtype, tensor.device, arguments
        known = self._known.get(identity)
        if known is None:
            with torch.inference_mode(False):  # a result may outlive it
                known = (self.function(tensor, *arguments),)
            self._put(self._known, identity, known)
        # A tensor on a GPU is kept with the result, so that no other one can come to the same address.
        return values, known[0], None if tensor.is_cpu else tensor.detach()

    def _put(self, results: dict[Hashable, Any], identity: Hashable, result: Any) -> None:
        with self._lock:
            while len(results) >= self.size:
                del results[next(iter(results))]
            results[identity] = result
