"""A small network, whose 7x7 depthwise filters are near to `KEYS`, and images for it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mkf
from tests.search.planted import plant

KEYS = mkf.keys.random(7, 9, seed=5)


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 2, stride=2),
        nn.Conv2d(8, 8, 7, padding=(2, 3), groups=8),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 7, stride=2, padding=6, dilation=2, groups=12, padding_mode="circular"),
        nn.GELU(),
        nn.Conv2d(12, 24, 7, padding="same", groups=12, bias=False),
        nn.Conv2d(24, 24, 3, padding="valid", groups=24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, classes, bias=False),
        nn.BatchNorm1d(classes, affine=False, momentum=1.0),  # so that no class is preferred
    )
    layers = (model[1], model[5], model[7])
    for i, layer in enumerate(layers):
        filters, _ = plant(KEYS, len(layer.weight), seed=i, shares=[1 / 9] * 9)
        layer.weight.data = (filters - filters.mean((1, 2), keepdim=True))[:, None]
    model(images(100, seed=1))
    return model


def images(count=24, seed=0):
    return torch.randn(count, 3, 26, 26, generator=torch.Generator().manual_seed(seed))


def learnable(model, count=60, seed=0, batch_size=25):
    """A loader of images whose labels are what the network says, so that its accuracy is 1."""
    x = images(count, seed)
    with torch.no_grad():
        labels = model.eval()(x).argmax(1)
    return DataLoader(TensorDataset(x, labels), batch_size)
