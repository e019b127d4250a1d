"""`mkf train`: train a small classifier on a Parquet image folder."""

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import stderr
from mkf.cli._errors import user_errors
from mkf.train import TrainConfig


def command(
    model: Annotated[str, typer.Option(help="timm model name, or a class of timm.models such as ConvMixer.")],
    data: Annotated[Path, typer.Option(help="Folder with `train-*.parquet`, and `test-*`, `val-*` or `validation-*`.")],
    out: Annotated[Path, typer.Option(help="Folder for weights and history; an interrupted run resumes from it.")],
    model_kwargs: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of the model.")] = None,
    weights: Annotated[str, typer.Option(help="Checkpoint to start from.")] = TrainConfig.weights,
    keys: Annotated[
        str,
        typer.Option(metavar=_sources.KEYS, help=f"Of the depthwise layers; '' for free filters. {_sources.KEYS_HELP}"),
    ] = TrainConfig.keys,
    assign: Annotated[str, typer.Option(help="Which channel gets which key: fit or uniform.")] = TrainConfig.assign,
    key_order: Annotated[
        str, typer.Option(help="Channels of a key in blocks, or random; not with --assign fit.")
    ] = TrainConfig.key_order,
    key_parameters: Annotated[
        str, typer.Option(help="What trains beside the keys' indices: of scale,shift,bias,keys.")
    ] = TrainConfig.key_parameters,
    image_size: Annotated[int, typer.Option(help="Side of the square input in pixels.")] = TrainConfig.image_size,
    epochs: Annotated[int, typer.Option(help="Length of the run.")] = TrainConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = TrainConfig.batch_size,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = TrainConfig.lr,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = TrainConfig.weight_decay,
    depthwise_weight_decay: Annotated[
        float, typer.Option(help="Weight decay of the depthwise filters.")
    ] = TrainConfig.depthwise_weight_decay,
    warmup_epochs: Annotated[int, typer.Option(help="Linear warm-up, part of --epochs.")] = TrainConfig.warmup_epochs,
    min_crop: Annotated[float, typer.Option(help="Least area of the random crop.")] = TrainConfig.min_crop,
    hflip: Annotated[float, typer.Option(help="Probability of flipping an image left to right.")] = TrainConfig.hflip,
    randaug: Annotated[str, typer.Option(help="RandAugment in timm's notation; '' for none.")] = TrainConfig.randaug,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup; 0 for none.")] = TrainConfig.mixup,
    cutmix: Annotated[float, typer.Option(help="Alpha of cutmix; 0 for none.")] = TrainConfig.cutmix,
    mix_prob: Annotated[float, typer.Option(help="Share of the batches that are mixed.")] = TrainConfig.mix_prob,
    erasing: Annotated[float, typer.Option(help="Probability of random erasing.")] = TrainConfig.erasing,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = TrainConfig.smoothing,
    drop_path: Annotated[float, typer.Option(help="Stochastic depth, if the model has it.")] = TrainConfig.drop_path,
    ema: Annotated[float, typer.Option(help="Decay of the average of the weights; 0 for none.")] = TrainConfig.ema,
    clip_grad: Annotated[float, typer.Option(help="Largest gradient norm; 0 for no limit.")] = TrainConfig.clip_grad,
    seed: Annotated[int, typer.Option(help="Fixes weights, order and augmentation.")] = TrainConfig.seed,
    amp: Annotated[bool, typer.Option(help="Forward pass in bfloat16 autocast.")] = TrainConfig.amp,
    channels_last: Annotated[bool, typer.Option(help="Channels-last activations.")] = TrainConfig.channels_last,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for torch's choice.")] = TrainConfig.threads,
    workers: Annotated[int, typer.Option(help="Processes that load data; 0 loads in this one.")] = TrainConfig.workers,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = TrainConfig.device,
) -> None:
    """Train a classifier; save its weights, the untrained weights of the same seed, and the history."""
    options = dict(locals())
    with user_errors():
        from mkf.train import EpochRecord, train

        options |= {"data": str(data), "out": str(out), "model_kwargs": _parse_kwargs(model_kwargs or [])}
        config = TrainConfig(**options)
        _outputs.folder(out, "--out")
        with _sources.bars(stderr()) as progress:
            task = progress.add_task("reading", total=None)

            def on_step(done: int, steps: int) -> None:
                progress.update(task, description="training", completed=done, total=steps)

            def on_epoch(record: EpochRecord) -> None:
                losses = f"train loss {record.train_loss:.4f}  test loss {record.test_loss:.4f}"
                speed = f"{record.images_per_second:.0f} images/s"
                epoch = f"epoch {record.epoch}/{config.epochs}"
                _sources.say(progress, f"{epoch}  {losses}  top-1 {record.top1:.2f} %  {speed}")

            train(config, on_epoch, on_step)
        typer.echo(f"wrote {out / 'model.safetensors'}")


def _parse_kwargs(words: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE words; a value that is no Python literal is a string."""
    parsed: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"--model-kwargs takes KEY=VALUE, not {word!r}")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed
