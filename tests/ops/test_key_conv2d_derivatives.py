"""Derivatives of the key convolution: of every order and mode, and what may happen between forward and backward."""

import copy
from threading import Thread

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mkf
from mkf.ops import key_conv2d
from mkf.ops.key_conv2d import compute
from tests.ops.key_conv2d_problems import KEYS, Problem, call_and_keep, noise

pytestmark = pytest.mark.usefixtures("poisoned")


class TestAutograd:
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("route", [key_conv2d, "op"])
    def test_gradcheck(self, stride, route):
        problem = Problem((2, 3, 5, 4), mkf.keys.random(3, 2, 0).filters.double(), dtype=torch.float64)
        x, keys, index, *parameters = problem.tensors()
        leaves = [t.double().requires_grad_() for t in (x, keys, *parameters)]

        def function(x, keys, scale, shift, bias):
            if route == "op":
                arguments = (stride, stride), (1, 2), (1, 1), None, ""
                return torch.ops.mkf.key_conv2d(x, keys, index, scale, shift, bias, *arguments)
            return key_conv2d(x, keys, index, scale, shift, bias, stride=stride, padding=(1, 2))

        assert torch.autograd.gradcheck(function, leaves)

    @pytest.mark.parametrize("keys_train", [False, True])
    def test_gradients_of_many_at_once(self, keys_train):
        problem = Problem((2, 4, 5, 6), mkf.keys.random(3, 3, 0).filters)
        x, keys, index, *parameters = problem.tensors()
        leaves = [t.requires_grad_() for t in (x, *parameters, *([keys] if keys_train else []))]
        y = key_conv2d(x, keys, index, *parameters, padding=1)
        dy = noise(3, *y.shape)
        many = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in dy]
        for together, alone in zip(many, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)

    def test_second_derivatives(self):
        problem = Problem((1, 3, 4, 5), mkf.keys.random(3, 2, 0).filters.double(), dtype=torch.float64)
        x, keys, index, *parameters = problem.tensors()
        leaves = [t.double().requires_grad_() for t in (x, keys, *parameters)]

        def function(x, keys, scale, shift, bias):
            return key_conv2d(x, keys, index, scale, shift, bias, padding=1)

        assert torch.autograd.gradgradcheck(function, leaves)
        frozen = [t.detach() for t in (keys, *leaves[2:])]
        assert torch.autograd.gradgradcheck(lambda x: key_conv2d(x, frozen[0], index, *frozen[1:]).tanh(), leaves[0])

    def test_gradients_to_differentiate_where_the_input_comes_of_the_parameters(self):
        problem = Problem((2, 4, 6, 5), mkf.keys.random(3, 3, 0))
        x, keys, index, *parameters = problem.tensors()
        leaves = [t.requires_grad_() for t in (keys, *parameters)]

        def several_times(layer):
            y = x
            for _ in range(3):
                y = layer(y).tanh()
            return y.sum()

        ours = several_times(lambda y: key_conv2d(y, leaves[0], index, *leaves[1:], padding=1))
        ordinary = several_times(
            lambda y: compute.written_out(y, leaves[0], index, *leaves[1:], (1, 1), (1, 1), (1, 1))
        )
        expected = torch.autograd.grad(ordinary, leaves, create_graph=True)
        found = torch.autograd.grad(ours, leaves, create_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        again = [torch.autograd.grad(sum(g.square().sum() for g in some), leaves) for some in (found, expected)]
        torch.testing.assert_close(*again, rtol=1e-3, atol=1e-3)

    def test_second_derivatives_of_the_operator_are_refused(self):
        problem = Problem((1, 3, 6, 5), mkf.keys.random(3, 2, 0))
        x = problem.x.requires_grad_()
        out = torch.ops.mkf.key_conv2d(*problem.tensors(), (1, 1), (1, 1), (1, 1), 0.0, "")
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            dx.sum().backward()

    def test_forward_mode(self):
        problem = Problem((1, 3, 6, 5), mkf.keys.random(3, 2, 0), bias=False)
        _, *rest = problem.tensors()
        tangent = noise(1, 3, 6, 5, seed=1)
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(problem.x, tangent)
            out = torch.autograd.forward_ad.unpack_dual(key_conv2d(x, *rest, padding=1))
        torch.testing.assert_close(out.tangent, key_conv2d(tangent, *rest, padding=1))

    def test_forward_mode_through_a_backward_pass(self):
        problem = Problem((2, 4, 6, 5), mkf.keys.random(3, 3, 0))
        x, keys, index, *parameters = problem.tensors()
        for t in (x, *parameters):
            t.requires_grad_()
        dy, tangent = noise(2, *x.shape)
        for y in (
            key_conv2d(x, keys, index, *parameters, padding=1),
            compute.written_out(x, keys, index, *parameters, (1, 1), (1, 1), (1, 1)),
        ):
            with forward_ad.dual_level():
                found = torch.autograd.grad(y, [x, *parameters], forward_ad.make_dual(dy, tangent), retain_graph=True)
                tangents = [forward_ad.unpack_dual(t).tangent for t in found]
            expected = torch.autograd.grad(y, [x, *parameters], tangent)  # it is linear
            torch.testing.assert_close(tangents, list(expected), rtol=1e-4, atol=1e-5)

    def test_forward_mode_compiled(self):
        problem = Problem((2, 4, 6, 5), mkf.keys.random(3, 3, 0))
        x, *others = problem.tensors()

        def jvp(x, tangent):
            return torch.func.jvp(lambda x: key_conv2d(x, *others, padding=1), (x,), (tangent,))

        tangent = noise(*x.shape)
        torch._dynamo.reset()
        found = torch.compile(jvp, backend="eager")(x, tangent)
        torch.testing.assert_close(found, jvp(x, tangent), rtol=1e-4, atol=1e-5)
        assert found[1].norm() > 1

    def test_functional_transforms(self):
        problem = Problem((4, 3, 6, 5), mkf.keys.random(3, 2, 0))
        x, keys, index, scale, shift, bias = problem.tensors()

        def loss(s, x):
            return key_conv2d(x, keys, index, s, shift, bias, padding=1).square().sum()

        per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(scale, x)
        for image, gradient in zip(x, per_image, strict=True):
            s = scale.clone().requires_grad_()
            loss(s, image).backward()
            torch.testing.assert_close(gradient, s.grad)

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_inference_mode(self, backend):
        problem = Problem((1, 12, 6, 5), KEYS["analytic"])
        out = key_conv2d(*problem.tensors(), padding=3, backend=backend)
        with torch.inference_mode():
            tensors = copy.deepcopy(problem).tensors()
            assert torch.equal(key_conv2d(*tensors, padding=3, backend=backend), out)

    def test_what_is_made_in_inference_mode_serves_later(self):
        keys = mkf.keys.random(7, 8, 5)
        with torch.inference_mode():
            problem = Problem((1, 12, 6, 5), keys)
            key_conv2d(problem.x, keys, *problem.tensors()[2:], padding=3)
        problem = Problem((1, 12, 6, 5), keys)
        x, _, *others = problem.tensors()
        others[1].requires_grad_()
        with torch.profiler.profile():
            key_conv2d(x.requires_grad_(), keys, *others, padding=3).sum().backward()
        (dx,) = torch.autograd.grad(key_conv2d(x, keys, *others, padding=3).square().sum(), x, create_graph=True)
        dx.sum().backward()
        problem.check(key_conv2d)


class TestBetweenForwardAndBackward:
    """A gradient is of what was computed, whatever became of its inputs, or it is refused."""

    def gradients(self, change=lambda problem: None, dy=None, of=4, **options):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        leaves = [t.requires_grad_() for t in (problem.x, problem.scale, problem.shift, problem.bias)]
        call_and_keep(problem)
        plain = noise(2, 12, 9, 8)
        torch.autograd.grad(key_conv2d(*problem.tensors(), padding=3), leaves, plain)  # what may be kept of it is
        out = key_conv2d(*problem.tensors(), padding=3)
        change(problem)
        return torch.autograd.grad(out, leaves[:of], plain if dy is None else dy, **options)

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.index.numpy().fill(10**9),
            lambda p: p.index.data.fill_(-(10**8)),
            lambda p: p.keys.mul_(2),
        ],
    )
    def test_keys_and_index_are_those_of_the_forward(self, change):
        for gradient, expected in zip(self.gradients(change), self.gradients(), strict=True):
            assert torch.equal(gradient, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_parameters_may_get_another_dtype(self, dtype):
        def convert(problem):
            for t in (problem.scale, problem.shift):
                t.data = t.data.to(dtype)

        (dx,), (expected,) = self.gradients(convert, of=1), self.gradients(of=1)
        torch.testing.assert_close(dx, expected, rtol=2e-3, atol=2e-2)

    def test_parameters_of_another_size_are_refused(self):
        def shorten(problem):
            problem.scale.data = torch.ones(1)

        with pytest.raises(ValueError, match=r"scale has shape \(1,\)"):
            self.gradients(shorten)

    def test_an_input_of_another_size_is_refused(self):
        def shorten(problem):
            problem.x.data = torch.ones(1, 12, 9, 8)

        with pytest.raises(RuntimeError, match="in the forward pass"):
            self.gradients(shorten)

    @pytest.mark.parametrize("name", ["scale", "shift", "keys"])
    def test_memory_that_is_moved_or_given_back(self, name):
        def move(problem):
            getattr(problem, name).data.share_memory_()

        def give_back_for_a_while(problem):
            tensor = getattr(problem, name)
            values, storage = tensor.detach().clone(), tensor.untyped_storage()
            size = storage.size()
            storage.resize_(0)
            others = [torch.full_like(values, torch.nan) for _ in range(64)]  # where it lay
            storage.resize_(size)
            tensor.data.copy_(values)
            del others

        def gradients(change):
            problem = Problem((2, 12, 9, 8), KEYS["centred"])
            problem.keys = problem.keys.clone()
            leaves = [t.requires_grad_(t is not problem.index) for t in problem.tensors()]
            out = key_conv2d(*leaves, padding=3)
            change(problem)
            return torch.autograd.grad(out, [t for t in leaves if t is not problem.index], noise(2, 12, 9, 8))

        expected = gradients(lambda problem: None)
        for change in (move, give_back_for_a_while):
            for gradient, e in zip(gradients(change), expected, strict=True):
                torch.testing.assert_close(gradient, e)

    def test_hooks_that_store_copies_decide(self):
        def write(problem):
            with torch.no_grad():
                problem.scale.mul_(3)
                problem.shift.add_(1)

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            found = self.gradients(write)
        for gradient, expected in zip(found, self.gradients(), strict=True):
            torch.testing.assert_close(gradient, expected)

    def test_gradients_that_are_negated_or_zero(self):
        expected = self.gradients()
        for gradient, e in zip(self.gradients(dy=torch._neg_view(noise(2, 12, 9, 8))), expected, strict=True):
            torch.testing.assert_close(gradient, -e)
        assert not any(g.any() for g in self.gradients(dy=torch._efficientzerotensor((2, 12, 9, 8))))

    @pytest.mark.parametrize(
        "other",
        [
            lambda dy: dy.to(memory_format=torch.channels_last),
            lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
            lambda dy: dy.clone().requires_grad_(),
        ],
    )
    def test_gradients_that_lie_otherwise(self, other):
        dy = noise(2, 12, 9, 8)
        for gradient, e in zip(self.gradients(dy=other(dy)), self.gradients(dy=dy), strict=True):
            torch.testing.assert_close(gradient, e)

    def test_many_gradients_at_once_after_one(self):
        dy = noise(3, 2, 12, 9, 8)
        together = self.gradients(dy=dy, is_grads_batched=True)
        for i in range(3):
            for many, one in zip(together, self.gradients(dy=dy[i]), strict=True):
                torch.testing.assert_close(many[i], one)

    def test_gradients_of_gradients_after_one(self):
        dy = noise(2, 12, 9, 8).requires_grad_()
        dx, *_ = self.gradients(dy=dy, create_graph=True)
        (expected,) = self.gradients(dy=dy.detach(), of=1)
        torch.testing.assert_close(dx, expected)
        assert torch.autograd.grad(dx.sum(), dy)[0].any()

    def test_checkpoints_compute_the_first_step_again(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        tensors = problem.tensors()
        leaves = [t.requires_grad_() for t in (problem.x, problem.scale, problem.shift, problem.bias)]
        out = checkpoint(lambda x: key_conv2d(x, *tensors[1:], padding=3), problem.x, use_reentrant=False)
        found = torch.autograd.grad(out.sum(), leaves)
        for gradient, e in zip(found, self.gradients(dy=torch.ones_like(out)), strict=True):
            torch.testing.assert_close(gradient, e)

    def test_threads_may_train_together(self):
        problem = Problem((2, 12, 9, 8), KEYS["centred"])
        leaves = [t.requires_grad_() for t in (problem.scale, problem.shift, problem.bias)]
        inputs = [problem.x, problem.x.to(memory_format=torch.channels_last), problem.x[:1]]
        done = []

        def train():
            for step in range(300):
                out = key_conv2d(inputs[step % 3], *problem.tensors()[1:], padding=3)
                torch.autograd.grad(out.sum(), leaves)
            done.append(True)

        threads = [Thread(target=train, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(done) == 2


def test_a_gradient_of_another_size_is_refused():
    problem = Problem((2, 12, 9, 8), KEYS["centred"])
    x, *parameters, _ = problem.tensors()
    arguments = [True, False, True, True, True], x.shape, (1, 1), (3, 3), (1, 1), 0.0, ""
    with pytest.raises(ValueError, match=r"dy has shape \(2, 12, 8, 8\), but the output has \(2, 12, 9, 8\)"):
        torch.ops.mkf.key_conv2d_backward(noise(2, 12, 8, 8), x, *parameters, *arguments)
