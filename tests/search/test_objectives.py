"""Each objective against a direct computation, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import mkf
from mkf.search import Accuracy, OutputError, Residual, eliminate, objectives
from mkf.search.objectives import depthwise_layers, fingerprint
from tests.kernels.affine_fit_float64 import line_of_best_key
from tests.search.networks import KEYS, images, learnable, network


def replaced(model, keys):
    """A copy of the model whose 7x7 depthwise filters are linear shifts of the keys, in float64, one by one."""
    model = copy.deepcopy(model).double().eval()
    for layer in depthwise_layers(model, keys.kernel_size):
        a, b, r = line_of_best_key(layer.weight.detach()[:, 0], keys.filters)
        for c, j in enumerate(r.argmin(1)):
            layer.weight.data[c, 0] = float(a[c, j]) * keys.filters[j].double() + float(b[c, j])
    return model


def follow(objective, expected, drops=(4, 0, 7)):
    """Compare the loss, and that without each key, with what `expected(keys)` computes, before and after some drops."""
    judge = objective.begin(KEYS)
    left = list(range(len(KEYS)))
    for key in drops:
        assert judge.loss()[0] == pytest.approx(expected(KEYS[left]), rel=1e-4, abs=1e-6)
        without = dict(judge.losses_without({left[1]}))
        assert without.keys() == set(left) - {left[1]}
        for j in without:
            kept = KEYS[[i for i in left if i != j]]
            assert without[j][0] == pytest.approx(expected(kept), rel=1e-4, abs=1e-6)
        judge.drop(key)
        left.remove(key)
    assert judge.loss()[0] == pytest.approx(expected(KEYS[left]), rel=1e-4, abs=1e-6)


def test_residual():
    filters = torch.randn(300, 7, 7, generator=torch.Generator().manual_seed(0)) + 3
    follow(Residual(filters), lambda keys: float((line_of_best_key(filters, keys.filters)[2].min(1) ** 2).mean()))


def test_output_error_is_that_of_the_layers_outputs():
    model = network().eval()
    x = images(10)
    batches = [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(6))]

    def expected(keys):
        reference, changed = copy.deepcopy(model).double(), replaced(model, keys)
        errors = []
        for layer, other in zip(*(depthwise_layers(m, 7) for m in (reference, changed)), strict=True):
            layer.bias = other.bias = None
            seen = []
            hook = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                original = copy.deepcopy(model).double().eval()
                target = depthwise_layers(original, 7)[depthwise_layers(reference, 7).index(layer)]
                hook.remove()
                hook = target.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
                original(x.double())
                y, z = layer(seen[0]), other(seen[0])
            hook.remove()
            errors.append(float((y - z).square().sum() / y.square().sum()))
        return np.mean(errors)

    follow(OutputError(model, batches, split="train"), expected)
    model.train()  # what it is judged by is the network in evaluation, as it was handed over or not
    follow(OutputError(model, [x], split="train"), expected, drops=(1,))
    assert model.training


def test_output_error_unfolds_no_more_than_so_many_bytes_at_a_time(monkeypatch):
    model, batches, unfolded = network(), [images(10)], []
    whole = OutputError(model, batches, split="train").begin(KEYS).loss()[0]
    unfold, taps, image = F.unfold, 49, 12 * 23 * 25  # the widest layer's input with its padding
    monkeypatch.setattr(F, "unfold", lambda x, *rest: unfolded.append(4 * taps * x.numel()) or unfold(x, *rest))
    monkeypatch.setattr(objectives, "UNFOLDED", 3 * 4 * taps * image)
    assert OutputError(model, batches, split="train").begin(KEYS).loss()[0] == pytest.approx(whole, rel=1e-5)
    assert max(unfolded) == objectives.UNFOLDED
    assert len(unfolded) == 2 + 4 + 1  # layers of 8, 3 and 11 images at a time


def test_output_error_prefers_what_the_inputs_show():
    """On images that are constant a filter's sum is all that matters, and every linear shift keeps the sum."""
    model = nn.Sequential(nn.Conv2d(4, 4, 7, groups=4))
    flat = torch.ones(2, 4, 9, 9)
    assert OutputError(model, [flat], split="train").begin(KEYS).loss()[0] < 1e-9


def test_accuracy():
    model = network()
    loader = learnable(model, 40)
    x, labels = loader.dataset.tensors
    rates = []

    def expected(keys):
        with torch.no_grad():
            found = replaced(model, keys)(x.double()).argmax(1)
        rates.append(float((found == labels).double().mean()))
        return 1 - rates[-1]

    before = fingerprint(model.state_dict().values())
    accuracy = Accuracy(model.train(), loader, split="train")
    assert model.training
    assert accuracy.top1() == 1
    follow(accuracy, expected, drops=(4, 0))
    assert accuracy.top1(KEYS) == pytest.approx(1 - expected(KEYS))
    assert accuracy.top1() == 1
    assert fingerprint(model.state_dict().values()) == before
    assert len(set(rates)) > 3  # the test would see a difference


