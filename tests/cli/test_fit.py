"""`mkf fit` as it is typed."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from typer.testing import CliRunner

from mkf.bank import FilterBank, Layer
from mkf.cli import fit
from mkf.keys import KeySet, paper8
from mkf.ops import affine_fit

APP = typer.Typer()
APP.command("fit")(fit.command)


def run(*words: object):
    return CliRunner().invoke(APP, [str(word) for word in words], env={"COLUMNS": "200"})


def refused(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "fit.parquet"


@pytest.fixture
def bank_dir(tmp_path: Path) -> Path:
    filters = torch.randn(60, 7, 7, generator=torch.Generator().manual_seed(0))
    filters[7] = 0
    filters[8, 1, 1] = torch.nan
    FilterBank.from_layers([Layer("a", filters), Layer("b", torch.randn(4, 5, 5))], "m").save(tmp_path / "bank")
    return tmp_path / "bank"


def test_names_of_keys_are_printed_as_they_are(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    KeySet(torch.eye(7)[None], names=["a [b] c"]).save(tmp_path / "keys.safetensors")
    result = run(bank_dir, "--out", out, "--keys", tmp_path / "keys.safetensors")
    assert result.exit_code == 0, result.output
    assert " a [b] c " in result.stdout


def test_a_bank(bank_dir: Path, out: Path) -> None:
    result = run(bank_dir, "--out", out)
    assert result.exit_code == 0, result.output
    assert "left out 4 of 5x5" in result.stderr
    assert "60 filters 7x7 (1 constant and 1 not finite, counted apart)" in result.stdout
    assert "filters/s" in result.stdout
    assert "GB/s" in result.stdout
    assert "difference of Gaussians" in result.stdout
    expected = affine_fit(FilterBank.open(bank_dir).select(k=7), paper8())
    assert np.array_equal(pq.read_table(out)["index"].to_numpy(), expected.index.numpy())


def test_an_array_and_options(tmp_path: Path, out: Path) -> None:
    array = np.random.default_rng(0).standard_normal((50, 7, 7))
    np.save(tmp_path / "filters.npy", array)
    result = run(
        tmp_path / "filters.npy", "--out", out, "--keys", "analytic:B", "--topk", 2, "--sign", "positive",
        "--backend", "reference", "--memory", "1.5 GiB",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pq.read_table(out)
    assert table.num_rows == 50
    assert table["index"].type.list_size == 2
    recorded = json.loads(table.schema.metadata[b"mkf.fit"])
    assert (recorded["topk"], recorded["sign"]) == (2, "positive")
    assert "method B" in recorded["keys"]["provenance"]


@pytest.mark.parametrize(("words", "count"), [((), 8), (("--topk", 3), 3)])
def test_combinations(bank_dir: Path, out: Path, words: tuple[object, ...], count: int) -> None:
    result = run(bank_dir, "--out", out, "--method", "combination", *words)
    assert result.exit_code == 0, result.output
    expected = affine_fit(FilterBank.open(bank_dir).select(k=7), paper8(), method="combination", topk=count)
    mean = expected.residual[expected.residual > 0].mean()
    assert f"combinations of {count} keys: residual {mean:.3f}, std" in result.stdout
    assert "60 filters 7x7 (1 constant and 1 not finite, counted apart)" in result.stdout
    table = pq.read_table(out)
    assert table["scale"].type.list_size == count
    np.testing.assert_allclose(table["residual"].to_numpy(), expected.residual.numpy(), rtol=1e-6)


def test_a_checkpoint(data_dir: Path, out: Path) -> None:
    result = run(data_dir / "filters" / "team38_rfdnext.pth", "--out", out)
    assert result.exit_code == 0, result.output
    assert pq.read_metadata(out).num_rows == 200


@pytest.mark.parametrize("inside", ["kernel_size=7/model=m/part-00000.parquet", "fit.parquet", "new/fit.parquet"])
def test_a_bank_is_not_written_into(bank_dir: Path, inside: str) -> None:
    before = {path: path.is_file() and path.read_bytes() for path in bank_dir.rglob("*")}
    assert f"{bank_dir} is a bank, which holds nothing else" in refused(bank_dir, "--out", bank_dir / inside)
    assert {path: path.is_file() and path.read_bytes() for path in bank_dir.rglob("*")} == before


def test_the_place_is_tried_before_anything_is_fitted(
    bank_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkf.bank.load", None)
    (tmp_path / "file").touch()
    assert "this is a file; name a folder" in refused(bank_dir, "--out", tmp_path / "file" / "fit.parquet")


def test_errors_are_one_message(bank_dir: Path, out: Path, tmp_path: Path) -> None:
    assert "error: there is no file nothing.npy" in refused("nothing.npy", "--out", out)
    assert "no file or folder no/bank" in refused("no/bank", "--out", out)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    assert "broken.npy is no complete array" in refused(tmp_path / "broken.npy", "--out", out)
    np.save(tmp_path / "cut.npy", np.ones((50, 7, 7)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    assert "cut.npy is no complete array" in refused(tmp_path / "cut.npy", "--out", out)
    np.save(tmp_path / "flat.npy", np.ones(50))
    assert "filters have shape (50,)" in refused(tmp_path / "flat.npy", "--out", out)
    assert "no keys called 'paper9'" in refused(bank_dir, "--out", out, "--keys", "paper9")
    assert "sign='negative'" in refused(bank_dir, "--out", out, "--sign", "negative")
    assert "method='all'" in refused(bank_dir, "--out", out, "--method", "all")
    assert "sign='positive' is for single keys" in refused(
        bank_dir, "--out", out, "--method", "combination", "--sign", "positive"
    )
    assert "topk=9" in refused(bank_dir, "--out", out, "--topk", 9)
    assert "abacus" in refused(bank_dir, "--out", out, "--backend", "abacus")
    assert "--memory plenty" in refused(bank_dir, "--out", out, "--memory", "plenty")
    assert "memory=1000" in refused(bank_dir, "--out", out, "--memory", "1kB")
    assert "is a folder" in refused(bank_dir, "--out", tmp_path)
    assert "so call it fit.parquet" in refused(bank_dir, "--out", "fit.csv")
    assert not out.exists()
    FilterBank.open(bank_dir).select(k=5).save(tmp_path / "five")
    assert "keys are 7x7 but" in refused(tmp_path / "five", "--out", out)


@pytest.mark.parametrize(
    ("text", "expected"), [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1048576", 1 << 20), ("1.5 kB", 1500)]
)
def test_bytes(text: str, expected: int) -> None:
    assert fit._bytes(text) == expected
