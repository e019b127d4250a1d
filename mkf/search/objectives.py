"""What a set of keys is judged by: residuals, outputs of layers, or accuracy.

An objective says what is measured; `begin` ties it to candidates and gives a `Judge`, which follows one elimination.
"""

import copy
import hashlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mkf.keys import KeySet
from mkf.ops import stream
from mkf.ops.affine_fit import AffineFit, affine_fit
from mkf.search.ranking import Ranking
from mkf.search.sample import draw, unit

Loss = tuple[float, ...]
"""Smaller is better; what comes after the first number only decides between equal ones."""

SAMPLE = 1 << 20
"""Filters that `Residual` ranks at most: with 50 candidates, 262 MB."""

UNFOLDED = 1 << 26
"""Bytes of patches that `OutputError` unfolds at a time."""


class Judge(Protocol):
    """The loss of the keys that are left, as they become fewer."""

    def loss(self) -> Loss:
        """With all that are left."""

    def losses_without(self, known: Collection[int]) -> Iterator[tuple[int, Loss]]:
        """The loss without each of those that are left, for those whose loss is not `known`."""

    def drop(self, key: int) -> None:
        """Give up one of those that are left."""


class Objective(Protocol):
    """Something that keys can be judged by."""

    @property
    def description(self) -> str:
        """What is measured, in words, for a key set's provenance."""

    @property
    def split(self) -> str:
        """`weights`, or the split that the images come from: `train` or `test`."""

    def fingerprint(self) -> str:
        """A word that differs where filters, weights or images do, so that no other search is resumed by mistake."""

    def begin(self, candidates: KeySet) -> Judge:
        """Rank the candidates with each filter."""


class Residual:
    """Keys judged by weights alone: the mean squared residual of the filters' affine fits, 1 - corr^2.

    Args:
        filters: A `FilterBank` of one kernel size, a tensor (N, k, k) or (N, k * k), or an array, also memory-mapped.
            Dead filters and those that are not finite are left out.
        sample: Filters that are ranked at most; of more a random sample is drawn.
        seed: Of that sample.
        backend: As `affine_fit` has it.

    Raises:
        ValueError: No filters that vary, several kernel sizes, or a shape that is no filter's.
        TypeError: Filters that are no floating-point numbers.
    """

    split = "weights"

    def __init__(self, filters: Any, *, sample: int = SAMPLE, seed: int = 0, backend: str | None = None):
        self._sample = draw(filters, sample, seed)
        self._backend = backend
        self.description = f"mean squared residual of {self._sample.describe()}"

    def fingerprint(self) -> str:
        """Of the filters."""
        return fingerprint([self._sample.filters])

    def begin(self, candidates: KeySet) -> Judge:
        """Rank the candidates with each filter, by `affine_fit`."""
        orders, costs = [], []
        for piece in self._sample.filters.split(stream.ROWS):
            fit = affine_fit(piece, candidates, topk=len(candidates), backend=self._backend)
            orders.append(fit.index.to(torch.uint8))
            costs.append(fit.residual.square())
        return _Sum(Ranking(torch.cat(orders), torch.cat(costs)), 1 / len(self._sample.filters))


