"""`mkf convert`, from checkpoints and from names."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mkf
from mkf.bank.checkpoint import metadata
from mkf.bank.compact import KEYS, compact, expand
from mkf.cli import app

TINY = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "net.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("convnext_atto", num_classes=5, **TINY).state_dict(), path)
    return path


def test_checkpoint_to_an_ordinary_one(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "keys.safetensors"
    code, stdout, stderr = run(checkpoint, "--out", out)
    assert code == 0, stderr
    assert "104 filters in 5 layers: 20,384 bytes" in stdout
    model = timm.create_model("convnext_atto", num_classes=5, **TINY)
    before, after = load_file(checkpoint), load_file(out)
    model.load_state_dict(after)
    for name, tensor in before.items():
        if "conv_dw.weight" not in name:
            assert torch.equal(after[name], tensor), name
            continue
        fit = mkf.affine_fit(after[name][:, 0], mkf.keys.paper8())
        assert fit.residual.max() < 1e-4
        assert torch.equal(fit.index, mkf.affine_fit(tensor[:, 0], mkf.keys.paper8()).index)


def test_a_folder_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    code, _, stderr = run(checkpoint.parent, "--out", tmp_path / "x.safetensors")
    assert code == 1
    assert "is a folder: give the checkpoint in it, such as" in stderr


def test_the_filters_keep_their_dtype(checkpoint: Path, tmp_path: Path) -> None:
    half, out = tmp_path / "half.safetensors", tmp_path / "keys.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(checkpoint).items()}, half)
    assert run(half, "--out", out)[0] == 0
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}


def test_compact_is_smaller_and_read_by_mkf(checkpoint: Path, tmp_path: Path) -> None:
    ordinary, small = tmp_path / "ordinary.safetensors", tmp_path / "small.safetensors"
    assert run(checkpoint, "--out", ordinary)[0] == 0
    assert run(checkpoint, "--out", small, "--compact", "--keys", "paper8")[0] == 0
    assert small.stat().st_size < ordinary.stat().st_size - 10_000
    stored = load_file(small)
    assert stored["stages.0.blocks.0.conv_dw.index"].dtype == torch.uint8
    assert stored[KEYS].shape == (8, 7, 7)
    theirs, ours = (mkf.FilterBank.from_checkpoint(path) for path in (ordinary, small))
    assert torch.equal(theirs.filters, ours.filters)
    assert theirs.metadata["layer"].to_pylist() == ours.metadata["layer"].to_pylist()


def test_name_of_timm(tmp_path: Path) -> None:
    out = tmp_path / "pico.safetensors"
    code, stdout, stderr = run("convnextv2_atto", "--no-pretrained", "--out", out, "--keys", "analytic:B")
    assert code == 0, stderr
    assert "stages.2.blocks.5.conv_dw" in stdout
    timm.create_model("convnextv2_atto").load_state_dict(load_file(out))
    told = {"model": "convnextv2_atto", "model_kwargs": '{"num_classes": 1000}', "image_size": "224", "licence": ""}
    assert metadata(out) == told | {"keys": "analytic:B", "format": "pt"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.pth", "--out", "a.safetensors"], "no checkpoint"),
        (["convnext_ato", "--out", "a.safetensors", "--no-pretrained"], "did you mean"),
        (["resnet18", "--out", "a.safetensors", "--no-pretrained"], "no depthwise weight"),
        (["convnext_atto", "--out", "a.pth", "--no-pretrained"], "safetensors"),
        (["convnext_atto", "--out", "a.safetensors", "--no-pretrained", "--keys", "paper9"], "no keys called"),
        (["convnext_atto", "--out", "a.safetensors", "--no-pretrained", "--model", "x"], "go with --finetune"),
        (["convnext_atto", "--out", "a.safetensors", "--no-pretrained", "--epochs", "5"], "go with --finetune"),
        (["convnext_atto", "--out", "a.safetensors", "--no-pretrained", "--finetune", "none"], "no data folder none"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run(*words)
    assert code == 1
    assert message in stderr
    assert not stdout
    assert not list(tmp_path.iterdir())


def test_unwritable_out_is_told_before_the_network_is_read(tmp_path: Path) -> None:
    code, stdout, stderr = run("nothing.pth", "--out", "/proc/zz/keys.safetensors")
    assert (code, stdout) == (1, "")
    assert stderr == "error: --out /proc/zz: the folder cannot be made (No such file or directory)"
    (tmp_path / "file").write_text("")
    assert "this is a file; name a folder" in run("nothing.pth", "--out", tmp_path / "file" / "keys.safetensors")[2]


def test_wrong_data_are_told_before_a_missing_name(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, stderr = run(checkpoint, "--out", tmp_path / "keys.safetensors", "--finetune", tmp_path / "empty")
    assert code == 1
    assert "empty has no train-*.parquet" in stderr


def test_names_with_brackets_are_no_markup(tmp_path: Path) -> None:
    weights = {f"[/{i}]blocks[red].weight": torch.randn(4, 1, k, k) for i, k in enumerate((7, 5))}
    torch.save(weights, tmp_path / "net.pth")
    code, stdout, stderr = run(tmp_path / "net.pth", "--out", tmp_path / "[bold]keys.safetensors")
    assert code == 0, stderr
    assert "[/0]blocks[red] 4" in stdout
    assert "Left alone, 5x5 unlike the keys: [/1]blocks[red]" in stdout
    assert f"Written to {tmp_path}/[bold]keys.safetensors" in stdout


def test_the_network_itself_is_not_overwritten(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    code, _, stderr = run(checkpoint, "--out", checkpoint.parent / ".." / checkpoint.parent.name / checkpoint.name)
    assert code == 1
    assert "choose another name" in stderr
    assert checkpoint.read_bytes() == before


def test_keys_are_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    mkf.keys.paper8().save(path)
    assert "choose another name" in run(checkpoint, "--keys", path, "--out", path)[2]
    assert mkf.KeySet.load(path) == mkf.keys.paper8()


def test_a_compact_network_keeps_its_keys(checkpoint: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "small", "again", "smaller", "paper")}
    assert run(checkpoint, "--out", paths["plain"], "--keys", "analytic:B")[0] == 0
    assert run(checkpoint, "--out", paths["small"], "--keys", "analytic:B", "--compact")[0] == 0
    assert run(paths["small"], "--out", paths["again"])[0] == 0
    assert run(paths["small"], "--out", paths["smaller"], "--compact")[0] == 0
    assert run(paths["small"], "--out", paths["paper"], "--keys", "paper8")[0] == 0
    plain, again, smaller, paper = (load_file(paths[name]) for name in ("plain", "again", "smaller", "paper"))
    assert plain.keys() == again.keys() == paper.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    torch.testing.assert_close(expand(smaller), plain)
    name = "stages.0.blocks.0.conv_dw.weight"
    assert mkf.affine_fit(paper[name][:, 0], mkf.keys.paper8()).residual.max() < 1e-4


@pytest.mark.parametrize("trained", [False, True])
def test_a_network_trained_with_keys_keeps_them(tmp_path: Path, trained: bool) -> None:
    model = mkf.convert(timm.create_model("convnext_atto", num_classes=5, **TINY), mkf.keys.analytic("B"))
    layers = [module for module in model.modules() if isinstance(module, mkf.KeyConv2d)]
    if trained:  # the keys of each layer are then their own, and of no norm
        for i, layer in enumerate(layers):
            layer.keys += i
    torch.save(model.state_dict(), tmp_path / "keyed.pth")
    expected = mkf.restore(model).state_dict()
    ordinary, small = tmp_path / "ordinary.safetensors", tmp_path / "small.safetensors"
    for out, more in ((ordinary, []), (small, ["--compact"])):
        code, stdout, stderr = run(tmp_path / "keyed.pth", "--out", out, *more)
        assert code == 0, stderr
        assert "Filters of 5 layers are keys already and stay; --keys would fit them anew. 104 filters in 5" in stdout
    written, stored = load_file(ordinary), load_file(small)
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    assert all(torch.equal(tensor, written[name]) for name, tensor in expand(stored).items())
    assert stored["stages.0.blocks.0.conv_dw.index"].dtype == torch.uint8
    assert (KEYS in stored) is not trained
    assert run(tmp_path / "keyed.pth", "--out", ordinary, "--keys", "paper8")[0] == 0
    name = "stages.0.blocks.0.conv_dw.weight"
    assert mkf.affine_fit(load_file(ordinary)[name][:, 0], mkf.keys.paper8()).residual.max() < 1e-4


def test_what_the_source_tells_of_itself_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    told = {"model": "convnext_atto", "model_kwargs": "{}", "licence": "MIT", "keys": "", "test_accuracy": "80.00"}
    source, out, again = (tmp_path / f"{name}.safetensors" for name in ("source", "out", "again"))
    save_file(load_file(checkpoint), source, told)
    assert run(source, "--out", out, "--keys", "analytic:B", "--compact")[0] == 0
    told.pop("test_accuracy")
    assert metadata(out) == told | {"keys": "analytic:B", "format": "pt"}
    assert run(out, "--out", again)[0] == 0
    assert metadata(again) == metadata(out)


def test_what_is_left_alone_is_named(tmp_path: Path) -> None:
    path, out = tmp_path / "net.pth", tmp_path / "keys.safetensors"
    weights = {f"blocks.{i}.weight": torch.randn(4, 1, k, k) for i, k in enumerate((7, 5, 3, 5))}
    torch.save({**weights, "head.weight": torch.randn(3, 4)}, path)
    code, stdout, _ = run(path, "--out", out)
    assert code == 0
    assert "Left alone, 5x5 unlike the keys: blocks.1, blocks.3" in stdout
    assert "Left alone, 3x3 unlike the keys: blocks.2" in stdout
    assert torch.equal(load_file(out)["blocks.1.weight"], weights["blocks.1.weight"])


def test_compact_round_trip_and_its_errors() -> None:
    keys = mkf.keys.paper8()
    filters = torch.randn(6, 1, 7, 7)
    state = {"a.weight": filters, "a.bias": torch.zeros(6), "b.weight": torch.randn(4, 4)}
    small, fits = compact(state, keys)
    again = expand(small)
    assert set(again) == set(state)
    fit = fits["a"]
    expected = fit.scale[:, None, None] * keys.filters[fit.index.long()] + fit.shift[:, None, None]
    assert torch.equal(again["a.weight"][:, 0], expected)
    assert expand(again) == again
    filters[2, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight holds 1"):
        compact(state, keys)
    with pytest.raises(ValueError, match="has no keys"):
        expand({name: tensor for name, tensor in small.items() if name != KEYS})
    with pytest.raises(ValueError, match="beyond its keys"):
        expand(small | {KEYS: keys.filters[:1]})
    with pytest.raises(ValueError, match="the layer a has an index beyond its keys: -1 of 8"):
        expand(small | {"a.index": torch.tensor([0, 1, -1, 2, 3, 4])})
    with pytest.raises(ValueError, match="the layer a has no index"):
        expand(small | {"a.index": torch.empty(0, dtype=torch.uint8)})


def test_a_first_layer_for_grey_images_is_told(tmp_path: Path) -> None:
    shapes = {"stem": (4, 1, 7, 7), "point": (4, 4, 1, 1), "blocks.0": (4, 1, 7, 7)}
    orders = {
        "grey": (["stem", "point", "blocks.0"], True),
        "colour": (["blocks.0", "point", "rgb"], False),  # as safetensors keep a network that begins with rgb
        "dense": (["point", "stem", "blocks.0"], False),
        "collection": (["stem", "blocks.0"], False),
    }
    for name, (order, told) in orders.items():
        path = tmp_path / f"{name}.pth"
        torch.save({f"{layer}.weight": torch.randn(shapes.get(layer, (4, 3, 4, 4))) for layer in order}, path)
        code, _, stderr = run(path, "--out", tmp_path / "keys.safetensors")
        assert code == 0, stderr
        assert ("note: stem comes before any other convolution and was replaced too" in stderr) is told, name


def test_sizes_without_keys_are_named(tmp_path: Path) -> None:
    shapes = {"a": (4, 1, 3, 3), "b": (4, 1, 5, 5), "c": (4, 1, 5, 5), "d": (4, 1, 1, 9), "dense": (4, 4, 7, 7)}
    torch.save({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "net.pth")
    code, _, stderr = run(tmp_path / "net.pth", "--out", tmp_path / "keys.safetensors")
    assert code == 1
    assert "no depthwise weight (C, 1, 7, 7) with C > 1 to convert; there are some of 1x9, 3x3, 5x5" in stderr
    assert "choose keys of that size, as --keys analytic:B:5" in stderr
    with pytest.raises(ValueError, match=r"there are some of 1x9$"):
        compact({"d.weight": torch.randn(shapes["d"])}, mkf.keys.paper8())


def test_values_beyond_float32_are_called_that() -> None:
    filters = torch.randn(6, 1, 7, 7, dtype=torch.float64)
    filters[2, 0, 0, 0] = -1e300
    filters[3] = float("nan")
    with pytest.raises(ValueError, match=r"holds torch.float64 with values up to 1e\+300, beyond the range of float32"):
        compact({"a.weight": filters}, mkf.keys.paper8())


def test_state_of_a_converted_model_is_read_too(tmp_path: Path) -> None:
    model = mkf.convert(timm.create_model("convnext_atto", num_classes=5, **TINY), mkf.keys.paper8())
    save_file(model.state_dict(), tmp_path / "keyed.safetensors")
    bank = mkf.FilterBank.from_checkpoint(tmp_path / "keyed.safetensors")
    assert len(bank) == 104
    mkf.restore(model).load_state_dict(expand(load_file(tmp_path / "keyed.safetensors")))
