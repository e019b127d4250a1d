"""The bank as an object: rows, selections, batches."""

import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch

from mkf.bank import FilterBank, Layer


def test_metadata_has_the_fixed_columns(small_bank: FilterBank) -> None:
    metadata = small_bank.metadata
    assert metadata.schema.names == [
        *("model", "layer", "depth", "normalised_depth", "channel", "kernel_size", "stride", "source", "licence")
    ]
    types = [pa.string(), pa.string(), pa.int32(), pa.float32(), pa.int32(), pa.int32(), pa.int32(), pa.string()]
    assert metadata.schema.types == [*types, pa.string()]
    assert metadata.num_rows == len(small_bank) == 18


def test_rows_are_ordered_by_kernel_size_then_as_put_in(small_bank: FilterBank) -> None:
    rows = small_bank.metadata.to_pylist()
    assert [(row["kernel_size"], row["model"], row["layer"]) for row in rows] == (
        [(5, "zeta", "a.conv")] * 4
        + [(7, "zeta", "b.conv")] * 6
        + [(7, "zeta", "c.conv")] * 5
        + [(7, "alpha", "x")] * 3
    )
    assert [row["channel"] for row in rows] == [*range(4), *range(6), *range(5), *range(3)]
    assert [row["depth"] for row in rows] == [1] * 4 + [0] * 6 + [2] * 5 + [0] * 3
    assert [row["normalised_depth"] for row in rows] == [0.5] * 4 + [0.0] * 6 + [1.0] * 5 + [0.0] * 3
    assert [row["stride"] for row in rows] == [1] * 4 + [2] * 6 + [None] * 5 + [1] * 3
    assert rows[0]["source"] == "made here"
    assert rows[0]["licence"] == "CC0-1.0"


def test_models_kernel_sizes_and_layers(small_bank: FilterBank) -> None:
    assert small_bank.models == ("zeta", "alpha")
    assert small_bank.kernel_sizes == (5, 7)
    layers = small_bank.layers().to_pylist()
    assert [(row["model"], row["layer"], row["filters"]) for row in layers] == [
        *(("zeta", "a.conv", 4), ("zeta", "b.conv", 6), ("zeta", "c.conv", 5), ("alpha", "x", 3))
    ]
    assert repr(small_bank) == "FilterBank(18 filters, 5x5, 7x7)"


def test_filters_of_mixed_sizes_ask_for_select(small_bank: FilterBank) -> None:
    with pytest.raises(ValueError, match=r"mixes kernel sizes \(5x5, 7x7\).*select\(k=7\)"):
        _ = small_bank.filters


@pytest.mark.parametrize("saved", [False, True])
def test_select(small_bank: FilterBank, saved: bool, tmp_path) -> None:
    if saved:
        small_bank.save(tmp_path / "bank")
        small_bank = FilterBank.open(tmp_path / "bank")
    assert len(small_bank.select(k=5)) == 4
    assert len(small_bank.select(stride=1)) == 7
    assert len(small_bank.select(stride=1, k=7)) == 3
    assert len(small_bank.select(model="zeta").select(layer=["b.conv", "c.conv"])) == 11
    assert small_bank.select(model=["alpha", "nobody"]).models == ("alpha",)
    assert small_bank.select(model="alpha").kernel_sizes == (7,)
    chosen = small_bank.select(model="zeta", k=7)
    assert chosen.filters.shape == (11, 7, 7)
    assert torch.equal(chosen.filters, small_bank.select(k=7).filters[:11])
    assert chosen.metadata["channel"].to_pylist() == [*range(6), *range(5)]


def test_an_empty_selection_has_the_size_it_was_selected_by(small_bank: FilterBank) -> None:
    assert small_bank.select(k=9).filters.shape == (0, 9, 9)
    nothing = small_bank.select(k=7, model="nobody")
    assert nothing.filters.shape == (0, 7, 7)
    assert (len(nothing), nothing.models, nothing.kernel_sizes) == (0, (), ())
    assert nothing.metadata.num_rows == nothing.layers().num_rows == 0
    assert list(nothing.batches(4)) == []


def test_an_empty_bank_of_no_size_has_no_filters() -> None:
    empty = FilterBank.concat([])
    assert len(empty) == 0
    with pytest.raises(ValueError, match="bank is empty"):
        _ = empty.filters


