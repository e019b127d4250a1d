"""`mkf search` as it is typed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import mkf
from mkf.bank import FilterBank, Layer
from mkf.cli import app
from mkf.search import clusters, pca
from mkf.train import TrainConfig, train
from tests.search.conftest import one_thread  # noqa: F401
from tests.search.planted import matching, plant
from tests.train.conftest import colours, write_images  # noqa: F401

KEYS = mkf.keys.random(7, 4, seed=1)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def run(*words: object):
    return CliRunner().invoke(app, ["search", *(str(word) for word in words)], env={"COLUMNS": "200"})


def refused(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.fixture
def bank_dir(tmp_path: Path) -> Path:
    banks = []
    for seed, name in enumerate(["a", "b", "b-untrained"]):
        filters, _ = plant(KEYS, 200, seed=seed, shares=[0.25] * 4)
        if name == "b-untrained":
            filters = torch.randn_like(filters)
        banks.append(FilterBank.from_layers([Layer("l", filters)], name))
    FilterBank.concat(banks).save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "keys.safetensors"


def test_clusters_of_the_trained_models(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    result = run(bank_dir, "--keys", 4, "--out", out, "--figures", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    assert "Keys: 4, of 400 filters" in result.stdout
    found = mkf.KeySet.load(out)
    assert matching(found, KEYS).min() > 0.99
    bank = FilterBank.open(bank_dir).select(model=["a", "b"])
    assert found == clusters(bank, 4).keys
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["keys.png"]


def test_plain_methods_and_elimination(bank_dir: Path, out: Path) -> None:
    assert run(bank_dir, "--method", "pca", "--keys", 3, "--out", out).exit_code == 0
    assert mkf.KeySet.load(out) == pca(FilterBank.open(bank_dir).select(model=["a", "b"]), 3)
    assert run(bank_dir, "--method", "random", "--keys", 3, "--seed", 5, "--out", out).exit_code == 0
    assert mkf.KeySet.load(out) == mkf.keys.random(7, 3, seed=5)
    words = ("--objective", "residual", "--candidates", 12, "--keys", 3, "--out", out)
    result = run(bank_dir, "--method", "random", *words)
    assert result.exit_code == 0, result.output
    assert "elbow at" in result.stdout
    assert set(mkf.KeySet.load(out).names) < {f"random {i}" for i in range(1, 13)}


def test_autoencoder_in_two_rounds_resumed_from_its_folder(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    words = (
        bank_dir,
        "--method",
        "autoencoder",
        "--steps",
        150,
        "--keys",
        4,
        "--out",
        out,
        "--figures",
        tmp_path / "f",
        "--device",
        "cpu",
    )
    result = run(*words, "--state", tmp_path / "state")
    assert result.exit_code == 0, result.output
    assert ", the best of 150; code axis used evenly to" in result.stdout
    found = mkf.KeySet.load(out)
    assert len(found) == 4
    names = ["autoencoder.pt", "elimination.json", "first-round.json"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == names
    assert len(json.loads((tmp_path / "state" / "first-round.json").read_text())["names"]) == 50
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["code_axis.png", "elimination.png", "keys.png"]
    (tmp_path / "state" / "elimination.json").unlink()
    assert run(*words, "--state", tmp_path / "state").exit_code == 0
    assert mkf.KeySet.load(out) == found
    assert "belongs to another training (seed differ)" in refused(*words, "--state", tmp_path / "state", "--seed", 1)


@pytest.fixture
def trained(tmp_path: Path, colours: Path) -> Path:  # noqa: F811
    """A finished run."""
    kwargs = {"dim": 6, "depth": 2, "kernel_size": 7, "patch_size": 2}
    train(
        TrainConfig(model="ConvMixer", model_kwargs=kwargs, data=str(colours), out=str(tmp_path / "run"),
                    image_size=16, epochs=2, warmup_epochs=0, batch_size=12, device="cpu")
    )  # fmt: skip
    return tmp_path / "run"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_accuracy_and_output_of_a_trained_network(
    trained: Path,
    tmp_path: Path,
    out: Path,
    colours: Path,  # noqa: F811
    device: str,
) -> None:
    words = (trained / "model.safetensors", "--method", "random", "--candidates", 6, "--keys", 2, "--out", out)
    network = ("--model", trained, "--data", colours, "--device", device)
    for objective in ("accuracy", "output"):
        result = run(*words, "--objective", objective, *network, "--per-class", 4)
        assert result.exit_code == 0, result.output
        assert "images of the train split, loss by keys left: 6:" in result.stdout
        assert "train split" in mkf.KeySet.load(out).provenance
    assert "fewer than 50" in refused(*words, "--objective", "accuracy", *network, "--per-class", 50)
    assert "holds no finished run" in refused(
        *words, "--objective", "accuracy", "--model", tmp_path, "--data", colours, "--per-class", 4
    )


def test_the_network_is_judged_on_the_device(
    trained: Path,
    out: Path,
    colours: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(network: torch.nn.Module, *_: object, **__: object) -> None:
        raise ValueError(f"judged on {next(network.parameters()).device}")

    for objective, name in (("accuracy", "Accuracy"), ("output", "OutputError")):
        monkeypatch.setattr(mkf.search, name, judge)
        words = ("--objective", objective, "--model", trained, "--data", colours, "--per-class", 4, "--out", out)
        assert "judged on meta" in refused(trained / "model.safetensors", *words, "--device", "meta")


def test_comparison(bank_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(mkf.search.METHODS, "autoencoder")  # it takes a while and is tested on its own
    result = run(bank_dir, "--compare", "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert "| K = 8 | all held-out filters | a | b |" in result.stdout
    for method in ("clusters", "PCA", "random", "paper8", "analytic B"):
        assert f"| {method} |" in result.stdout
    assert "seeds [0]; held out together: a; b." in result.stdout


def test_errors_are_one_message(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    assert "--method magic: use one of clusters, autoencoder" in refused(bank_dir, "--method", "magic", "--out", out)
    assert "--objective beauty" in refused(bank_dir, "--objective", "beauty", "--out", out)
    assert "needs --model" in refused(bank_dir, "--objective", "accuracy", "--out", out)
    assert "name the key file" in refused(bank_dir)
    assert "there is no folder" in refused(bank_dir, "--out", tmp_path / "no" / "keys.safetensors")
    assert "ask for 1 to 256 keys" in refused(bank_dir, "--keys", 0, "--out", out)
    assert "no file or folder no/bank" in refused("no/bank", "--out", out)
    assert "--size 5: the sources hold no filters of 5x5" in refused(bank_dir, "--size", 5, "--out", out)
    FilterBank.from_layers([Layer("a", torch.randn(9, 3, 3)), Layer("b", torch.randn(9, 5, 5))], "m").save(
        tmp_path / "m"
    )
    assert "choose one with --size 5" in refused(tmp_path / "m", "--out", out)
    assert "20 keys need at least" in refused(tmp_path / "m", "--size", 3, "--keys", 20, "--out", out)
    assert "1 trained models" in refused(tmp_path / "m", "--size", 3, "--compare", "--keys", 2)
    assert not out.exists()
    filters = FilterBank.open(bank_dir).filters.clone()
    filters[0, 0, 0] = torch.nan
    FilterBank.from_layers([Layer("a", filters)], "m").save(tmp_path / "nan")
    result = run(tmp_path / "nan", "--keys", 2, "--out", out)
    assert result.exit_code == 0
    assert "note: left out 1 filters that hold NaN or Inf" in result.stderr


def test_what_cannot_be_written_is_refused_before_the_search(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "this is a folder; name a file" in refused(bank_dir, "--out", bank_dir)
    assert "call it keys.safetensors" in refused(bank_dir, "--out", "keys.txt")
    for option in ("--figures", "--state"):
        words = (bank_dir, "--objective", "residual", "--out", out, option)
        assert "this is a file; name a folder" in refused(*words, tmp_path / "file")
        assert "cannot be made" in refused(*words, tmp_path / "file" / "below")
        assert "is a bank, which holds nothing else" in refused(*words, bank_dir / "new")
    assert "is a bank, which holds nothing else" in refused(bank_dir, "--out", bank_dir / "keys.safetensors")
    if Path("/proc/self").is_dir():  # where nobody may make a file, not even root
        assert "the folder /proc cannot be written" in refused(bank_dir, "--out", "/proc/keys.safetensors")
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "file"]


def test_options_that_would_not_count_are_refused(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    assert "takes no --out" in refused(bank_dir, "--compare", "--out", out)
    message = refused(bank_dir, "--compare", "--steps", 1, "--seed", 5, "--method", "pca", "--per-class", 100)
    assert message.endswith("takes no --method, --per-class, --seed, --steps")
    assert "which was not asked for" in refused(bank_dir, "--model", tmp_path, "--data", tmp_path, "--out", out)
    message = refused(bank_dir, "--steps", 5, "--rounds", 1, "--out", out)
    assert message.endswith("--method clusters trains nothing and takes no --rounds, --steps")
    message = refused(bank_dir, "--objective", "residual", "--device", "cpu", "--out", out)
    assert message.endswith("only autoencoder and --model run on a device of choice: no --device")
    message = refused(bank_dir, "--method", "pca", "--candidates", 20, "--state", tmp_path / "state", "--out", out)
    assert message.endswith("--method pca without --objective eliminates nothing: no --candidates, --state")
    assert "look at images: no --per-class" in refused(bank_dir, "--per-class", 5, "--out", out)
    assert "only --compare takes --seeds" in refused(bank_dir, "--seeds", 5, "--out", out)
    for option in ("--steps", "--candidates", "--per-class"):
        assert run(bank_dir, option, 0, "--out", out).exit_code == 2
    assert run(bank_dir, "--seed", -1, "--out", out).exit_code == 2


def test_a_device_that_is_not_there(bank_dir: Path, out: Path) -> None:
    words = (bank_dir, "--method", "autoencoder", "--out", out)
    assert "device 'nonsense' cannot be used" in refused(*words, "--device", "nonsense")
    if not torch.cuda.is_available():
        assert "device 'cuda' cannot be used" in refused(*words, "--device", "cuda")


def test_sources_that_hold_nothing_to_search_or_the_same_twice(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    untrained = FilterBank.from_layers([Layer("l", torch.randn(9, 7, 7))], "b-untrained")
    untrained.save(tmp_path / "untrained")
    assert "no trained model" in refused(tmp_path / "untrained", "--out", out)
    FilterBank.open(bank_dir).select(model="a").save(tmp_path / "again")
    assert "both hold a model called 'a'" in refused(bank_dir, tmp_path / "again", "--out", out)


def test_a_source_is_not_written_over(tmp_path: Path) -> None:
    net, link = tmp_path / "net.safetensors", tmp_path / "link.safetensors"
    save_file({"0.weight": torch.randn(20, 1, 7, 7)}, net)
    link.symlink_to(net)
    before = net.read_bytes()
    for out in (net, link, tmp_path / "." / "net.safetensors"):
        assert "itself, which would be lost: choose another name" in refused(net, "--keys", 2, "--out", out)
    model = ("--objective", "output", "--model", tmp_path / "run", "--data", tmp_path)
    (tmp_path / "run").mkdir()
    net.rename(tmp_path / "run" / "model.safetensors")
    weights = tmp_path / "run" / "model.safetensors"
    assert "which would be lost" in refused("embedded", *model, "--keys", 2, "--out", weights)
    assert weights.read_bytes() == before


def test_too_many_keys_for_two_rounds_are_refused_before_the_training(bank_dir: Path, out: Path) -> None:
    words = (bank_dir, "--method", "autoencoder", "--device", "nonsense", "--out", out)
    assert "ask for 1 to 51 keys" in refused(*words, "--keys", 60, "--candidates", 60)
    assert "device 'nonsense'" in refused(*words, "--keys", 60, "--candidates", 60, "--rounds", 1)


@pytest.mark.parametrize(
    "words", [("--method", "autoencoder", "--rounds", 1, "--device", "nonsense"), ("--objective", "residual")]
)
def test_more_keys_than_candidates_are_refused_before_the_search(words: tuple[object, ...], out: Path) -> None:
    for keys in (60, 0):
        message = refused("no/bank", *words, "--keys", keys, "--out", out)  # before the sources are read
        assert f"--keys {keys}: there are 50 --candidates, so ask for 1 to 50 keys" in message
    assert "no file or folder" in refused("no/bank", *words, "--keys", 60, "--candidates", 60, "--out", out)


def test_names_are_no_markup(out: Path, tmp_path: Path) -> None:
    bank = FilterBank.from_layers([Layer("l", torch.randn(20, 7, 7))], "net[/x]")
    bank.save(tmp_path / "bank[/y]")
    (tmp_path / "[red]").mkdir()
    result = run(tmp_path / "bank[/y]", "--keys", 2, "--out", tmp_path / "[red]" / "keys.safetensors")
    assert result.exit_code == 0, result.output
    assert f"Written to {tmp_path}/[red]/keys.safetensors" in result.stdout
