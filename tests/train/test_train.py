"""Training runs, small enough for a test."""

import json
import os
import shlex
from dataclasses import asdict, fields, replace
from inspect import signature
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import mkf.train.engine
from mkf.cli import app
from mkf.cli.train import command
from mkf.train import EpochRecord, TrainConfig, build_model, train
from tests.train.conftest import WriteImages

TINY = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4}


def config(folder: Path, out: str, **changes: Any) -> TrainConfig:
    """Two epochs of two steps."""
    base = TrainConfig(
        model="ConvMixer",
        model_kwargs=TINY,
        data=str(folder),
        out=str(folder.parent / out),
        image_size=16,
        epochs=2,
        warmup_epochs=1,
        batch_size=12,
        device="cpu",  # where the same run gives the same bits
    )
    return replace(base, **changes)


def test_a_pipe_gets_the_error_and_nothing_else(tmp_path: Path) -> None:
    words = ["train", "--model", "ConvMixer", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(app, words).stderr == f"error: no data folder {tmp_path / 'none'}\n"


def cli(folder: Path, out: Path, *more: str) -> tuple[int, str, str]:
    """Run `mkf train` on one epoch of two steps; return the exit code, stdout and stderr."""
    words = ["train", "--model", "ConvMixer", "--data", str(folder), "--out", str(out), "--image-size", "16"]
    words += ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "12", "--device", "cpu"]
    words += [word for key, value in TINY.items() for word in ("--model-kwargs", f"{key}={value}")]
    result = CliRunner().invoke(app, [*words, *more])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def without_times(history: list[EpochRecord]) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(r).items() if k not in ("images_per_second", "seconds")} for r in history]


def test_command_line_end_to_end(colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = cli(colours, out, "--seed", "3")
    assert code == 0, stderr
    assert "epoch 1/1" in stdout
    assert "wrote" in stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "history.csv",
        "history.json",
        "initial.safetensors",
        "model.safetensors",
    ]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # others read the weights as the history
    (row,) = json.loads((out / "history.json").read_text())
    header, line = (out / "history.csv").read_text().splitlines()
    assert header.split(",") == list(row)
    assert [float(word) for word in line.split(",")] == list(row.values())
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model_kwargs"]) == TINY | {"num_classes": 2}
    assert {key: metadata[key] for key in ("model", "data_set", "epochs", "seed")} == {
        "model": "ConvMixer",
        "data_set": "colours",
        "epochs": "1",
        "seed": "3",
    }
    assert float(metadata["test_accuracy"]) == pytest.approx(row["top1"], abs=0.005)
    versions = json.loads(metadata["versions"])
    assert (versions["mkf"], versions["torch"]) == (mkf.__version__, torch.__version__)
    assert str(tmp_path) not in json.dumps(metadata)
    trained, initial = load_file(out / "model.safetensors"), load_file(out / "initial.safetensors")
    assert trained.keys() == initial.keys()
    assert not torch.equal(trained["blocks.0.0.fn.0.weight"], initial["blocks.0.0.fn.0.weight"])


def test_saved_weights_load_into_the_model_and_give_the_accuracy(colours: Path) -> None:
    run = config(colours, "run", epochs=4, batch_size=8, lr=0.02)
    history = train(run)
    model = build_model(run, num_classes=2)
    model.load_state_dict(load_file(Path(run.out) / "model.safetensors"))
    state = mkf.train.engine._Run(run)
    state.ema.module.load_state_dict(model.state_dict())
    assert state.test() == pytest.approx((history[-1].test_loss, history[-1].top1), rel=1e-6)


def test_loss_and_accuracy_are_those_of_the_whole_split(colours: Path) -> None:
    run = mkf.train.engine._Run(config(colours, "run", batch_size=3, mixup=0, cutmix=0))
    assert [len(labels) for _, labels in run.test_loader] == [6, 2]
    images, labels = (torch.cat(parts) for parts in zip(*run.test_loader, strict=True))
    with torch.no_grad():
        logits = run.tested.eval()(images)
    accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item(), accuracy
    assert 0 < accuracy < 100
    assert run.test() == pytest.approx(expected, rel=1e-5)