def test_equal_accuracies_are_told_apart_by_residuals():
    model = network()
    judge = Accuracy(model, learnable(model, 4), split="train").begin(KEYS)
    filters = torch.cat([layer.weight.detach()[:, 0] for layer in depthwise_layers(model, 7)])
    for key, loss in judge.losses_without(()):
        left = KEYS[[i for i in range(9) if i != key]]
        assert loss[1] == pytest.approx((line_of_best_key(filters, left.filters)[2].min(1) ** 2).mean(), rel=1e-5)


def test_a_candidate_without_filters_costs_no_evaluation():
    model = network()
    filters = torch.cat([layer.weight.detach()[:, 0] for layer in depthwise_layers(model, 7)])
    own = filters / (filters - filters.mean((1, 2), keepdim=True)).flatten(1).norm(dim=1)[:, None, None]
    candidates = mkf.KeySet(torch.cat([own[:6], mkf.keys.random(7, 1).filters]))
    passes = []

    class Counted(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    used = set(mkf.affine_fit(filters, candidates).index.tolist())
    judge = Accuracy(model, Counted(learnable(model, 8)), split="train").begin(candidates)
    judge.loss()
    dict(judge.losses_without(()))
    assert len(passes) == 1 + len(used)


class Named(TensorDataset):
    def __init__(self, split=None, train=None):
        super().__init__(images(4), torch.zeros(4).long())
        if split is not None:
            self.split = split
        if train is not None:
            self.train = train


@pytest.mark.parametrize("told", [{"split": "test"}, {"split": "val"}, {"train": False}])
def test_a_test_set_must_be_called_one_and_be_allowed(told):
    loader = DataLoader(Subset(Named(**told), [0, 1]), 2)
    for kind in (Accuracy, OutputError):
        with pytest.raises(ValueError, match="the loader's data set says that it is the"):
            kind(network(), loader, split="train")
        objective = kind(network(), loader, split="test")
        with pytest.raises(ValueError, match="chosen by what they are tested on"):
            eliminate(KEYS, 8, objective)
        assert "test split" in eliminate(KEYS, 8, objective, allow_test=True).keys.provenance
    Accuracy(network(), DataLoader(Named(split="train")), split="train")
    Accuracy(network(), DataLoader(Named(train=True)), split="train")


def test_what_is_refused():
    model = network()
    x = images(4)
    with pytest.raises(TypeError):
        Accuracy(model, [(x, torch.zeros(4).long())])  # the split must be said
    with pytest.raises(ValueError, match="'train' or the 'test' split"):
        Accuracy(model, [], split="all")
    for kind in (Accuracy, OutputError):
        with pytest.raises(ValueError, match="iterated only once"):
            kind(model, iter([(x, torch.zeros(4).long())]), split="train")

    def judge(batches, kind=Accuracy, keys=KEYS, model=model):
        return kind(model, batches, split="train").begin(keys).loss()

    for unlabelled in ([x], [(x,)], [x[0]]):
        with pytest.raises(ValueError, match="images without labels"):
            judge(unlabelled)
    with pytest.raises(ValueError, match="labels must be integers"):
        judge([(x, torch.zeros(4))])
    with pytest.raises(ValueError, match="labels must be integers"):
        judge([(x, torch.zeros(3).long())])
    with pytest.raises(ValueError, match="unlabelled"):
        judge([(x, torch.tensor([0, 1, -1, 0]))])
    with pytest.raises(ValueError, match="labels up to 1000, but the network tells only"):
        judge([(x, torch.tensor([0, 1, 1000, 0]))])
    for kind in (Accuracy, OutputError):
        with pytest.raises(ValueError, match="no images"):
            judge([], kind)
        with pytest.raises(ValueError, match=r"no depthwise nn.Conv2d of 5x5.*3x3, 7x7"):
            judge([(x, torch.zeros(4).long())], kind, mkf.keys.random(5, 3))
        broken = copy.deepcopy(model)
        broken[1].weight.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="1 filters with NaN or Inf"):
            judge([(x, torch.zeros(4).long())], kind, model=broken)
    with pytest.raises(ValueError, match="must begin with images"):
        judge([x[0]], OutputError)
    with pytest.raises(ValueError, match="not finite"):
        judge([x * torch.inf], OutputError)


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_filters_that_are_computed_cannot_be_replaced(compute):
    model = network()
    loader = learnable(model, 8)
    compute(model[5])
    with pytest.raises(ValueError, match=r"the filters of 5 are computed at each forward.*remove_parametrizations"):
        Accuracy(model, loader, split="train")


def test_filters_are_replaced_once_they_are_plain():
    model = network()
    loader = learnable(model, 40)
    wanted = Accuracy(model, loader, split="train").begin(KEYS[:2]).loss()
    nn.utils.parametrizations.weight_norm(model[0])  # no depthwise layer: its filters stay
    nn.utils.parametrizations.weight_norm(model[5])
    nn.utils.parametrize.remove_parametrizations(model[5], "weight")
    assert Accuracy(model, loader, split="train").begin(KEYS[:2]).loss() == pytest.approx(wanted)