def test_filters_come_without_a_copy_or_a_warning() -> None:
    filters = torch.randn(50, 7, 7)
    bank = FilterBank.from_layers([Layer("a", filters)], "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = bank.filters, bank.filters
        part = next(bank.batches(20)).filters
    assert torch.equal(first, filters)
    assert first.data_ptr() == second.data_ptr() == part.data_ptr()


def test_a_bank_does_not_follow_the_tensor_it_was_made_from() -> None:
    filters = torch.ones(4, 3, 3)
    bank = FilterBank.from_layers([Layer("a", filters)], "m")
    filters.zero_()
    assert bank.filters.sum() == 36


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
def test_batches_are_full_in_order_and_of_one_size(small_bank: FilterBank, rows: int, saved: bool, tmp_path) -> None:
    if saved:
        small_bank.save(tmp_path / "bank")
        small_bank = FilterBank.open(tmp_path / "bank")
    batches = list(small_bank.batches(rows))
    expected = [min(rows, n - start) for n in (4, 14) for start in range(0, n, rows)]
    assert [len(batch) for batch in batches] == expected
    assert all(len(batch.kernel_sizes) == 1 for batch in batches)
    joined = FilterBank.concat(batches)
    assert joined.metadata.equals(small_bank.metadata)
    assert torch.equal(joined.select(k=7).filters, small_bank.select(k=7).filters)


@pytest.mark.parametrize("saved", [False, True])
def test_batches_of_some_columns(small_bank: FilterBank, saved: bool, tmp_path) -> None:
    if saved:
        small_bank.save(tmp_path / "bank")
        small_bank = FilterBank.open(tmp_path / "bank")
    for bank in (small_bank, small_bank.select(model="zeta", stride=1)):
        parts = list(bank.batches(5, metadata=("layer", "model")))
        assert FilterBank.concat(parts).metadata.equals(bank.metadata.select(["model", "layer"]))
        bare = FilterBank.concat(bank.batches(5, metadata=()))
        assert torch.equal(bare.select(k=7).filters, bank.select(k=7).filters)
        assert bare.metadata.column_names == []


def test_batches_refuse_no_rows_and_unknown_columns(small_bank: FilterBank) -> None:
    with pytest.raises(ValueError, match="rows must be positive, got 0"):
        next(small_bank.batches(0))
    with pytest.raises(ValueError, match="the bank has no column colour; it has model, layer"):
        next(small_bank.batches(4, metadata=("colour", "model")))


def test_concat_of_something_else(small_bank: FilterBank) -> None:
    with pytest.raises(TypeError, match="concat takes banks, not Tensor"):
        FilterBank.concat([small_bank, small_bank.select(k=7).filters])


def test_concat_of_memory_and_disk(small_bank: FilterBank, tmp_path) -> None:
    small_bank.save(tmp_path / "bank")
    both = FilterBank.concat([small_bank, FilterBank.open(tmp_path / "bank")])
    assert len(both) == 36
    seven = small_bank.select(k=7).filters
    assert torch.equal(both.select(k=7).filters, torch.cat([seven, seven]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_become_float32(dtype: torch.dtype) -> None:
    filters = torch.randn(6, 1, 5, 5).to(dtype)
    bank = FilterBank.from_layers([Layer("a", filters)], "m")
    assert bank.filters.dtype == torch.float32
    np.testing.assert_array_equal(bank.filters.numpy(), filters[:, 0].to(torch.float32).numpy())


def test_what_is_not_finite_and_the_largest_float32_are_kept() -> None:
    filters = torch.tensor([torch.nan, torch.inf, torch.finfo(torch.float32).max]).double().expand(2, 3, 3)
    bank = FilterBank.from_layers([Layer("a", filters)], "m")
    np.testing.assert_array_equal(bank.filters.numpy(), filters.float().numpy())


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (torch.zeros(4, 2, 3, 3), r"expected filters .* got \(4, 2, 3, 3\)"),
        (torch.zeros(4, 3, 5), r"got \(4, 3, 5\)"),
        (torch.zeros(4, 4, 4), r"k one of 3, 5, 7, 9, 11"),
        (torch.zeros(4, 13, 13), r"k one of 3, 5, 7, 9, 11"),
        (torch.zeros(9), r"got \(9,\)"),
        (torch.zeros(4, 3, 3, dtype=torch.int8), "floating-point"),
        (torch.zeros(4, 3, 3, dtype=torch.complex64), "floating-point"),
        (torch.zeros(4, 3, 3, device="meta"), "meta device"),
        (
            torch.tensor([1.0, torch.inf, -1e300], dtype=torch.float64).expand(2, 3, 3),
            r"values up to 1e\+300, .* range of float32",
        ),
    ],
)
def test_layers_that_are_no_filters_are_refused(filters: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer 'conv1': .*{message}"):
        FilterBank.from_layers([Layer("conv1", filters)], "m")