class OutputError:
    """Keys judged by what the replaced layers put out, on a few batches of images.

    With X the inputs that a depthwise layer of the network gets, f_c its filters and f'_c what `affine_fit` makes of
    them,

        loss = mean over layers of  sum_c ||X_c * (f_c - f'_c)||^2 / sum_c ||X_c * f_c||^2.

    The inputs are those of the unchanged network, so errors of earlier layers are not counted. As ||X_c * d||^2 is
    d^T G_c d with G_c the Gram matrix of the patches of X_c, the images are seen once, whatever is tried later.

    Args:
        model: A network with depthwise `nn.Conv2d` layers; it is left as it is.
        batches: Images, or tuples that begin with images, as tensors (B, C, H, W), each time it is iterated: a search
            in two rounds sees them twice, and as often again for its state. Any images will do, also unlabelled.
        split: Which split of the data they come from, `train` or `test`; see `eliminate`.
        backend: As `affine_fit` has it.

    Raises:
        ValueError: A split of another name, or one that contradicts what the batches' data set says of itself; batches
            that can be iterated only once.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], *, split: Literal["train", "test"], backend: str | None = None
    ):
        _refuse_iterator(batches)
        self._model, self._batches, self._backend = copy.deepcopy(model).eval(), batches, backend
        self.split = _split(split, batches)
        self.description = f"output error of depthwise layers on images of the {split} split"

    def fingerprint(self) -> str:
        """Of the weights and the images, which are seen for it."""
        return f"{fingerprint(self._model.state_dict().values())} {_checksum(self._batches, labelled=False)}"

    def begin(self, candidates: KeySet) -> Judge:
        """See the images and rank the candidates with each filter."""
        layers = depthwise_layers(self._model, candidates.kernel_size)
        fits = [_fit(layer, candidates, self._backend) for layer in layers]
        grams = _grams(self._model, layers, self._batches)
        orders, costs = [], []
        keys = candidates.filters.flatten(1)
        for layer, fit, gram in zip(layers, fits, grams, strict=True):
            filters = layer.weight.detach()[:, 0].float()
            flat = filters.flatten(1).double()
            gram = gram.repeat_interleave(len(flat) // len(gram), 0)
            energy = torch.einsum("ci,cij,cj->", flat, gram, flat)
            error = flat[:, None] - _materialised(fit, keys.to(flat)).double()
            cost = ((error @ gram) * error).sum(2) / energy.clamp(min=torch.finfo(torch.float64).tiny)
            orders.append(fit.index.to(torch.uint8))
            costs.append(cost.float())
        return _Sum(Ranking(torch.cat(orders), torch.cat(costs)), 1 / len(layers))


class Accuracy:
    """Keys judged by the top-1 accuracy of a network whose depthwise filters are replaced by linear shifts of them.

    The loss is 1 - top-1; among equal ones the mean squared residual of the filters decides (our choice). The images
    must be the same each time the loader is iterated and be prepared as for a test (no random crops): the paper's
    authors use 100 images of each class of the *training* set.

    Args:
        model: A network with depthwise `nn.Conv2d` layers; it is copied, and left as it is.
        loader: Yields (images, labels) each time it is iterated: a `DataLoader`, or a list of batches.
        split: Which split of the data the images come from, `train` or `test`. Keys chosen by a test set cannot be
            tested on it, so `eliminate` refuses `test` unless it is allowed.
        backend: As `affine_fit` has it.

    Raises:
        ValueError: A split of another name, or one that contradicts what the loader's data set says of itself; a loader
            that can be iterated only once; a depthwise layer that computes its filters anew at each forward, as under
            weight norm or pruning, so that none can be put in their place.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], *, split: Literal["train", "test"], backend: str | None = None
    ):
        _refuse_iterator(loader)
        _refuse_computed_filters(model)
        self._model, self._loader, self._backend = copy.deepcopy(model).eval(), loader, backend
        self.split = _split(split, loader)
        self.description = f"top-1 error on images of the {split} split"

    def fingerprint(self) -> str:
        """Of the weights, the images, which are seen for it, and their labels."""
        return f"{fingerprint(self._model.state_dict().values())} {_checksum(self._loader, labelled=True)}"

    def top1(self, keys: KeySet | None = None) -> float:
        """The accuracy with filters replaced by linear shifts of `keys`, from 0 to 1; of the unchanged network if None.

        Raises:
            ValueError: A loader without labels or images, or a network without depthwise filters of the keys' size.
        """
        if keys is None:
            return _top1(self._model, self._loader)
        return 1 - self.begin(keys).loss()[0]

    def begin(self, candidates: KeySet) -> Judge:
        """Rank the candidates with each filter of the network."""
        return _Replaced(copy.deepcopy(self._model), self._loader, candidates, self._backend)


class _Sum:
    """A loss that is the sum of what each filter's key costs."""

    def __init__(self, ranking: Ranking, unit: float):
        self._ranking, self._unit = ranking, unit

    def loss(self) -> Loss:
        return (self._ranking.total() * self._unit,)

    def losses_without(self, known: Collection[int]) -> Iterator[tuple[int, Loss]]:
        totals = self._ranking.totals_without()
        return ((key, (float(totals[key]) * self._unit,)) for key in self._ranking.kept if key not in known)

    def drop(self, key: int) -> None:
        self._ranking.drop(key)


