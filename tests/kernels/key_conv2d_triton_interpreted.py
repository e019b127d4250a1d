"""The Triton kernel in Triton's interpreter; test_key_conv2d_gpu.py runs this file in a process of its own."""

import pytest
import torch

from mkf.kernels.key_conv2d import triton
from tests.kernels.key_conv2d_cases import DIRECT, EVERY, LAPLACIAN, OFF_CENTRE, ONE, Case


def forward(x, plan, index, scale, shift, bias, stride, padding, dilation, out):
    triton.launch(x, None, out, None, plan, index, scale, shift, bias, stride[0], backward=False)


def backward(dy, x, plan, index, scale, shift, stride, padding, dilation, *gradients):
    triton.launch_backward(dy, x, plan, index, scale, shift, stride[0], *gradients)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("k", "shape", "channels_last", "kinds", "shifted", "dtype"),
    [
        (3, (3, 5, 9, 7), True, (LAPLACIAN, ONE), True, torch.float32),
        (5, (1, 33, 3, 5), True, (ONE,), False, torch.float16),
        (7, (1, 3, 9, 5), False, (LAPLACIAN,), False, torch.float32),
        (7, (1, 4, 10, 3), True, (DIRECT, OFF_CENTRE), True, torch.float32),
        (11, (1, 9, 2, 2), False, EVERY, True, torch.float32),
    ],
    ids=str,
)
def test_forward_and_backward(k, shape, channels_last, kinds, shifted, dtype, stride):
    case = Case(shape, k, stride, dtype, channels_last, kinds, shifted)
    case.check_forward(case.forward(forward))
    case.check_backward(case.backward(backward))


@pytest.mark.parametrize(
    "wanted",
    [(True, False, False, False), (False, True, False, True), (False, False, True, False), (False, False, False, True)],
)
def test_only_some_gradients(wanted):
    case = Case((1, 3, 9, 4), 3, 1, torch.float32, True, (LAPLACIAN,))
    case.check_backward(case.backward(backward, wanted))


def test_what_is_not_finite_stays_within_its_window():
    case = Case((1, 1, 12, 12), 3, 1, torch.float32, True, (LAPLACIAN,))
    expected = case.forward(forward)
    case.x[0, 0, 6, 6] = torch.inf
    out = case.forward(forward)
    assert not out[0, 0, 5:8, 5:8].isfinite().any()
    out[0, 0, 5:8, 5:8] = expected[0, 0, 5:8, 5:8]
    assert torch.equal(out, expected)
