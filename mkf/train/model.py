"""Models by name: those of timm's registry, and timm's classes for shapes that no registered name has."""

import json
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn

from mkf.bank import checkpoint
from mkf.keys import parse
from mkf.nn import convert
from mkf.train.config import TrainConfig


def find_model(name: str) -> Callable[..., nn.Module]:
    """Return what builds the model of a name.

    Raises:
        ValueError: timm has no such model; near names are suggested.
    """
    import timm

    classes = {
        name: item for name, item in vars(timm.models).items() if isinstance(item, type) and issubclass(item, nn.Module)
    }
    if name in classes:
        return classes[name]
    if timm.is_model(name):
        return partial(timm.create_model, name)
    near = get_close_matches(name, [*timm.list_models(), *classes], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"timm has no model {name!r}{hint}")


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Return the model of a configuration as its training starts.

    Its weights are random, following torch's seed, or those of `config.weights`; its depthwise layers have keys if
    `config.keys` names some.

    Raises:
        ValueError: timm has no such model, the model does not take the arguments, the image size or the weights, or no
            layer can have the keys.
        FileNotFoundError: There is no such file of weights.
    """
    create = find_model(config.model)
    kwargs = dict(config.model_kwargs, num_classes=num_classes)
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    try:
        model = create(**kwargs)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, config.image_size, config.image_size))
    except Exception as error:  # what timm's classes raise for arguments they cannot use differs from class to class
        size = f"{config.image_size}x{config.image_size} images"
        raise ValueError(f"{config.model} does not work with {kwargs} and {size}: {error}") from error
    if config.weights:
        _load(model, config.weights)
    if config.keys:
        convert(
            model,
            parse(config.keys),
            assign=config.assign,
            order=config.key_order,  # type: ignore[arg-type]
            seed=config.seed,
            train=[part.strip() for part in config.key_parameters.split(",") if part.strip()],
        )
    return model.train()


def load_weights(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """The network of a file that a run of `train` wrote (`model.safetensors`), and the file's metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another file of weights, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no finished run of mkf train: {path.name} is missing")
    metadata = checkpoint.metadata(path)
    if "model_kwargs" not in metadata:
        raise ValueError(f"{path} does not say how its network is built: mkf train did not write it")
    kwargs = json.loads(metadata["model_kwargs"])
    classes = kwargs.pop("num_classes")
    size = int(metadata["image_size"])
    config = TrainConfig(model=metadata["model"], model_kwargs=kwargs, data="", out="", image_size=size)
    model = build_model(config, classes)
    model.load_state_dict(checkpoint.state_dict(path))
    return model.eval(), metadata


def _load(model: nn.Module, path: str) -> None:
    try:
        model.load_state_dict(checkpoint.state_dict(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {shorten(str(error), 400, placeholder=' ...')}") from error
