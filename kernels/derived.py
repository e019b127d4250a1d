"""What follows from the values of a small tensor, computed once as long as they stay what they are."""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """A function of a tensor that is called again only for other values.

    A tensor on the CPU is known by its bytes (for a few kB a microsecond), so nothing that is written to it goes
    unnoticed, whichever way. To read a tensor on a GPU would wait for everything queued there; it is known by its
    address and version counter, so all of torch's in-place functions count, but writing through `.data`, DLPack or a
    kernel of one's own does not.

    Args:
        function: Takes the tensor and what is given with it.
        size: How many results are kept; the oldest go first.
    """

    def __init__(self, function: Callable[..., T], size: int = 256) -> None:
        self.function = function
        self.size = size
        self._known: dict[Hashable, tuple[T, Tensor | None]] = {}
        self._lock = Lock()

    def __call__(self, tensor: Tensor, *arguments: Hashable) -> T:
        """The function's result for a tensor that requires no gradient.

        Raises:
            RuntimeError: The tensor is new, on a GPU, and a CUDA graph is being captured, where nothing can be read.
        """
        alive = None
        identity: Hashable
        if tensor.device.type == "cpu":
            identity = (tensor.numpy().tobytes(), tensor.shape, tensor.dtype, arguments)
        elif tensor.is_inference():  # these have no version counter
            return self.function(tensor, *arguments)
        else:
            alive = tensor.detach()  # kept with the result, so that no other tensor can come to the same address
            place = tensor.device, tensor.data_ptr(), tensor._version
            identity = (place, tensor.shape, tensor.stride(), tensor.dtype, arguments)
        known = self._known.get(identity)
        if known is None:
            if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph is being captured, and a tensor whose values must be read is new or was written to: "
                    "call once with it before the capture"
                )
            known = self.function(tensor, *arguments), alive
            with self._lock:
                while len(self._known) >= self.size:
                    del self._known[next(iter(self._known))]
                self._known[identity] = known
        return known[0]
