"""The training loop: one configuration in, a folder with the weights, the control and the history out."""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mkf import __version__
from mkf._files import UNFINISHED, replacing
from mkf.bank.checkpoint import write
from mkf.nn import KeyConv2d
from mkf.train.config import TrainConfig
from mkf.train.data import TEST_SPLITS, TRAIN_SPLITS, ParquetImages, count_classes, loaders
from mkf.train.device import find_device
from mkf.train.model import build_model


@dataclass(frozen=True)
class EpochRecord:
    """One line of the history; losses are means over images, `top1` is in percent, of the averaged weights if any."""

    epoch: int
    lr: float
    train_loss: float
    test_loss: float
    top1: float
    images_per_second: float
    seconds: float


def train(
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_start: Callable[[float], None] | None = None,
) -> list[EpochRecord]:
    """Train a classifier and write the results to `config.out`.

    The folder then holds `model.safetensors` (the weights, averaged if `ema`, with metadata), `initial.safetensors`
    (the untrained weights of the same seed, a control), `history.csv` and `history.json`, and, while the run
    goes on, `last.pt`. Every file is written beside its place and moved there. Called again with the same
    configuration after an interruption, it goes on after the last whole epoch and ends with the same weights, if it
    is on the CPU with the same number of threads: another number rounds sums otherwise, and a GPU does at each call.

    Args:
        config: The run.
        on_epoch: Called after every epoch, when its checkpoint is written.
        on_step: Called after every step with the steps done and the steps of the whole run.
        on_start: Called before the first step with the top-1 accuracy in percent.

    Returns:
        The history, one record an epoch.

    Raises:
        FileNotFoundError: The data folder is missing or lacks a split.
        FileExistsError: `out` holds a finished run.
        ValueError: Bad data, model or option, an interrupted run of another configuration or on other images, another
            run that writes into `out` now, a loss not finite, or one of several processes, as under torchrun.
        OSError: `out` cannot be made or written.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # each would train on its own and write into the same folder
        raise ValueError("mkf train runs in one process on one device; start it without torchrun, or with one process")
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        return _train(config, out, on_epoch, on_step, on_start)


def _train(
    config: TrainConfig,
    out: Path,
    on_epoch: Callable[[EpochRecord], None] | None,
    on_step: Callable[[int, int], None] | None,
    on_start: Callable[[float], None] | None,
) -> list[EpochRecord]:
    """What `train` does in its folder, which is there and no other run's."""
    if (out / "model.safetensors").exists():
        raise FileExistsError(f"{out} holds a finished run; choose another folder")
    for part in out.glob(UNFINISHED):  # of a run that was killed as it wrote
        part.unlink()
    last = out / "last.pt"
    state = _kept(last, config) if last.exists() else None  # other options are told before the images are read
    kept = len(state["history"]) if state else 0
    try:
        run = _Run(config)
        if state:
            run.load(state)
        else:
            write(out / "initial.safetensors", run.model.state_dict(), run.metadata(epochs=0))
            if on_start:
                on_start(run.test()[1])
        del state  # its weights would stay in memory
        while len(run.history) < config.epochs:
            record = run.epoch(on_step)
            _write_history(run.history, out)
            with replacing(last) as file:
                torch.save(run.state(), file)
            kept = record.epoch
            if on_epoch:
                on_epoch(record)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"the same command goes on from {f'epoch {kept + 1}' if kept else 'the start'}")
        raise
    metadata = run.metadata(epochs=config.epochs) | {"test_accuracy": f"{run.history[-1].top1:.2f}"}
    write(out / "model.safetensors", run.tested.state_dict(), metadata)
    last.unlink()
    return run.history


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second run in the folder: each would replace the files of the other.

    The lock is on the folder itself and ends with the process, however that ends. Windows and some network disks have
    no such locks; there nothing is refused.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing into {folder}: choose another folder, or wait") from None
        except OSError:  # this disk has none
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # processes that load data hold the descriptor too, open
    finally:
        os.close(descriptor)


