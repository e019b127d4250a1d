"""What a training run consists of: model, data, recipe and where it runs."""

import shlex
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how; the defaults suit runs of 10 to 30 epochs.

    The recipe is the one for small data sets (AdamW, cosine decay, RandAugment 9/.5, mixup .8, cutmix 1, erasing .25,
    smoothing .1 over 300 epochs) made milder, since a short run underfits: one RandAugment operation an image,
    mixing for a third of the batches with low alpha, crops of at least half the picture, and an average of the weights.

    Attributes:
        model: A timm model name, or a model class of `timm.models` such as `ConvMixer`.
        model_kwargs: Passed on to the model.
        weights: Checkpoint to start from; it must be of the same model. Empty: random weights.
        keys: Keys of the depthwise layers, as `mkf.keys.parse` reads them; empty: ordinary free filters.
        assign: Which channel gets which key: `fit` (the nearest to its filter, for trained weights), or `uniform`.
        key_order: Of the channels of a key where they are not fitted, `blocks` or `random`.
        key_parameters: What trains in a layer with keys, any of scale, shift, bias and keys, with commas between.
        data: Folder with `train-*.parquet` and `test-*`, `val-*` or `validation-*.parquet`.
        out: Folder for the results; a run that was interrupted resumes from it.
        image_size: Side of the square input in pixels.
        epochs: Length of the run; the learning rate ends near 0.
        batch_size: Images a step, even (mixup pairs them).
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW; not applied to biases and norms, nor to what trains in a layer with keys: smaller keys
            are the same as a smaller scale, which has no decay either.
        depthwise_weight_decay: The same for free depthwise filters. Far stronger, because a short run at an ordinary
            decay leaves most of a filter's initial noise where it was, and a norm layer behind makes up for small
            filters. The papers have one decay for both: compare free filters with keys as their tables do with .05 here
            too (for ConvNeXtV2-Pico with .3 here and above).
        warmup_epochs: Linear warm-up, counted in `epochs`; the cosine decay begins at its end.
        min_crop: Least area of the random crop as a fraction of the picture.
        hflip: Probability of flipping an image left to right. It matters for what keys come out: pictures and their
            mirror images favour no side, and of the paper's keys 2 and 4 are mirror images, as are 5 and its negative.
        randaug: RandAugment in timm's notation, or empty for none.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        mix_prob: Share of the batches that are mixed.
        erasing: Probability of random erasing.
        smoothing: Label smoothing.
        drop_path: Stochastic depth, for models that take it.
        ema: Decay of the moving average of the weights (with warm-up), 0 for none; the average is tested and saved.
        clip_grad: Largest norm of the gradient, 0 for no limit.
        seed: Fixes the weights, the order and the augmentation; each epoch is seeded anew, so resuming is exact on the
            CPU with the same number of threads.
        amp: Run the forward pass in bfloat16 autocast.
        channels_last: Keep activations in channels-last order.
        threads: CPU threads, 0 for torch's choice.
        workers: Processes that load data; 0 loads in this one. Each has its own random stream, so the number counts.
        device: `auto` (CUDA if there is one, else the CPU) or a torch device.
    """

    model: str
    data: str
    out: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    keys: str = ""
    assign: str = "uniform"
    key_order: str = "blocks"
    key_parameters: str = "shift,bias"
    image_size: int = 32
    epochs: int = 20
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    depthwise_weight_decay: float = 1.0
    warmup_epochs: int = 2
    min_crop: float = 0.5
    hflip: float = 0.5
    randaug: str = "rand-m9-n1-mstd0.5"
    mixup: float = 0.2
    cutmix: float = 1.0
    mix_prob: float = 0.33
    erasing: float = 0.1
    smoothing: float = 0.1
    drop_path: float = 0.0
    ema: float = 0.998
    clip_grad: float = 5.0
    seed: int = 0
    amp: bool = False
    channels_last: bool = True
    threads: int = 0
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        rules: list[tuple[str, Callable[[float], bool], str]] = [
            ("image_size epochs batch_size lr", lambda value: value > 0, "positive"),
            ("weight_decay depthwise_weight_decay", lambda value: value >= 0, "0 or more"),
            ("warmup_epochs mixup cutmix clip_grad", lambda value: value >= 0, "0 or more"),
            ("seed threads workers", lambda value: value >= 0, "0 or more"),
            ("mix_prob erasing hflip", lambda value: 0 <= value <= 1, "in [0, 1]"),
            ("smoothing drop_path ema", lambda value: 0 <= value < 1, "in [0, 1)"),
            ("min_crop", lambda value: 0 < value <= 1, "in (0, 1]"),
        ]
        for names, holds, rule in rules:
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be fewer than epochs, not {self.warmup_epochs} of {self.epochs}: "
                "give fewer (--warmup-epochs), or 0 for none"
            )
        if self.batch_size % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"batch_size must be even for mixup and cutmix, not {self.batch_size}")

    @property
    def data_set(self) -> str:
        """The name of the data folder, without its path."""
        return Path(self.data).resolve().name

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields that decide the result: all but where it runs and where it is written.

        The number of threads and the device alter it a little, by how sums are rounded at each step, and are left out
        so that an interrupted run may go on elsewhere.
        """
        kept = {name: value for name, value in asdict(self).items() if name not in ("out", "threads", "device")}
        return kept | {"data": self.data_set}

    def command(self) -> str:
        """Return the command line that repeats this run; the folders are the data set's name and `OUT`."""
        words = ["mkf", "train", "--model", self.model]
        words += [word for key, value in self.model_kwargs.items() for word in ("--model-kwargs", f"{key}={value}")]
        words += ["--data", self.data_set, "--out", "OUT"]
        defaults = {option.name: option.default for option in fields(self) if option.default is not MISSING}
        for name, value in self.recipe.items():
            if name in defaults and value != defaults[name]:
                option = name.replace("_", "-")
                if isinstance(value, bool):
                    words.append(f"--{option}" if value else f"--no-{option}")
                else:
                    words += [f"--{option}", str(value)]
        return shlex.join(words)
