"""Peers of `mkf.key_conv2d`: what a user of PyTorch would write for a depthwise layer whose filters do not train.

Each takes a weight (C, 1, k, k) and a bias (C,) and gives a function of x. The fastest layout and formulation differ by
shape, so a claim names which of them it was made against. Of images of one pixel the weight's strides tell the layout.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Peer = Callable[[Tensor], Tensor]


def module(weight: Tensor, bias: Tensor, stride: int = 1) -> nn.Conv2d:
    """An `nn.Conv2d` with its weight frozen and its bias trained."""
    channels, _, k, _ = weight.shape
    conv = nn.Conv2d(channels, channels, k, stride, k // 2, groups=channels)
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def free_module(weight: Tensor, bias: Tensor, stride: int = 1) -> nn.Conv2d:
    """An `nn.Conv2d` that trains whole."""
    conv = module(weight, bias, stride)
    conv.weight.requires_grad_(True)
    return conv


def bias_added(weight: Tensor, bias: Tensor, stride: int = 1) -> Peer:
    """The convolution, and its bias added in place: spares the slow gradient of a convolution with a bias."""
    bias = bias.view(-1, 1, 1).detach().clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight)).add_(bias)

    return run


def compiled(make: Callable[..., Peer]) -> Callable[..., Peer]:
    """The same under torch.compile."""

    def make_compiled(weight: Tensor, bias: Tensor, stride: int = 1) -> Peer:
        run: Peer = torch.compile(make(weight, bias, stride), dynamic=False)
        return run

    return make_compiled


PEERS: dict[str, Callable[..., Peer]] = {
    "nn.Conv2d, weight frozen": module,
    "F.conv2d + bias, weight frozen": bias_added,
    "nn.Conv2d": free_module,
    "torch.compile of nn.Conv2d": compiled(free_module),
}