def test_the_recipe_is_followed(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, norms, inputs, outputs, seeds = [], [], [], [], []
    clip, seed = torch.nn.utils.clip_grad_norm_, mkf.train.engine._seed
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: (norms.append(norm), clip(p, norm)))
    monkeypatch.setattr(mkf.train.engine, "_seed", lambda *numbers: (seeds.append(numbers), seed(*numbers)))
    options = {"mixup": 0.3, "cutmix": 0.6, "mix_prob": 0.4, "smoothing": 0.2}
    options |= {"erasing": 0.35, "min_crop": 0.7, "hflip": 0.3}
    run = mkf.train.engine._Run(config(colours, "run", amp=True, clip_grad=0.5, seed=7, **options))
    run.model.register_forward_hook(lambda _, x, y: inputs.append(x[0]) or outputs.append(y))
    for _ in range(2):
        run.epoch(lambda *_: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates[:2] == pytest.approx([2e-5, 1.01e-3])  # a warm-up of one epoch, two steps, from a hundredth on
    assert rates[2:] == pytest.approx([2e-3, 1.001e-3])  # then the peak, and half of a cosine down to a thousandth
    assert norms == [0.5] * 4
    assert seeds == [(7, 0), (7, 1), (7, 2)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert (run.mix.mixup_alpha, run.mix.cutmix_alpha, run.mix.mix_prob, run.mix.label_smoothing) == (
        0.3,
        0.6,
        0.4,
        0.2,
    )
    assert isinstance(run.train_loader.sampler, torch.utils.data.RandomSampler)
    steps = {type(step).__name__: step for step in run.train_loader.dataset.transform.transforms}
    assert steps["RandomErasing"].probability == 0.35
    assert steps["RandomResizedCropAndInterpolation"].scale == (0.7, 1.0)
    assert steps["RandomHorizontalFlip"].p == 0.3
    plain = mkf.train.engine._Run(config(colours, "run", mixup=0, cutmix=0, smoothing=0.2, channels_last=False))
    assert plain.mix is None
    assert plain.loss.smoothing == 0.2
    assert plain.memory_format is torch.contiguous_format


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_the_learning_rate_rises_to_its_peak_and_falls_without_a_jump(colours: Path, warmup_epochs: int) -> None:
    run = mkf.train.engine._Run(config(colours, "run", epochs=12, warmup_epochs=warmup_epochs, batch_size=2))
    rates = []
    for step in range(12 * run.steps + 1):
        run.scheduler.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    peak = warmup_epochs * run.steps
    assert max(rates) == rates[peak] == 2e-3
    rise, fall = np.array(rates[: peak + 1]), np.array(rates[peak:])
    assert np.diff(rise) == pytest.approx(0.99 * 2e-3 / max(peak, 1))
    turn = np.linspace(0, np.pi, len(fall))
    assert fall == pytest.approx(2e-6 + (2e-3 - 2e-6) * (1 + np.cos(turn)) / 2)
    assert rates[-1] == pytest.approx(2e-6)


def test_a_test_sees_the_whole_picture(colours: Path) -> None:
    run = mkf.train.engine._Run(config(colours, "run"))
    pictures, normalised = run.test_loader.dataset.images, next(iter(run.test_loader))[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in run.train_loader.dataset.channel_statistics())
    for picture, image in zip(pictures, normalised, strict=True):
        torch.testing.assert_close(
            image * std + mean, torch.from_numpy(picture).permute(2, 0, 1) / 255, rtol=0, atol=1e-5
        )


def test_it_learns(colours: Path) -> None:
    history = train(config(colours, "run", epochs=8, lr=0.02, ema=0.5, randaug="", mixup=0, cutmix=0, erasing=0))
    assert history[-1].top1 == 100
    assert history[-1].train_loss < history[0].train_loss
    assert [record.epoch for record in history] == list(range(1, 9))
    assert history[-1].lr < 0.02 * 0.1


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_resume_gives_the_uninterrupted_run(colours: Path, ema: float) -> None:
    whole = train(config(colours, "whole", epochs=3, ema=ema))
    interrupted = config(colours, "interrupted", epochs=3, ema=ema)

    def stop(record: EpochRecord) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(interrupted, on_epoch=stop)
    assert not (Path(interrupted.out) / "model.safetensors").exists()
    assert (Path(interrupted.out) / "last.pt").exists()
    seen: list[EpochRecord] = []
    resumed = train(interrupted, on_epoch=seen.append)
    assert [record.epoch for record in seen] == [3]
    assert without_times(resumed) == without_times(whole)
    one, other = (load_file(Path(run) / "model.safetensors") for run in (colours.parent / "whole", interrupted.out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_decides(colours: Path) -> None:
    first, again, other = (
        without_times(train(config(colours, out, seed=seed))) for out, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert first != other


def test_the_average_is_tested_but_does_not_change_the_training(colours: Path) -> None:
    plain, averaged = train(config(colours, "a", ema=0)), train(config(colours, "b", ema=0.999))
    assert [r.train_loss for r in plain] == [r.train_loss for r in averaged]
    assert plain[-1].test_loss != averaged[-1].test_loss


def test_every_parameter_decays_once_and_depthwise_filters_at_their_own_rate(colours: Path) -> None:
    run = mkf.train.engine._Run(config(colours, "run", weight_decay=0.25, depthwise_weight_decay=0.75))
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(list(run.model.parameters()))
    for name, parameter in run.model.named_parameters():
        depthwise = parameter.ndim == 4 and parameter.shape[1] == 1
        assert decay[id(parameter)] == (0.75 if depthwise else 0.0 if parameter.ndim == 1 else 0.25), name


def test_what_trains_in_a_layer_with_keys_does_not_decay(colours: Path) -> None:
    options = {"keys": "analytic:B:3", "key_parameters": "scale,shift,bias,keys", "weight_decay": 0.25}
    run = mkf.train.engine._Run(config(colours, "run", **options))
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    named = dict(run.model.named_parameters())
    own = [name for name in named if name.startswith("blocks.0.0.fn.0.")]
    assert {name.rpartition(".")[2] for name in own} == {"scale", "shift", "bias", "keys"}
    assert {decay[id(named[name])] for name in own} == {0}
    assert decay[id(named["blocks.0.1.weight"])] == 0.25


def test_a_registered_model_with_drop_path_and_autocast(colours: Path) -> None:
    kwargs = {"dims": (4, 8, 8, 8), "depths": (1, 1, 1, 0)}
    run = config(colours, "run", model="convnext_atto", model_kwargs=kwargs, drop_path=0.1, amp=True, image_size=32)
    steps: list[tuple[int, int]] = []
    train(run, on_step=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert load_file(Path(run.out) / "model.safetensors")["stages.0.blocks.0.conv_dw.weight"].shape == (4, 1, 7, 7)


def test_command_line_and_configuration_have_the_same_options() -> None:
    options = signature(command).parameters
    assert set(options) == {option.name for option in fields(TrainConfig)}
    defaults = TrainConfig(model="", data="", out="")
    assert {n: p.default for n, p in options.items() if n not in ("model", "data", "out", "model_kwargs")} == {
        n: v for n, v in asdict(defaults).items() if n not in ("model", "data", "out", "model_kwargs")
    }


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-6, 1.0),
    randaug=st.sampled_from(["", "rand-m5-n2"]),
    amp=st.booleans(),
    channels_last=st.booleans(),
    kwargs=st.dictionaries(st.sampled_from(["dims", "name"]), st.sampled_from([(1, 2), "a b", 0.5, None, True])),
)
def test_recorded_command_repeats_the_recipe(lr: float, **options: Any) -> None:
    config = TrainConfig(model="m", data="set", out="OUT", lr=lr, model_kwargs=options.pop("kwargs"), **options)
    captured: list[TrainConfig] = []
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("mkf.train.train", lambda config, *_: captured.append(config))
        result = CliRunner().invoke(app, shlex.split(config.command())[1:])
    assert result.exit_code == 0, result.stderr
    assert captured == [config]


def test_finished_run_is_kept(colours: Path, tmp_path: Path) -> None:
    assert cli(colours, tmp_path / "run")[0] == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, _, stderr = cli(colours, tmp_path / "run")
    assert code == 1
    assert "holds a finished run" in stderr
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_one_of_several_processes(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    code, _, stderr = cli(colours, tmp_path / "run")
    assert code == 1
    assert "mkf train runs in one process on one device; start it without torchrun" in stderr
    assert not list(tmp_path.glob("run/*"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli(colours, tmp_path / "run")[0] == 0


def interrupt(run: TrainConfig) -> None:
    """Stop it after its first epoch."""

    def stop(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, on_epoch=stop)


def saved(state: Any) -> bytes:
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_resume_refuses_other_options(colours: Path) -> None:
    interrupt(config(colours, "run"))
    other = r"interrupted run with other options \(lr: 0.002, now 0.1\): repeat the earlier options to go on"
    with pytest.raises(ValueError, match=other):
        train(config(colours, "run", lr=0.1))


def test_resume_refuses_other_images_in_a_folder_of_the_same_name(
    colours: Path, tmp_path: Path, write_images: WriteImages
) -> None:
    interrupt(config(colours, "run"))
    other = tmp_path / "other" / "colours"
    for split, labels in {"train": [0, 1, 2, 2] * 4, "val": [0]}.items():
        write_images(other / f"{split}-0.parquet", [Image.new("RGB", (16, 16))] * len(labels), labels)
    with pytest.raises(ValueError, match="run on other images, in a folder that was called colours too"):
        train(replace(config(colours, "run"), data=str(other)))


def test_resume_refuses_what_is_no_checkpoint(colours: Path) -> None:
    interrupt(config(colours, "run"))
    last = colours.parent / "run" / "last.pt"
    whole, state = last.read_bytes(), torch.load(last, weights_only=True)
    cut = [whole[:size] for size in range(0, len(whole), len(whole) // 40)]
    parts: list[Any] = [[1], {}, {"recipe": state["recipe"]}, state | {"recipe": [1]}]
    for content in (b"not a checkpoint", *cut, *map(saved, parts)):
        last.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.pt is damaged or not a checkpoint of an interrupted run"):
            train(config(colours, "run"))


def test_a_killed_run_leaves_no_parts_for_long(colours: Path) -> None:
    part = colours.parent / "run" / ".last.pt.writing-01234567"
    part.parent.mkdir()
    part.touch()
    train(config(colours, "run"))
    assert not part.exists()


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be locked here")
def test_two_runs_in_one_folder(colours: Path) -> None:
    run = config(colours, "run")

    def begin_another(done: int, steps: int) -> None:
        with pytest.raises(ValueError, match=r"another run is writing into .*run: choose another folder, or wait"):
            train(replace(run, seed=1))

    train(run, on_step=begin_another)
    with pytest.raises(FileExistsError, match="finished run"):  # the folder is free again
        train(run)


def test_an_interruption_tells_where_the_run_goes_on(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = mkf.train.engine._seed  # which every epoch does first, and the building of the model, as epoch 0
    for epoch, place in ((1, "the start"), (3, "epoch 3"), (0, "epoch 3")):

        def stop(seed: int, now: int, epoch: int = epoch) -> None:
            if now == epoch:
                raise KeyboardInterrupt
            begin(seed, now)

        with monkeypatch.context() as patch:
            patch.setattr(mkf.train.engine, "_seed", stop)
            code, _, stderr = cli(colours, tmp_path / "run", "--epochs", "3")
        assert (code, stderr) == (130, f"interrupted; the same command goes on from {place}")
    code, stdout, _ = cli(colours, tmp_path / "run", "--epochs", "3")
    assert code == 0
    assert "epoch 3/3" in stdout
    assert "epoch 2/3" not in stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "no data folder nowhere"),
        (["--model", "convnext_ato"], "timm has no model 'convnext_ato'; did you mean convnext_atto"),
        (["--model", "ConvMixr"], "did you mean ConvMixer"),
        (["--model", "zzzzzzzzzzz"], "timm has no model 'zzzzzzzzzzz'"),
        (["--model-kwargs", "width=3"], "ConvMixer does not work with"),
        (["--image-size", "2"], "and 2x2 images"),
        (["--model-kwargs", "dim"], "--model-kwargs takes KEY=VALUE, not 'dim'"),
        (["--batch-size", "26"], "24 training images are fewer than one batch of 26"),
        (["--batch-size", "3"], "batch_size must be even"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--warmup-epochs", "1"], "warmup_epochs must be fewer than epochs, not 1 of 1: give fewer"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--ema", "1"], r"ema must be in [0, 1)"),
        (["--erasing", "1.5"], r"erasing must be in [0, 1]"),
        (["--hflip", "-0.5"], r"hflip must be in [0, 1]"),
        (["--min-crop", "0"], r"min_crop must be in (0, 1]"),
        (["--randaug", "nonsense"], "randaug 'nonsense' is not timm's notation"),
        (["--device", "quantum"], "device 'quantum' cannot be used"),
        (["--lr", "1e30", "--ema", "0"], "try a lower learning rate"),
    ],
)
def test_user_errors(colours: Path, tmp_path: Path, words: list[str], message: str) -> None:
    code, _, stderr = cli(colours, tmp_path / "run", *words)
    assert code == 1
    assert message in stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "convnext_ato"], "timm has no model"),
        (["--weights", "nothing.pth"], "there is no checkpoint nothing.pth"),
        (["--keys", "paper9"], "no keys called 'paper9'"),
        (["--keys", "analytic:B:3", "--assign", "nonsense"], "nonsense"),
        (["--keys", "analytic:B:3", "--key-parameters", "nonsense"], "nonsense"),
    ],
)
def test_wrong_options_are_told_before_the_images_are_read(
    colours: Path, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mkf.train.engine, "ParquetImages")
    code, _, stderr = cli(colours, tmp_path / "run", *words)
    assert code == 1
    assert message in stderr


def test_unwritable_out_is_told_before_the_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, stderr = cli(tmp_path / "no data", tmp_path / "file")
    assert code == 1
    assert "--out" in stderr
    assert "this is a file; name a folder" in stderr