class _Replaced:
    """A network whose depthwise filters are linear shifts of the keys that are left."""

    def __init__(self, model: nn.Module, loader: Iterable[Any], candidates: KeySet, backend: str | None):
        self._model, self._loader = model, loader
        self._layers = depthwise_layers(model, candidates.kernel_size)
        fits = [_fit(layer, candidates, backend) for layer in self._layers]
        self._fit = AffineFit(*(torch.cat(parts) for parts in zip(*fits, strict=True)))
        self._keys = candidates.filters.flatten(1).to(self._fit.scale)
        self._ranking = Ranking(self._fit.index.to(torch.uint8), self._fit.residual.square())
        self._write(self._ranking.first)
        self._loss: Loss | None = None

    def loss(self) -> Loss:
        if self._loss is None:
            self._loss = (1 - _top1(self._model, self._loader), self._ranking.total() / len(self._fit.index))
        return self._loss

    def losses_without(self, known: Collection[int]) -> Iterator[tuple[int, Loss]]:
        totals = self._ranking.totals_without() / len(self._fit.index)
        index = self._ranking.index
        for key in self._ranking.kept:
            if key in known:
                continue
            loses = index == key
            if not loses.any():  # nothing changes, so nothing needs to be measured
                yield key, (self.loss()[0], float(totals[key]))
                continue
            self._write(torch.where(loses, self._ranking.second, self._ranking.first))
            try:
                error = 1 - _top1(self._model, self._loader)
            finally:
                self._write(self._ranking.first)
            yield key, (error, float(totals[key]))

    def drop(self, key: int) -> None:
        self._ranking.drop(key)
        self._write(self._ranking.first)
        self._loss = None

    @torch.no_grad()
    def _write(self, rank: Tensor) -> None:
        """Put the linear shift of the key of that rank into every filter."""
        index, scale, shift, _ = (x.gather(1, rank[:, None]) for x in self._fit_as_long())
        filters = scale * self._keys[index[:, 0]] + shift
        sizes = [layer.out_channels for layer in self._layers]
        for layer, values in zip(self._layers, filters.split(sizes), strict=True):
            layer.weight.copy_(values.view_as(layer.weight))

    def _fit_as_long(self) -> AffineFit:
        return self._fit._replace(index=self._fit.index.long())


def depthwise_layers(model: nn.Module, k: int) -> list[nn.Conv2d]:
    """The depthwise `nn.Conv2d` layers of kernel size k, in the order of `model.modules()`.

    Raises:
        ValueError: There is none.
    """
    found = [m for m in model.modules() if _is_depthwise(m)]
    layers = [m for m in found if m.kernel_size == (k, k)]
    if not layers:
        sizes = sorted({f"{m.kernel_size[0]}x{m.kernel_size[1]}" for m in found})
        others = f"; its depthwise layers are {', '.join(sizes)}" if sizes else ""
        raise ValueError(f"the network has no depthwise nn.Conv2d of {k}x{k}, the size of the candidates{others}")
    return layers


def _is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _refuse_computed_filters(model: nn.Module) -> None:
    """Refuse filters that are no parameter but made of others: what is written into them has no effect."""
    for name, module in model.named_modules():
        if _is_depthwise(module) and not isinstance(module.weight, nn.Parameter):
            raise ValueError(
                f"the filters of {name or 'the network'} are computed at each forward, by a parametrisation or by "
                "pruning, so none can be put in their place: make them a plain parameter first, as "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') does"
            )


def _refuse_iterator(batches: Any) -> None:
    if hasattr(batches, "__next__"):
        raise ValueError("the images can be iterated only once: give a DataLoader or a list of batches")


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the shapes and values of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype} {tuple(values.shape)};".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(batches: Iterable[Any], labelled: bool) -> str:
    """Of images and, where they count, their labels: the same in whatever order and batches they come."""
    total = 0
    for batch in batches:
        images = _images(batch, torch.device("cpu"))
        columns = (images, _labels(batch)) if labelled else (images,)
        total += sum(int(fingerprint(row), 16) for row in zip(*columns, strict=True))
    return f"{total % 2**256:064x}"


