"""Key files: what is written comes back, and what is damaged is named."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mkf.keys import KeySet, analytic, random

ROWS = "0 1 0\n0.5 -2e-1 0\n0 0 0\n"
TEXT = f"Filter 1:\n{ROWS}\nFilter edge b:\n{ROWS}"


@pytest.mark.parametrize("name", ["keys.safetensors", "keys", "keys.txt"])
def test_all_comes_back(tmp_path: Path, name: str) -> None:
    keys = KeySet(
        np.random.default_rng(0).standard_normal((256, 11, 11)) + 5,
        names=[f"key, {i} = é" for i in range(256)],
        kinds=["a kind"] * 256,
        provenance="line one\nline two",
        licence="CC-BY-4.0",
    )
    keys.save(tmp_path / name)
    assert KeySet.load(tmp_path / name) == keys
    assert KeySet.load(str(tmp_path / name)) == keys
    assert os.listdir(tmp_path) == [name]


def test_others_can_read_the_file(tmp_path: Path) -> None:
    keys = analytic("B")
    keys.save(tmp_path / "keys.safetensors")
    with safe_open(tmp_path / "keys.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("filters"), keys.filters)
        assert json.loads(file.metadata()["names"]) == list(keys.names)
        assert file.metadata()["format"] == "mkf.keys"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.safetensors"
    analytic("B").save(path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random().save(path)
    assert KeySet.load(path) == analytic("B")
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    analytic("B").save(path)
    whole = path.read_bytes()
    with path.open("rb") as reader:  # one who reads while it is replaced reads the old file to its end
        random().save(path)
        assert reader.read() == whole
    assert KeySet.load(path) == random()


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"keys.safetensors: there is no folder .*missing"):
        random().save(tmp_path / "missing" / "keys.safetensors")


def test_the_published_text(data_dir: Path) -> None:
    keys = KeySet.load(data_dir / "keys" / "paper8.txt")
    assert (len(keys), keys.kernel_size, keys.names) == (8, 7, tuple("12345678"))
    assert (keys.provenance, keys.licence, keys.kinds) == ("paper8.txt", "", ("",) * 8)
    assert float(keys.filters[0, 0, 0]) == pytest.approx(-0.010366, abs=1e-8)
    assert float(keys.filters[7, 6, 6]) == pytest.approx(-0.043075, abs=1e-7)


@pytest.mark.parametrize(
    "text", [TEXT, TEXT.replace("\n", "\r\n"), "\ufeff\n" + TEXT.replace("\n", "\n\n  "), TEXT.strip()]
)
def test_text_of_any_size_and_spacing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(text.encode())
    keys = KeySet.load(path)
    assert keys.names == ("1", "edge b")
    expected = np.array([[0, 1, 0], [0.5, -0.2, 0], [0, 0, 0]])
    expected /= np.linalg.norm(expected - expected.mean())
    np.testing.assert_allclose(keys.filters, [expected, expected], rtol=1e-7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys.txt: no keys in it"),
        ("\n\n", "keys.txt: no keys in it"),
        (ROWS, "keys.txt, line 1: expected 'Filter 1:' before the first row, found '0 1 0'"),
        ("<html>\n", "keys.txt, line 1: expected 'Filter 1:' before the first row, found '<html>'"),
        ("Filter 1:\n", "keys.txt, line 1: filter 1 is cut short, after 0 rows"),
        (TEXT + "Filter 3:\n0 1 0\n0 0 0\n", "keys.txt, line 10: filter 3 is cut short, after 2 rows"),
        (f"Filter 1:\nFilter 2:\n{ROWS}", "keys.txt, line 1: filter 1 is cut short, after 0 rows"),
        (f"Filter 1:\n0 1 0\n\nFilter 2:\n{ROWS}", "keys.txt, line 1: filter 1 is cut short, after 1 rows"),
        ("Filter 1:\n0 1 0\n0 1\n", "keys.txt, line 3: 2 numbers, where the rows before have 3"),
        (TEXT + "0 1 0\n", "keys.txt, line 10: row 4 of filter edge b, which should have 3"),
        (TEXT.replace("-2e-1", "-2e-"), "keys.txt, line 3: '-2e-' is not a finite number"),
        (TEXT.replace("-2e-1", "nan"), "keys.txt, line 3: 'nan' is not a finite number"),
        (TEXT + f"Filter 1:\n{ROWS}", "keys.txt, line 10: a second 'Filter 1:', the first is in line 1"),
        ("Filter 1:\n1 2\n3 4\n", "keys.txt: keys of 2x2: the kernel size must be"),
        ("Filter 1:\n0 0 0\n0 0 0\n0 0 0\n", "keys.txt: key 1 is constant"),
        ("\n".join(f"Filter {i}:\n{ROWS}" for i in range(257)), "keys.txt: a key set holds 1 to 256 keys, got 257"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        KeySet.load(path)


@pytest.mark.parametrize("part", [0, 4, 8, 100, -1])
def test_truncated_safetensors(tmp_path: Path, part: int) -> None:
    path = tmp_path / "keys.safetensors"
    random().save(path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(ValueError, match=r"keys.safetensors: damaged or truncated safetensors file"):
        KeySet.load(path)


def test_another_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.pt"
    path.write_bytes(pickle.dumps({"filters": np.zeros((8, 7, 7))}))
    with pytest.raises(ValueError, match=r"keys.pt: neither a safetensors file nor a text of keys"):
        KeySet.load(path)


METADATA = {"format": "mkf.keys", "version": "1", "names": '["a"]', "kinds": '[""]', "provenance": "", "licence": ""}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no KeySet wrote; make keys of one of its tensors with KeySet"),
        (METADATA | {"version": "2"}, "version 2 of the key format; this mkf reads 1"),
        (METADATA | {"names": "["}, "damaged metadata"),
        (METADATA | {"names": '["a", "b"]'}, "names must hold one string for each of the 1 keys, got 2"),
        (METADATA | {"names": "7"}, "names must be a list of strings, got 7"),
        ({key: METADATA[key] for key in METADATA if key != "kinds"}, "damaged metadata .'kinds'"),
    ],
)
def test_bad_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "keys.safetensors"
    save_file({"filters": random(7, 1).filters}, path, metadata)
    with pytest.raises(ValueError, match=f"keys.safetensors: .*{message}"):
        KeySet.load(path)


@pytest.mark.parametrize("tensor", [torch.ones(1, 7, 7), torch.full((1, 7, 7), torch.nan), torch.rand(1, 49)])
def test_bad_filters_in_a_file(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "keys.safetensors"
    save_file({"filters": tensor}, path, METADATA)
    with pytest.raises(ValueError, match=r"keys.safetensors: key"):
        KeySet.load(path)


def test_a_file_without_filters(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    save_file({"weights": torch.rand(1, 7, 7)}, path, METADATA)
    with pytest.raises(ValueError, match=r"keys.safetensors: damaged .*filters"):
        KeySet.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.txt"):
        KeySet.load(tmp_path / "nothing.txt")