class _Run:
    """The state of one training."""

    def __init__(self, config: TrainConfig) -> None:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.config = config
        self.device = find_device(config.device)
        self.classes = count_classes(config.data)
        _seed(config.seed, 0)
        model = build_model(config, self.classes)  # wrong options are told before the images are read
        train_set = ParquetImages(config.data, TRAIN_SPLITS)
        test_set = ParquetImages(config.data, TEST_SPLITS)
        self.images = {name: np.bincount(of.labels).tolist() for name, of in (("train", train_set), ("test", test_set))}
        self.train_loader, self.test_loader = loaders(config, train_set, test_set)
        if not len(self.train_loader):
            raise ValueError(f"{len(train_set)} training images are fewer than one batch of {config.batch_size}")
        self.steps = len(self.train_loader)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device=self.device).to(memory_format=self.memory_format)
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.optimizer = create_optimizer_v2(_parameter_groups(config, self.model), opt="adamw", lr=config.lr)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=config.epochs - config.warmup_epochs,  # the cosine's, which begins where the warm-up ends
            warmup_epochs=config.warmup_epochs,
            warmup_prefix=True,
            warmup_lr=config.lr / 100,
            min_lr=config.lr / 1000,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        self.mix, self.loss = _targets(config, self.classes)
        self.history: list[EpochRecord] = []

    @property
    def tested(self) -> nn.Module:
        """The model that is tested and saved: the average of the weights if there is one."""
        module: nn.Module = self.ema.module if self.ema else self.model
        return module

    def epoch(self, on_step: Callable[[int, int], None] | None) -> EpochRecord:
        """Train one epoch, test, and append to the history."""
        number = len(self.history)
        _seed(self.config.seed, number + 1)
        start = time.perf_counter()
        train_loss = self._train(number, on_step)
        seconds = time.perf_counter() - start
        test_loss, top1 = self.test()
        record = EpochRecord(
            epoch=number + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            train_loss=train_loss,
            test_loss=test_loss,
            top1=top1,
            images_per_second=self.steps * self.config.batch_size / seconds,
            seconds=time.perf_counter() - start,
        )
        self.history.append(record)
        return record

    def _train(self, number: int, on_step: Callable[[int, int], None] | None) -> float:
        """Run the steps of epoch `number`, counted from 0, and return the mean loss."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for step, (images, labels) in enumerate(self.train_loader, start=number * self.steps):
            self.scheduler.step_update(step)
            images, targets = self._to_device(images), labels.to(self.device)
            if self.mix:
                images, targets = self.mix(images, targets)
            with self._autocast():
                logits = self.model(images)
            loss = self.loss(logits.float(), targets)
            self.optimizer.zero_grad()
            loss.backward()
            if self.config.clip_grad:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model, step=step)
            total += loss.detach()
            if on_step:
                on_step(step + 1, self.config.epochs * self.steps)
        mean = total.item() / self.steps
        if not torch.isfinite(total):
            raise ValueError(f"the training loss is {mean} in epoch {number + 1}: try a lower learning rate")
        return mean

    @torch.inference_mode()
    def test(self) -> tuple[float, float]:
        """Return the mean cross-entropy and the top-1 accuracy in percent on the test split."""
        model = self.tested.eval()
        loss, correct, count = 0.0, 0, 0
        for images, labels in self.test_loader:
            labels = labels.to(self.device)
            with self._autocast():
                logits = model(self._to_device(images))
            loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
        return loss / count, 100 * correct / count

    def _to_device(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device, memory_format=self.memory_format, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.amp)

    def state(self) -> dict[str, Any]:
        """What `load` needs; plain types and tensors, so that it loads with `weights_only`."""
        return {
            "recipe": self.config.recipe,
            "images": self.images,
            "history": [asdict(record) for record in self.history],
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same recipe.

        Raises:
            ValueError: It is of other images, in a folder of the same name.
        """
        if state["images"] != self.images:
            raise ValueError(
                f"{self.config.out} holds an interrupted run on other images, in a folder that was called "
                f"{self.config.data_set} too, with other numbers of images in its classes: go on with those, or choose "
                "another --out"
            )
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [EpochRecord(**record) for record in state["history"]]

    def metadata(self, epochs: int) -> dict[str, str]:
        """Provenance of saved weights; safetensors keeps strings only."""
        import timm

        kwargs = {name: value for name, value in self.config.model_kwargs.items() if name != "pretrained"}
        return {
            "model": self.config.model,
            "model_kwargs": json.dumps(kwargs | {"num_classes": self.classes}),
            "weights": self.config.weights or ("pretrained" if self.config.model_kwargs.get("pretrained") else ""),
            "keys": self.config.keys,
            "image_size": str(self.config.image_size),
            "data_set": self.config.data_set,
            "epochs": str(epochs),
            "seed": str(self.config.seed),
            "command": self.config.command(),
            "versions": json.dumps({"mkf": __version__, "torch": torch.__version__, "timm": timm.__version__}),
        }


_STATE = {"recipe": dict, "images": dict, "history": list, "model": dict, "optimizer": dict}
"""What a state must hold, whether or not weights are averaged."""


def _kept(path: Path, config: TrainConfig) -> dict[str, Any]:
    """The state that an interrupted run of the same recipe kept."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := [name for name, kind in _STATE.items() if not isinstance(state[name], kind)]:
            raise TypeError(f"of another type: {', '.join(wrong)}")
    except Exception as error:  # of a damaged file torch.load raises nearly anything, OSError too
        raise ValueError(
            f"{path} is damaged or not a checkpoint of an interrupted run ({type(error).__name__}): delete it to start "
            "anew"
        ) from error
    mine, theirs = config.recipe, state["recipe"]
    if changed := [key for key in mine if mine[key] != theirs.get(key)]:
        changes = [f"{key}: {theirs.get(key)!r}, now {mine[key]!r}" for key in changed]
        raise ValueError(
            f"{path.parent} holds an interrupted run with other options ({'; '.join(changes)}): repeat the "
            "earlier options to go on, delete the folder, or choose another --out"
        )
    return state


def _parameter_groups(config: TrainConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters by their weight decay: none (also of keys), `weight_decay` and `depthwise_weight_decay`."""
    from timm.optim import param_groups_weight_decay

    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1)
    depthwise = [layer.weight for layer in layers]
    known = set(map(id, depthwise))
    keys = [f"{name}.keys" for name, layer in model.named_modules() if isinstance(layer, KeyConv2d)]
    groups = [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in known]}
        for group in param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=keys)
    ]
    return [*groups, {"params": depthwise, "weight_decay": config.depthwise_weight_decay}]


def _seed(seed: int, epoch: int) -> None:
    """Seed torch, numpy and random for one epoch; hashed, so that neighbouring seeds share no epoch's stream."""
    from timm.utils import random_seed

    random_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def _targets(config: TrainConfig, classes: int) -> tuple[Any, nn.Module]:
    """Return timm's Mixup, if mixing is on, and the loss for its targets."""
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if not (config.mixup or config.cutmix):
        return None, LabelSmoothingCrossEntropy(config.smoothing)
    mix = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        label_smoothing=config.smoothing,
        num_classes=classes,
    )
    return mix, SoftTargetCrossEntropy()


def _write_history(history: list[EpochRecord], out: Path) -> None:
    rows = [asdict(record) for record in history]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    for name, text in {"history.csv": table.getvalue(), "history.json": json.dumps(rows, indent=2) + "\n"}.items():
        with replacing(out / name) as file:
            file.write(text.encode())
