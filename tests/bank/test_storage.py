"""Banks on disk: what is written, what is read, and what survives."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mkf.bank import FilterBank, Layer, storage

README = Path(__file__).parents[2] / "README.md"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def one_layer(model: str = "m", value: float = 1.0) -> FilterBank:
    return FilterBank.from_layers([Layer("conv", torch.full((4, 3, 3), value))], model)


def assert_same(bank: FilterBank, other: FilterBank) -> None:
    assert bank.metadata.equals(other.metadata)
    assert bank.kernel_sizes == other.kernel_sizes
    for k in bank.kernel_sizes:
        # Compared as integers, so that every NaN and the sign of zero count.
        mine, theirs = bank.select(k=k).filters, other.select(k=k).filters
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


def test_opening_gives_back_what_was_saved(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "sub" / "bank")
    assert_same(FilterBank.open(tmp_path / "sub" / "bank"), small_bank)
    assert os.listdir(tmp_path / "sub") == ["bank"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=TEXT, layer=TEXT, source=TEXT, licence=TEXT, other=TEXT)
def test_any_text_survives(tmp_path: Path, model: str, layer: str, source: str, licence: str, other: str) -> None:
    bank = FilterBank.concat(
        [
            FilterBank.from_layers([Layer(layer, torch.ones(2, 3, 3))], model, source, licence),
            one_layer(other, 2.0),
            one_layer(model, 3.0),
        ]
    )
    bank.save(tmp_path / "bank")
    opened = FilterBank.open(tmp_path / "bank")
    assert_same(opened, bank)
    assert_same(opened.select(model=model), bank.select(model=model))


def test_non_finite_filters_survive(tmp_path: Path) -> None:
    filters = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).view(4, 1, 1).expand(4, 3, 3)
    bank = FilterBank.from_layers([Layer("conv", filters)], "m")
    bank.save(tmp_path / "bank")
    assert_same(FilterBank.open(tmp_path / "bank"), bank)


def test_models_that_alternate_keep_their_order(tmp_path: Path) -> None:
    bank = FilterBank.concat([one_layer("b", 0.0), one_layer("a", 1.0), one_layer("b", 2.0)])
    bank.save(tmp_path / "bank")
    assert_same(FilterBank.open(tmp_path / "bank"), bank)


def test_parts_larger_than_a_row_group_and_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ROW_GROUP", 64)
    layers = [Layer(str(i), torch.randn(30, 3, 3)) for i in range(9)]
    bank = FilterBank.concat([FilterBank.from_layers(layers, "large"), one_layer("small")])
    FilterBank.concat(bank.batches(7)).save(tmp_path / "bank")
    assert_same(FilterBank.open(tmp_path / "bank"), bank)
    rows = [pa.parquet.ParquetFile(file).metadata for file in files(tmp_path)]
    assert [[part.row_group(i).num_rows for i in range(part.num_row_groups)] for part in rows] == [[64] * 4 + [14], [4]]


def test_banks_of_numbers_that_may_be_null_are_read_as_well(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "bank")
    manifest = json.loads((tmp_path / "bank" / storage.MANIFEST).read_text())
    for part in manifest["parts"]:  # as mkf first wrote them
        file = tmp_path / "bank" / part["path"]
        table = pa.parquet.read_table(file, partitioning=None)
        nullable = pa.list_(pa.float32(), part["kernel_size"] ** 2)
        fields = [field.with_type(nullable) if field.name == "filter" else field for field in table.schema]
        pa.parquet.write_table(table.cast(pa.schema(fields)), file)
        part["bytes"] = file.stat().st_size
    (tmp_path / "bank" / storage.MANIFEST).write_text(json.dumps(manifest))
    opened = FilterBank.open(tmp_path / "bank")
    assert_same(opened, small_bank)
    FilterBank.concat([opened, small_bank]).save(tmp_path / "both")
    assert_same(FilterBank.open(tmp_path / "both"), FilterBank.concat([small_bank, small_bank]))
    assert_same(
        FilterBank.concat(FilterBank.concat([opened, small_bank]).batches(100)), FilterBank.open(tmp_path / "both")
    )


def test_an_empty_bank_can_be_saved(tmp_path: Path) -> None:
    FilterBank.concat([]).save(tmp_path / "bank")
    assert len(FilterBank.open(tmp_path / "bank")) == 0


def test_plain_arrow_reads_a_kernel_size_as_a_data_set(small_bank: FilterBank, tmp_path: Path) -> None:
    odd = FilterBank.from_layers([Layer("conv", torch.ones(2, 7, 7))], "owner/name = 50%")
    FilterBank.concat([small_bank, odd]).save(tmp_path / "bank")
    for partitioning in ("hive", None):
        data = pa.dataset.dataset(tmp_path / "bank" / "kernel_size=7", partitioning=partitioning)
        assert data.count_rows() == 16
        assert data.schema.field("filter").type == pa.list_(pa.field("item", pa.float32(), nullable=False), 49)
        assert data.count_rows(filter=pa.dataset.field("model") == "owner/name = 50%") == 2
        zeta = data.to_table(filter=pa.dataset.field("model") == "zeta")
        flat = zeta["filter"].combine_chunks().flatten().to_numpy()
        assert (flat == small_bank.select(k=7, model="zeta").filters.flatten().numpy()).all()
    assert pa.dataset.dataset(tmp_path / "bank", partitioning="hive").schema.names[0] == "filter"


@pytest.mark.parametrize(
    ("line", "filters"),
    [
        ('pyarrow.dataset.dataset("bank")', lambda data: data.to_table()["filter"].to_pylist()),
        ('polars.scan_parquet("bank/**/*.parquet")', lambda frame: frame.collect()["filter"].to_list()),
        ("duckdb.sql(\"FROM 'bank/**/*.parquet'\")", lambda found: [list(row[0]) for row in found.fetchall()]),
    ],
)
def test_other_tools_read_a_bank_by_the_lines_that_are_shown(
    small_bank: FilterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, filters: Callable[[Any], Any]
) -> None:
    assert line in str(FilterBank.save.__doc__)
    assert line in README.read_text()
    name = line.split(".")[0]
    tool = pytest.importorskip(name)
    bank = small_bank.select(k=7)
    bank.save(tmp_path / "bank")
    monkeypatch.chdir(tmp_path)
    assert sorted(filters(eval(line, {name: tool}))) == sorted(bank.filters.flatten(1).tolist())


def test_opening_and_counting_read_no_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ROW_GROUP", 1024)
    FilterBank.from_layers([Layer("conv", torch.randn(100_000, 7, 7))], "m").save(tmp_path / "bank")
    size = 100_000 * 49 * 4
    before = pa.total_allocated_bytes()
    bank = FilterBank.open(tmp_path / "bank").select(model="m", k=7)
    assert len(bank) == 100_000
    assert pa.total_allocated_bytes() - before < size / 100
    peak = max(pa.total_allocated_bytes() - before for _ in bank.batches(100))
    assert peak < size / 4


def test_a_selection_reads_only_its_own_files(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "bank")
    bank = FilterBank.open(tmp_path / "bank")
    for file in files(tmp_path):
        if "model=alpha" not in str(file):
            file.unlink()
    assert bank.select(k=7, model="alpha").filters.shape == (3, 7, 7)
    with pytest.raises(OSError, match="is damaged, or was replaced after it was opened"):
        _ = bank.select(k=7).filters


def test_saving_replaces_a_bank_even_one_it_reads_from(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "bank")
    FilterBank.concat([FilterBank.open(tmp_path / "bank"), one_layer()]).save(tmp_path / "bank")
    assert_same(FilterBank.open(tmp_path / "bank"), FilterBank.concat([small_bank, one_layer()]))
    assert os.listdir(tmp_path) == ["bank"]


@pytest.mark.parametrize("rows", [10, 2000])
@pytest.mark.parametrize("row_group", [64, 32_768])
def test_a_bank_replaced_after_it_was_counted_is_an_error(
    tmp_path: Path, rows: int, row_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ROW_GROUP", row_group)

    def layer(rows: int) -> FilterBank:
        return FilterBank.from_layers([Layer("conv", torch.ones(rows, 7, 7))], "m")

    layer(1000).save(tmp_path / "bank")
    bank = FilterBank.open(tmp_path / "bank")
    assert len(bank) == 1000
    monkeypatch.setattr(storage, "ROW_GROUP", 32_768)
    layer(rows).save(tmp_path / "bank")
    for read in (lambda: bank.filters, lambda: list(bank.batches(7))):
        with pytest.raises(OSError, match=r"bank .*bank is damaged, or was replaced after it was opened"):
            read()


class Killed(BaseException):
    """Stands for whatever ends a save."""


@pytest.mark.parametrize("function", ["_write_part", "_write_manifest", "_synchronise", "_replace"])
def test_a_save_that_fails_leaves_the_old_bank(
    small_bank: FilterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    small_bank.save(tmp_path / "bank")

    def fail(*args: object) -> Iterator[None]:
        raise Killed

    monkeypatch.setattr(storage, function, fail)
    with pytest.raises(Killed):
        one_layer().save(tmp_path / "bank")
    monkeypatch.undo()
    assert_same(FilterBank.open(tmp_path / "bank"), small_bank)
    assert os.listdir(tmp_path) == ["bank"]


def test_a_failed_rename_puts_the_old_bank_back(
    small_bank: FilterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bank.save(tmp_path / "bank")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if ".saving-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match=r"cannot write the bank .*Input/output error"):
        one_layer().save(tmp_path / "bank")
    assert os.listdir(tmp_path) == ["bank"]
    assert_same(FilterBank.open(tmp_path / "bank"), small_bank)


@pytest.mark.parametrize("then", ["open", "save"])
def test_a_process_killed_between_the_renames_loses_nothing(
    small_bank: FilterBank, tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bank.save(tmp_path / "bank")
    (tmp_path / "bank").rename(tmp_path / ".bank.previous")  # what is left then
    if then == "save":
        monkeypatch.setattr(storage, "_write_part", None)
        with pytest.raises(TypeError):
            one_layer().save(tmp_path / "bank")
    assert_same(FilterBank.open(tmp_path / "bank"), small_bank)


def test_a_killed_save_into_a_new_folder_is_no_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_write_manifest", lambda *args: os.listdir(1 / 0))
    with pytest.raises(ZeroDivisionError):
        one_layer().save(tmp_path / "bank")
    assert os.listdir(tmp_path) == []


def test_saving_refuses_what_is_not_a_bank(small_bank: FilterBank, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other files and no bank"):
        small_bank.save(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        small_bank.save(tmp_path / "thesis.tex")
    with pytest.raises(OSError, match="cannot write the bank"):
        small_bank.save(tmp_path / "thesis.tex" / "bank")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    small_bank.save(tmp_path / "empty")
    assert len(FilterBank.open(tmp_path / "empty")) == 18


@pytest.mark.parametrize("stranger", ["fit.parquet", "kernel_size=7/notes.txt", "kernel_size=7/model=m/sub/x"])
def test_saving_refuses_a_bank_with_other_files(small_bank: FilterBank, tmp_path: Path, stranger: str) -> None:
    bank = tmp_path / "bank"
    small_bank.save(bank)
    (bank / stranger).parent.mkdir(parents=True, exist_ok=True)
    (bank / stranger).write_text("precious")
    named = stranger.removesuffix("/x")  # of a folder, the folder
    with pytest.raises(FileExistsError, match=f"is a bank, but holds {named} too, which replacing it would delete"):
        one_layer().save(bank)
    assert (bank / stranger).read_text() == "precious"
    assert_same(FilterBank.open(bank), small_bank)
    (bank / "z").mkdir()
    with pytest.raises(FileExistsError, match=f"holds {named} and 1 more too"):
        one_layer().save(bank)


def test_an_unwritable_folder_is_named(small_bank: FilterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so the mode of a folder is no test
    with pytest.raises(OSError, match=r"cannot write the bank .*bank: Permission denied"):
        small_bank.save(tmp_path / "bank")


def test_a_model_name_that_no_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model's name is too long"):
        one_layer("x" * 300).save(tmp_path / "bank")
    assert os.listdir(tmp_path) == []


def test_opening_says_what_is_wrong(small_bank: FilterBank, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no bank at"):
        FilterBank.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, not a bank"):
        FilterBank.open(tmp_path / "file")
    with pytest.raises(ValueError, match=r"not a complete bank: it has no _bank\.json, which is written last$"):
        FilterBank.open(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors is a checkpoint$"):
        FilterBank.open(tmp_path / "run")

    bank = tmp_path / "bank"
    small_bank.save(bank)
    manifest = bank / "_bank.json"
    text = manifest.read_text()
    for damaged in (text[:-30], "[]", "{}", '{"format": "other"}', text.replace('"bytes"', '"size"')):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match="damaged or not a bank's"):
            FilterBank.open(bank)
    manifest.write_text(json.dumps({**json.loads(text), "version": 2}))
    with pytest.raises(ValueError, match="has bank format 2, this mkf reads 1"):
        FilterBank.open(bank)


def test_a_part_that_is_cut_or_missing_is_named_at_opening(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "bank")
    part = files(tmp_path)[0]
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{part.name} has {len(content) - 100} of {len(content)} bytes"):
        FilterBank.open(tmp_path / "bank")
    part.unlink()
    with pytest.raises(ValueError, match=f"{part.name} is missing"):
        FilterBank.open(tmp_path / "bank")


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    one_layer().save(tmp_path / "bank")
    part = files(tmp_path)[0]
    content = bytearray(part.read_bytes())
    content[60] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match="is damaged"):
        _ = FilterBank.open(tmp_path / "bank").filters


def test_the_embedded_bank_is_missed_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mkf.bank.filter_bank.EMBEDDED", tmp_path)
    with pytest.raises(FileNotFoundError, match="no embedded bank"):
        FilterBank.embedded()
    one_layer().save(tmp_path)
    assert len(FilterBank.embedded()) == 4