def _fit(layer: nn.Conv2d, candidates: KeySet, backend: str | None) -> AffineFit:
    """The fit of a layer's filters to all candidates, best first."""
    filters = layer.weight.detach()[:, 0].float()
    if broken := unit(filters).not_finite:
        raise ValueError(f"a depthwise layer of the network has {broken} filters with NaN or Inf: it cannot be judged")
    return affine_fit(filters, candidates, topk=len(candidates), backend=backend)


def _materialised(fit: AffineFit, keys: Tensor) -> Tensor:
    """(C, K, n), every filter as the linear shift of each key, in the order of the fit."""
    shifts: Tensor = fit.scale[..., None] * keys[fit.index.long()] + fit.shift[..., None]
    return shifts


def _split(split: str, loader: Any) -> str:
    """Check a split's name against what the data set says of itself, as those of torchvision and mkf do."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: say whether the images are of the 'train' or the 'test' split")
    data: Any = getattr(loader, "dataset", None)
    while hasattr(data, "dataset"):  # torch's Subset
        data = data.dataset
    told = getattr(data, "split", None)
    if told is None and isinstance(getattr(data, "train", None), bool):
        told = "train" if data.train else "test"
    if split == "train" and told in ("test", "val", "valid", "validation"):
        raise ValueError(f"split='train', but the loader's data set says that it is the {told} split")
    return split


def _images(batch: Any, device: torch.device) -> Tensor:
    images: Any = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"the batches must begin with images, a tensor (B, C, H, W), not {got}")
    moved: Tensor = images.to(device)
    return moved


def _labels(batch: Any) -> Tensor:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError("the loader yields images without labels: accuracy needs batches of (images, labels)")
    labels: Any = batch[1]
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not integers or labels.shape != (len(batch[0]),):
        raise ValueError("the loader's labels must be integers, one for each image")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"the loader has labels of {int(labels.min())}: its images are unlabelled")
    checked: Tensor = labels
    return checked


@torch.inference_mode()
def _top1(model: nn.Module, loader: Iterable[Any]) -> float:
    device = next(model.parameters()).device
    correct = count = 0
    for batch in loader:
        labels = _labels(batch).to(device)
        logits = model(_images(batch, device))
        if len(labels) and int(labels.max()) >= logits.shape[1]:
            raise ValueError(
                f"the loader has labels up to {int(labels.max())}, but the network tells only {logits.shape[1]} "
                "classes apart: give it images of the set that it was trained on"
            )
        correct += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    if not count:
        raise ValueError("the loader yields no images")
    return correct / count


@torch.inference_mode()
def _grams(model: nn.Module, layers: list[nn.Conv2d], batches: Iterable[Any]) -> list[Tensor]:
    """For each layer the Gram matrices of the patches that its filters meet, (in_channels, n, n) float64."""
    device = next(model.parameters()).device
    grams = [
        torch.zeros(layer.in_channels, layer.kernel_size[0] ** 2, layer.kernel_size[0] ** 2, dtype=torch.float64).to(
            device
        )
        for layer in layers
    ]

    def watch(layer: nn.Conv2d, gram: Tensor) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _add_gram(gram, layer, inputs[0])

        return layer.register_forward_pre_hook(hook)

    hooks = [watch(layer, gram) for layer, gram in zip(layers, grams, strict=True)]
    seen = 0
    try:
        for batch in batches:
            images = _images(batch, device)
            model(images)
            seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("there are no images in the batches")
    if not all(bool(gram.isfinite().all()) for gram in grams):
        raise ValueError("a layer's input is not finite on these images")
    return grams


def _add_gram(gram: Tensor, layer: nn.Conv2d, x: Tensor) -> None:
    """Add the patches of some inputs (B, C, H, W)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x.float(), _padding(layer), mode)
    taps = gram.shape[1]
    step = max(1, UNFOLDED // (4 * taps * x[0].numel()))
    for images in x.split(step):
        patches = F.unfold(
            images.transpose(0, 1).flatten(0, 1)[:, None], layer.kernel_size, layer.dilation, 0, layer.stride
        )
        patches = patches.unflatten(0, (len(gram), len(images))).transpose(1, 2).flatten(2)  # (C, n, B * positions)
        gram += (patches @ patches.mT).double()


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, as F.pad takes them."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        (up, left) = (d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        return left, left, up, up
    up, left = int(layer.padding[0]), int(layer.padding[1])
    return left, left, up, up
