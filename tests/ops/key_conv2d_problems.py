"""Problems for the key convolution and what float64 makes of them, for the tests beside this file."""

import math

import torch
from torch.nn import functional as F

import mkf
from mkf.kernels import extension
from mkf.ops import key_conv2d
from mkf.ops.key_conv2d import eager

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Problem:
    """Tensors of one call, and what torch makes of them with the filters written out."""

    def __init__(self, shape, keys, *, dtype=torch.float32, layout="nchw", shift=True, bias=True, blocks=0, seed=0):
        n, c, h, w = shape
        generator = torch.Generator().manual_seed(seed)
        self.keys = keys if isinstance(keys, torch.Tensor) else keys.filters
        if blocks:
            self.index = (torch.arange(c) // blocks % len(self.keys)).int()
        else:
            self.index = torch.randint(len(self.keys), (c,), generator=generator, dtype=torch.int32)
        self.x = torch.randn(n, c, h, w, generator=generator).to(dtype).to(memory_format=LAYOUTS[layout])
        self.scale = torch.randn(c, generator=generator)
        self.shift = 0.3 * torch.randn(c, generator=generator) if shift else torch.zeros(c)
        self.bias = torch.randn(c, generator=generator) if bias else None
        self.options = {"padding": self.keys.shape[-1] // 2}

    def tensors(self):
        return self.x, self.keys, self.index, self.scale, self.shift, self.bias

    def torch(self, dtype, x, keys, index, scale, shift, bias):
        """The same with an ordinary convolution in that dtype."""
        weight = (scale[:, None, None].to(dtype) * keys.to(dtype)[index] + shift[:, None, None].to(dtype))[:, None]
        bias = None if bias is None else bias.to(dtype)
        return F.conv2d(x.to(dtype), weight, bias, **self.options, groups=len(index))

    def check(self, run, wanted=("x", "scale", "shift", "bias")):
        """The output and the gradients are not much further from float64 than torch's in the same dtype."""
        tensors = dict(zip(("x", "keys", "index", "scale", "shift", "bias"), self.tensors(), strict=True))
        wanted = [name for name in wanted if tensors[name] is not None]
        ours = derive(lambda *t: run(*t, **self.options), tensors, wanted)
        assert ours[0].dtype == self.x.dtype
        theirs = derive(lambda *t: self.torch(self.x.dtype, *t), tensors, wanted)
        exact = derive(lambda *t: self.torch(torch.float64, *t), tensors, wanted)
        # The root of the sum of the squares of what is added up: how much a rounding error of eps in each term makes.
        squares = {name: t if name == "index" or t is None else t.double().square() for name, t in tensors.items()}
        size = derive(lambda *t: self.torch(torch.float64, *t), squares, wanted, power=2)
        for name, *results, square in zip(["output", *wanted], ours, theirs, exact, size, strict=True):
            assert_as_good(name, *results, torch.finfo(self.x.dtype).eps * square.sqrt())
        return ours


def derive(function, tensors, wanted, power=1):
    """The output and the gradients of a function for an arbitrary gradient of the output."""
    leaves = {name: t.detach().clone().requires_grad_() if name in wanted else t for name, t in tensors.items()}
    out = function(*leaves.values())
    dy = noise(*out.shape, seed=9).bfloat16().to(out.dtype) ** power
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], dy) if wanted else ()
    return out.detach(), *gradients


def assert_as_good(name, ours, theirs, exact, rounding):
    assert ours.shape == exact.shape, name
    if exact.numel() == 0:
        return
    for how, measure in (("in norm", torch.Tensor.norm), ("in the worst element", lambda t: t.abs().max())):
        error, reference, unavoidable = (measure(t).item() for t in (ours - exact, theirs - exact, rounding))
        if math.isnan(reference):  # torch's bfloat16 gradient of small filters reads memory that nobody has written
            reference = 0.0
        assert error <= 3 * reference + 8 * unavoidable, f"{name} {how}: error {error}, torch's {reference}"


KEYS = {
    "published": mkf.keys.paper8(),
    "analytic": mkf.keys.analytic("B"),
    "centred": mkf.KeySet(mkf.keys.analytic("A").centred()),
    "mixed": mkf.KeySet(torch.cat([mkf.keys.analytic("C1").filters, mkf.keys.random(7, 3, 0).filters])),
}


def call_and_keep(problem):
    for _ in range(2):
        key_conv2d(*problem.tensors(), padding=3)
    options = 1, 3, 1, 0.0, None
    found = eager.find(*problem.tensors(), options)
    assert (found is None) == bool(extension.missing())  # None elsewhere: this torch has other guards
