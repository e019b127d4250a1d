"""What is computed once from a tensor's values, and again when they change."""

import pytest
import torch

from mkf.kernels.derived import Derived


class Count:
    """A function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: torch.Tensor, *arguments: object) -> tuple[int, object]:
        self.calls += 1
        return self.calls, None if tensor.is_meta else (tensor.tolist(), *arguments)


@pytest.fixture
def count() -> Count:
    return Count()


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.data.add_(1),
        lambda t: t.numpy().__iadd__(1),
        lambda t: t[2].fill_(0),
        lambda t: t.neg_(),
    ],
)
def test_every_way_of_writing_is_noticed_on_the_cpu(count: Count, write) -> None:
    derived = Derived(count)
    tensor = torch.arange(1.0, 5)
    assert derived(tensor) is derived(tensor)
    write(tensor)
    assert derived(tensor)[1] == (tensor.tolist(),)
    assert count.calls == 2


def test_equal_values_are_known_wherever_they_are(count: Count) -> None:
    derived = Derived(count)
    tensor = torch.arange(6)
    first = derived(tensor)
    assert derived(tensor.clone()) is first
    tensor.add_(1)
    derived(tensor)
    tensor.sub_(1)
    assert derived(tensor) is first
    assert count.calls == 2


def test_the_same_bytes_can_be_something_else(count: Count) -> None:
    derived = Derived(count)
    tensor = torch.zeros(4)
    results = [derived(t) for t in (tensor, tensor.view(2, 2), tensor.view(torch.int32), tensor[:2], tensor.view(1, 4))]
    assert count.calls == 5
    assert [r[1] for r in results][1] == ([[0, 0], [0, 0]],)
    assert derived(tensor, 0.5)[1] == ([0, 0, 0, 0], 0.5)
    assert derived(tensor, 0.1) is not derived(tensor, 0.5)


def test_any_strides(count: Count) -> None:
    derived = Derived(count)
    tensor = torch.arange(6.0).view(2, 3)
    assert derived(tensor.T)[1] == ([[0, 3], [1, 4], [2, 5]],)
    assert derived(tensor.T) is derived(tensor.T.contiguous())
    shadow = torch.empty(3, 3, device="meta")
    assert derived(shadow) is not derived(shadow.T)
    assert derived(shadow.T) is derived(shadow.T)


def test_a_tensor_that_requires_a_gradient(count: Count) -> None:
    derived = Derived(count)
    parameter = torch.nn.Parameter(torch.ones(3))
    assert derived(parameter) is derived(parameter)


def test_old_results_go(count: Count) -> None:
    derived = Derived(count, size=3)
    tensors = [torch.full((2,), i) for i in range(8)]
    for tensor in tensors:
        derived(tensor)
    assert len(derived._known) == len(derived._last) == 3
    derived(tensors[0])
    assert count.calls == 9


def test_a_tensor_that_must_not_be_read_is_known_by_its_version(count: Count) -> None:
    """On the meta device, which like a GPU is not the CPU."""
    derived = Derived(count)
    tensor = torch.empty(4, device="meta")
    assert derived(tensor) is derived(tensor) is derived(tensor.detach())
    tensor.add_(1)
    derived(tensor)
    assert count.calls == 2
    with torch.inference_mode():  # no version is kept
        untracked = torch.empty(4, device="meta")
    derived(untracked)
    derived(untracked)
    assert count.calls == 4


def test_what_is_written_elsewhere_is_read_again_and_may_be_known(count: Count) -> None:
    class Elsewhere(torch.Tensor):
        """A tensor on a GPU, as far as anyone can see."""

        is_cpu = False

        def cpu(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    derived = Derived(count)
    tensor = torch.arange(4.0).as_subclass(Elsewhere)
    first = derived(tensor)
    tensor.copy_(torch.arange(4.0))  # as DDP does with buffers
    assert derived(tensor) is derived(tensor.clone()) is first
    assert derived(tensor.add_(1)) is not first
    assert count.calls == 2
