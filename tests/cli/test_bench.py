import json
import statistics
import subprocess
import sys

import pytest
import timm
import torch
from typer.testing import CliRunner

import mkf
from mkf.benchmarks import affine_fit, key_conv2d, measure, models
from mkf.cli import app
from mkf.cli._errors import user_errors


def test_bench_fit_writes_table_results_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "fit.json", tmp_path / "fit.png"
    words = ["bench", "fit", "--filters", "1000", "--keys", "8", "--rounds", "2", "--only", "mkf native"]
    result = CliRunner().invoke(app, [*words, "--json", str(out), "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    (written,) = json.loads(out.read_text())
    assert written["baseline"] == written["rows"][0]["name"]
    assert written["environment"]["versions"]["torch"]
    assert figure.stat().st_size > 1000


def test_bench_fit_refuses_what_it_cannot_time():
    result = CliRunner().invoke(app, ["bench", "fit", "--dtype", "int8"])
    assert result.exit_code == 1
    assert "float32" in result.stderr


def test_bench_fit_names_the_candidates_when_none_is_meant():
    result = CliRunner().invoke(app, ["bench", "fit", "--filters", "10", "--only", "nonsense"])
    assert result.exit_code == 1
    assert "mkf native" in result.stderr


def test_bench_conv_writes_table_results_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "conv.json", tmp_path / "conv.svg"
    words = ["bench", "conv", "--shape", "1,16,8", "--case", "published", "--rounds", "2", "--only", "mkf"]
    words += ["--only", "nn.Conv2d, weight frozen"]
    result = CliRunner().invoke(app, [*words, "--json", str(out), "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    assert "of the copy" in result.output
    (written,) = json.loads(out.read_text())
    assert written["baseline"] == written["rows"][0]["name"] == "copy"
    ratio = written["derived"]["times as long as mkf"]["nn.Conv2d, weight frozen"]
    shown = next(line for line in result.output.splitlines() if "nn.Conv2d, weight frozen" in line)
    assert f" {ratio:.2f} " in shown
    drawn = figure.read_text()
    assert "nn.Conv2d, weight frozen" in drawn
    assert "geometric mean" in drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conv", "--shape", "8,96"], "8,96,56"),
        (["conv", "--case", "nonsense"], "published"),
        (["conv", "--only", "nonsense", "--rounds", "1"], "mkf, NCHW"),
        (["conv", "--only", "nn.Conv2d", "--figure", "conv.png"], "add --only mkf"),
        (["model", "convnext_atto", "--size", "64", "--only", "nonsense"], "weights frozen"),
        (["model", "test_convnext", "--size", "2"], "test_convnext takes no images of 2x2: "),
        (["fit", "--filters", 10**15], "there is not enough memory for 196000000000000000 bytes"),
        (["fit", "--filters", 10**17], "there is not enough memory"),
        (["conv", "--shape", "1,8,300000000", "--case", "published"], "there is not enough memory"),
    ],
)
def test_bench_refuses_what_it_cannot_time(words, message):
    result = CliRunner().invoke(app, ["bench", *map(str, words)])
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [["fit"], ["conv"], ["model", "convnext_atto"]])
def test_bench_tells_before_it_measures_what_cannot_be_written(words, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for suite in (affine_fit, key_conv2d, models):
        monkeypatch.setattr(suite, "run", None)
    for option, name, message in (
        ("--json", "none/x.json", "there is no folder"),
        ("--json", "", "this is a folder; name a file"),
        ("--figure", "none/x.png", "there is no folder"),
        ("--figure", "x.xyz", "a figure's name must end in one of "),
        ("--figure", "x", "a figure's name must end in one of "),
    ):
        result = CliRunner().invoke(app, ["bench", *words, option, str(tmp_path / name)])
        assert result.exit_code == 1
        assert message in result.stderr.replace("\n", " ")


def test_errors_that_are_not_the_user_s_are_raised():
    with pytest.raises(RuntimeError, match="ours"), user_errors():
        raise RuntimeError("ours")


def test_bench_model_writes_table_results_and_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "keep_memory", lambda: True)  # the other tests want theirs back
    out, figure = tmp_path / "model.json", tmp_path / "model.svg"
    monkeypatch.chdir(tmp_path)
    mkf.keys.analytic("B").save("keys[b].safetensors")
    words = ["bench", "model", "convnext_atto", "--train", "bias", "--batch", "1", "--size", "32", "--rounds", "1"]
    words += ["--keys", "keys[b].safetensors"]
    wanted = ["mkf, channels-last", "mkf, norms apart, channels-last", "nn.Conv2d, weights frozen, channels-last"]
    words += [word for name in wanted for word in ("--only", name)]
    result = CliRunner().invoke(app, [*words, "--json", str(out), "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    assert "%" in result.output
    assert "keys[b].safetensors" in result.output
    (written,) = json.loads(out.read_text())
    assert written["problem"]["train"] == ["bias"]
    assert [row["name"] for row in written["rows"]] == [*wanted, "without depthwise layers, channels-last"]
    shares = {label: list(of) for label, of in written["derived"].items()}
    assert shares == {label: ["nn.Conv2d, weights frozen"] for label in models.SHARES.values()}
    assert "nn.Conv2d, weights frozen" in figure.read_text()


def test_variants_differ_in_their_depthwise_layers_alone():
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=4, ls_init_value=1.0).eval()
    made = models.variants(model, mkf.keys.analytic("B"), train=("bias",))
    assert set(made) == set(models.VARIANTS)
    parameters = {name: dict(network.named_parameters()) for name, network in made.items()}
    rest = parameters[models.NONE]
    assert rest
    assert not any("conv_dw" in name for name in rest)
    for own in parameters.values():
        assert all(own[name] is parameter for name, parameter in rest.items())
        assert all("conv_dw" in name for name in own if name not in rest)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in rest.values():
            torch.nn.init.normal_(parameter, std=0.3)
    outputs = {name: network(x) for name, network in made.items()}
    for name in (models.APART, models.FROZEN, models.BIAS_ADDED):
        torch.testing.assert_close(outputs[name], outputs[models.MKF], rtol=1e-4, atol=1e-5)
    for name in (models.NONE, models.FREE):
        assert (outputs[name] - outputs[models.MKF]).abs().max() > 1e-3


def test_share_removed_is_of_the_difference_to_no_layer_each_in_its_fastest_layout():
    turns = {
        "mkf, NCHW": [13.0, 15.0, 15.0],
        "mkf, channels-last": [12.0, 14.0, 13.0],
        "nn.Conv2d, weights frozen, NCHW": [20.0, 21.0, 24.0],
        "nn.Conv2d, weights frozen, channels-last": [30.0, 30.0, 30.0],
        "without depthwise layers, NCHW": [10.0, 11.0, 11.0],
        "without depthwise layers, channels-last": [11.0, 12.0, 12.0],
    }
    rows = [measure.Row(name, statistics.median(own), 0.0, 0.0, 0.0, own) for name, own in turns.items()]
    result = measure.Result({}, "without depthwise layers, channels-last", rows, {})
    share = models.share_removed(result, models.FROZEN)
    assert share.value == pytest.approx(8 / 10)
    # Of one turn alone it would be 8/10, 7/10 or 11/13; samples hold those and what lies between their medians.
    assert 7 / 10 <= share.low < share.value < share.high <= 11 / 13
    assert str(models.Share(0.29, -0.051, 0.5)) == "29 % (-5 to 50)"
    assert models.times_as_long(result) == pytest.approx(
        {"mkf": 1.2, "nn.Conv2d, weights frozen": 2.0, "without depthwise layers": 1.0}
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_is_not_given_back():
    program = """
import torch
from mkf.benchmarks.measure import keep_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

if not keep_memory():
    raise SystemExit(0)
x = torch.ones(1 << 24)  # 64 MiB, 16384 pages
before = resident()
del x
assert before - resident() < 1000
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_results_need_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.environment()["commit"] is None
