"""`mkf convert`: the network with keys in place of its depthwise filters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stdout
from mkf.cli._errors import typed, user_errors

if TYPE_CHECKING:
    from mkf.ops import AffineFit
    from mkf.train import TrainConfig


def command(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE", help="The network: timm's name of it, or a checkpoint file.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    keys: Annotated[
        str | None,
        typer.Option(
            metavar=_sources.KEYS,
            help=f"{_sources.KEYS_HELP} If not given paper8, or those the network has, whose filters then stay.",
            show_default=False,
        ),
    ] = None,
    compact: Annotated[
        bool,
        typer.Option(
            help="Store each filter as index, scale and shift. Only mkf reads it; convert makes it ordinary again."
        ),
    ] = False,
    pretrained: Annotated[bool, typer.Option(help="Fetch the trained weights of a timm model.")] = True,
    finetune: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Then train on this Parquet image folder to win back accuracy; layers that no KeyConv2d can stand for "
            "keep free filters.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="With --finetune: timm name of the network; runs of mkf train know their own."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="With --finetune: length of the training.")] = 5,
    lr: Annotated[float, typer.Option(help="With --finetune: peak learning rate of AdamW.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="With --finetune: images a step.")] = 128,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="With --finetune: side of the square input in pixels.")
    ] = None,
) -> None:
    """Replace every depthwise filter by its nearest key, scaled and shifted, and write the network as a state dict.

    The file loads wherever the original did, unless it is --compact. A weight (C, 1, k, k) with C > 1 is taken for
    depthwise, so that of a first layer for grey images is replaced too.
    """
    with user_errors():
        from mkf.bank.checkpoint import metadata, stored_state_dict, write
        from mkf.bank.compact import compact as to_compact
        from mkf.bank.compact import expand, layers_with_keys, with_shared_keys
        from mkf.keys import parse

        console = stdout()
        _outputs.named(out, "--out", ".safetensors")
        of_finetune = {"model", "epochs", "lr", "batch_size", "image_size"}
        if finetune is None and not of_finetune.isdisjoint(typed(context)):
            raise ValueError("--model, --epochs, --lr, --batch-size and --image-size go with --finetune")
        _outputs.not_an_input(out, "--out", source, *([keys] if keys else []))
        key_set = parse(keys or "paper8")  # wrong keys are told before anything is read or trained
        config = None
        if finetune is not None:
            run = out.with_suffix(".finetuned")
            config = _training(
                source, pretrained, keys or "paper8", finetune, run, model, epochs, lr, batch_size, image_size
            )
        _outputs.folder(out.parent, "--out")
        weights, told = _network(source, pretrained)
        own_keys = layers_with_keys(weights) if keys is None else []
        if own_keys and config is not None:
            raise ValueError(f"{source} has keys of its own, and --finetune has to know which: name them with --keys")
        if own_keys:
            small, state = with_shared_keys(weights), expand(weights)
            told = {"keys": f"those of {Path(source).name}"} | told
            console.print(f"Filters of {len(own_keys)} layers are keys already and stay; --keys would fit them anew.")
        else:
            told |= {"keys": keys or "paper8"}
            told.pop("test_accuracy", None)  # of other filters
            state = expand(weights)
            small, fits = to_compact(state, key_set)
            _print_layers(fits, len(key_set), console)
            _print_left_alone(state, fits, console)
            if config is not None:
                _print_free(config, console)
                _train(config, console)
                trained = run / "model.safetensors"
                small, told = with_shared_keys(stored_state_dict(trained)), told | metadata(trained)
            else:
                _warn_of_stem(state, fits)
            ordinary = expand(small)
            if config is None:  # else the training has made all of it float32
                ordinary = {name: tensor.to(state[name].dtype) for name, tensor in ordinary.items()}
            state = ordinary
        written = small if compact else state
        write(out, written, told | {"format": "pt"})
        filters = [state[name] for name in state if f"{name.removesuffix('.weight')}.index" in small]
        whole, stored, parts = _bytes(state.values()), _bytes(small.values()), _bytes(filters)
        console.print(
            f"{sum(map(len, filters))} filters in {len(filters)} layers: {parts:,} bytes, "
            f"{stored - (whole - parts):,} as index, scale, shift and keys; the whole network {whole:,} and {stored:,}."
        )
        console.print(f"Written to {out}: {out.stat().st_size:,} bytes", soft_wrap=True)


def _network(source: str, pretrained: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """State dict and metadata of a checkpoint file, which may be compact, or of a model of timm.

    The metadata are those of `mkf train`, as far as they are known: with them a file can be trained without --model.
    """
    import json

    from mkf.bank.checkpoint import SUFFIXES, metadata, stored_state_dict
    from mkf.bank.hub import create

    if Path(source).expanduser().exists() or source.endswith(SUFFIXES):
        return stored_state_dict(source), metadata(source)
    created: Any = create(source, pretrained)
    config = created.model.pretrained_cfg
    return dict(created.model.state_dict()), {
        "model": config["architecture"],
        "model_kwargs": json.dumps({"num_classes": created.model.num_classes}),
        "image_size": str(config["input_size"][-1]),
        "licence": created.licence,
    }


def _print_layers(fits: dict[str, AffineFit], keys: int, console: Any) -> None:
    from rich.table import Table

    table = Table(title="Filters as keys", title_justify="left", box=None)
    table.add_column("layer")
    for name in ("filters", "keys", "residual", "worst"):
        table.add_column(name, justify="right")
    for name, fit in fits.items():
        live = fit.residual[(fit.scale != 0) | (fit.residual != 0)]
        mean, worst = (f"{live.mean():.3f}", f"{live.max():.3f}") if len(live) else ("-", "-")
        table.add_row(name, str(len(fit.index)), f"{len(fit.index.unique())} of {keys}", mean, worst)
    print_table(console, table)
    console.print()


def _print_left_alone(state: dict[str, Any], fits: dict[str, AffineFit], console: Any) -> None:
    from mkf.bank.extract import is_depthwise

    others: dict[str, list[str]] = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if is_depthwise(name, tensor.shape) and layer not in fits:
            others.setdefault("{}x{}".format(*tensor.shape[2:]), []).append(layer)
    for size, layers in others.items():
        console.print(f"Left alone, {size} unlike the keys: {', '.join(layers)}", soft_wrap=True)


def _warn_of_stem(state: dict[str, Any], fits: dict[str, AffineFit]) -> None:
    """Tell of a first convolution that was replaced, unless another one takes the three channels of colour images.

    A safetensors file keeps its tensors by name, so the first of them need not be the first of the network.
    """
    import warnings

    inputs = {name.removesuffix(".weight"): tensor.shape[1] for name, tensor in state.items() if tensor.ndim == 4}
    first = next(iter(inputs))
    if first in fits and 3 not in inputs.values() and max(inputs.values()) > 1:
        warnings.warn(
            f"{first} comes before any other convolution and was replaced too: if it is no depthwise layer but the "
            "first one of a network for grey images, take its weight from the original",
            stacklevel=2,
        )


def _print_free(config: TrainConfig, console: Any) -> None:
    """Name the layers whose filters are trained as they are, as no `KeyConv2d` computes what the layer does."""
    from dataclasses import replace

    from mkf.nn import conversion_report
    from mkf.train import build_model

    model = build_model(replace(config, weights="", assign="uniform"), num_classes=2)
    size = conversion_report(model).replaced[0].kernel_size
    for layer in conversion_report(model).skipped:
        if layer.kernel_size == size:
            console.print(f"Trained with free filters: {layer.name} ({layer.reason})", soft_wrap=True)


def _training(
    source: str,
    pretrained: bool,
    keys: str,
    data: Path,
    run: Path,
    model: str | None,
    epochs: int,
    lr: float,
    batch_size: int,
    image_size: int | None,
) -> TrainConfig:
    """How to train the converted network, whose run goes to the folder `run`."""
    import json

    from mkf.bank.checkpoint import metadata
    from mkf.train import TrainConfig
    from mkf.train.data import count_classes

    classes = count_classes(data)  # wrong data are told first
    if (run / "model.safetensors").exists():
        raise FileExistsError(f"{run} holds the training of an earlier --finetune: delete it or choose another --out")
    told: dict[str, Any] = {"model_kwargs": {}}
    path = Path(source).expanduser()
    if not path.exists():
        told |= {"model": source, "model_kwargs": {"pretrained": True} if pretrained else {}}
    elif model is not None:
        told |= {"model": model, "weights": str(path)}
    else:
        known = metadata(path)
        if "model_kwargs" not in known:
            raise ValueError(f"{source} does not say which network it is: name it with --model")
        kwargs = json.loads(known["model_kwargs"])
        trained = kwargs.pop("num_classes")
        if trained != classes:
            raise ValueError(f"{data} has {classes} classes, the network in {source} {trained}: give data with as many")
        told |= {"model": known["model"], "model_kwargs": kwargs, "weights": str(path)}
        image_size = image_size or int(known["image_size"])
    return TrainConfig(
        **told,
        data=str(data),
        out=str(run),
        keys=keys,
        assign="fit",
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        warmup_epochs=0,
        depthwise_weight_decay=0.05,  # of filters that stay free: they are trained, and have no initial noise to lose
        image_size=image_size or 224,
    )


def _train(config: TrainConfig, console: Any) -> None:
    from mkf.train import train

    of = config.epochs
    train(
        config,
        on_start=lambda top1: console.print(f"before the training  top-1 {top1:.2f} %"),
        on_epoch=lambda r: console.print(f"epoch {r.epoch}/{of}  loss {r.test_loss:.4f}  top-1 {r.top1:.2f} %"),
    )


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
