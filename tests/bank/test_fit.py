"""Fits of banks and arrays to a file: what is in it, and what survives a run that does not end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mkf.bank import FilterBank, Layer, fit
from mkf.bank.fit import write_fit
from mkf.keys import paper8
from mkf.ops import AffineFit, affine_fit, stream
from mkf.ops.fit_statistics import FitTally, fit_statistics

KEYS = paper8()


def noise(count: int) -> torch.Tensor:
    filters = torch.randn(count, 7, 7, generator=torch.Generator().manual_seed(0))
    filters[3] = 1.0
    filters[4, 0, 0] = torch.nan
    return filters


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "fits" / "fit.parquet"


def assert_fit(table: pa.Table, filters: torch.Tensor, **options: object) -> None:
    """The table holds the fit, bit for bit; a combination's last digit may depend on how the filters are cut."""
    for name, expected in affine_fit(filters, KEYS, **options)._asdict().items():
        column = table[name].combine_chunks()
        if expected.ndim == 2:
            assert column.type.list_size == expected.shape[1]
            column = column.flatten()
        values = column.to_numpy().reshape(expected.shape)
        assert values.dtype == expected.numpy().dtype
        tolerance = 1e-6 if "method" in options else 0
        np.testing.assert_allclose(values, expected.numpy(), rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_a_bank_on_disk(tmp_path: Path, out: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS_READ", rows)
    monkeypatch.setattr(fit, "ROW_GROUP", 256)
    first = [Layer("b", noise(300), 2), Layer("a", noise(17))]
    bank = FilterBank.concat(
        [FilterBank.from_layers(first, "zeta"), FilterBank.from_layers([Layer("x", noise(40))], "alpha")]
    )
    bank.save(tmp_path / "bank")
    seen: list[tuple[int, int]] = []
    statistics = write_fit(
        FilterBank.open(tmp_path / "bank"), KEYS, out, progress=lambda done, total: seen.append((done, total))
    )
    table = pq.read_table(out)
    assert table.column_names == ["index", "scale", "shift", "residual", "model", "layer", "channel"]
    assert table.select(fit.COLUMNS).cast(bank.metadata.select(fit.COLUMNS).schema) == bank.metadata.select(fit.COLUMNS)
    assert_fit(table, bank.filters)
    assert pq.read_metadata(out).num_row_groups == 2
    assert seen[-1] == (357, 357)
    assert len(seen) == -(-357 // rows)
    whole = fit_statistics(bank, KEYS)
    assert (statistics.histogram == whole.histogram).all()
    assert (statistics.dead.item(), statistics.not_finite.item()) == (3, 3)
    assert os.listdir(out.parent) == ["fit.parquet"]


def test_it_can_be_joined_with_its_bank(small_bank: FilterBank, out: Path) -> None:
    bank = small_bank.select(k=7)
    write_fit(bank, KEYS, out)
    joined = pq.read_table(out).join(bank.metadata, ["model", "layer", "channel"])
    assert joined.num_rows == len(bank)
    assert joined["stride"].null_count == 5


@pytest.mark.parametrize("kind", ["tensor", "array", "mapped", "flat"])
def test_arrays(tmp_path: Path, out: Path, kind: str) -> None:
    filters = noise(50)
    np.save(tmp_path / "filters.npy", filters.numpy())
    sources = {
        "tensor": filters,
        "array": filters.numpy(),
        "mapped": np.load(tmp_path / "filters.npy", mmap_mode="r"),
        "flat": filters.flatten(1),
    }
    write_fit(sources[kind], KEYS, out)
    table = pq.read_table(out)
    assert table.column_names == ["index", "scale", "shift", "residual"]
    assert_fit(table, filters)


def test_several_keys_a_filter(small_bank: FilterBank, out: Path) -> None:
    bank = small_bank.select(k=7)
    statistics = write_fit(bank, KEYS, out, topk=3, sign="positive")
    table = pq.read_table(out)
    assert_fit(table, bank.filters, topk=3, sign="positive")
    assert (statistics.count == fit_statistics(bank, KEYS, sign="positive").count).all()


def test_an_exact_combination_without_its_first_key_is_not_dead() -> None:
    index, scale = torch.tensor([[0, 1]] * 3), torch.tensor([[0.0, -2.0], [0.0, 0.0], [torch.nan] * 2])
    index[2] = -1
    tally = FitTally(1)
    tally.add(fit._counted(AffineFit(index, scale, torch.zeros(3), torch.tensor([0.0, 0.0, torch.nan])), "combination"))
    result = tally.result()
    assert (result.count.item(), result.dead.item(), result.not_finite.item()) == (1, 1, 1)


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("rows", [7, 10_000])
def test_combinations(small_bank: FilterBank, out: Path, topk: int | None, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(stream, "ROWS_READ", rows)
    monkeypatch.setattr(stream, "ROWS", rows)
    monkeypatch.setattr(fit, "ROW_GROUP", 100)
    bank = FilterBank.concat([small_bank.select(k=7), FilterBank.from_layers([Layer("x", noise(90))], "noise")])
    options = {"method": "combination", "topk": topk}
    for filters in (bank, bank.filters, bank.filters.numpy()):
        statistics = write_fit(filters, KEYS, out, **options)
        table = pq.read_table(out)
        assert_fit(table, bank.filters, **options)
        expected = affine_fit(bank.filters, KEYS, **options).residual
        live = expected > 0
        assert (statistics.dead.item(), statistics.not_finite.item()) == ((expected == 0).sum(), expected.isnan().sum())
        assert statistics.count.item() == live.sum()
        assert statistics.mean.item() == pytest.approx(expected[live].mean().item(), abs=1e-6)
    assert table["index"].type.list_size == (topk or 8)
    assert table["shift"].type == pa.float32()
    assert pq.read_metadata(out).row_group(0).num_rows == 100 // (topk or 8)
    recorded = json.loads(pq.read_schema(out).metadata[b"mkf.fit"])
    assert (recorded["method"], recorded["topk"]) == ("combination", topk)


def test_the_keys_are_recorded(small_bank: FilterBank, out: Path) -> None:
    write_fit(small_bank.select(k=7), KEYS, out, topk=2)
    recorded = json.loads(pq.read_schema(out).metadata[b"mkf.fit"])
    assert (recorded["format"], recorded["version"], recorded["method"]) == ("mkf.fit", 1, "one")
    assert (recorded["sign"], recorded["topk"]) == ("any", 2)
    assert recorded["keys"]["names"] == list(KEYS.names)
    assert recorded["keys"]["provenance"] == KEYS.provenance
    assert torch.equal(torch.tensor(recorded["keys"]["filters"]), KEYS.filters)
    write_fit(small_bank.select(k=7), KEYS.filters[:1].double(), out)
    recorded = json.loads(pq.read_schema(out).metadata[b"mkf.fit"])
    assert recorded["keys"]["names"] is None
    assert torch.equal(torch.tensor(recorded["keys"]["filters"]), KEYS.filters[:1])


def test_a_failure_leaves_the_old_fit_and_nothing_else(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS_READ", 10)
    write_fit(noise(20), KEYS, out)
    old = out.read_bytes()

    def stop(done: int, total: int) -> None:
        if done > 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_fit(noise(40), KEYS, out, progress=stop)
    with pytest.raises(ValueError, match="filters are 5x5"):
        write_fit(torch.randn(4, 5, 5), KEYS, out)
    assert out.read_bytes() == old
    assert os.listdir(out.parent) == ["fit.parquet"]
    write_fit(noise(40), KEYS, out)
    assert pq.read_metadata(out).num_rows == 40


KILLED = """
import sys, time, torch
from mkf.bank.fit import write_fit
from mkf.keys import paper8

def wait(done, total):
    if done > total / 2:
        print("half", flush=True)
        time.sleep(600)

write_fit(torch.randn(100_000, 7, 7), paper8(), sys.argv[1], progress=wait)
"""


def test_a_killed_run_leaves_the_old_fit(out: Path) -> None:
    write_fit(noise(20), KEYS, out)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert_fit(pq.read_table(out), noise(20))
    assert [name for name in os.listdir(out.parent) if not name.startswith(".")] == ["fit.parquet"]
    write_fit(noise(30), KEYS, out)
    assert_fit(pq.read_table(out), noise(30))


def test_no_filters(tmp_path: Path) -> None:
    write_fit(torch.empty(0, 7, 7), KEYS, tmp_path / "fit.parquet")
    assert pq.read_table(tmp_path / "fit.parquet").num_rows == 0


def test_refused(small_bank: FilterBank, tmp_path: Path) -> None:
    out = tmp_path / "fit.parquet"
    with pytest.raises(ValueError, match=r"mixes kernel sizes \(5x5, 7x7\)"):
        write_fit(small_bank, KEYS, out)
    with pytest.raises(ValueError, match="empty"):
        write_fit(FilterBank.concat([]), KEYS, out)
    with pytest.raises(ValueError, match="sign='positive' is for single keys"):
        write_fit(noise(5), KEYS, out, method="combination", sign="positive")
    with pytest.raises(ValueError, match="topk=9"):
        write_fit(noise(5), KEYS, out, topk=9)
    with pytest.raises(ValueError, match=r"memory=1000000: .* 129 MiB"):
        write_fit(noise(5), KEYS, out, memory=1_000_000)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_fit(noise(5), KEYS, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        write_fit(noise(5), KEYS, tmp_path / "file" / "fit.parquet")
    assert os.listdir(tmp_path) == ["file"]


def test_only_dead_or_broken_filters(out: Path) -> None:
    for filters in (torch.ones(10, 7, 7), torch.full((10, 7, 7), torch.inf)):
        statistics = write_fit(filters, KEYS, out)
        assert statistics.count.sum() == 0
        assert_fit(pq.read_table(out), filters)


MEMORY = """
import re, sys
from pathlib import Path
from mkf.bank import FilterBank
from mkf.bank.fit import write_fit
from mkf.keys import paper8

def kilobytes(what):
    # Not ru_maxrss, which in a new process starts at what its parent had.
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, large, out, memory = sys.argv[1:]
write_fit(FilterBank.open(small), paper8(), out)
before = kilobytes("VmRSS")
write_fit(FilterBank.open(large), paper8(), out, memory=int(memory))
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_bound(tmp_path: Path) -> None:
    filters = torch.randint(-2, 3, (100_000, 7, 7)).float()  # quickly compressed
    layers = FilterBank.from_layers([Layer("conv", filters)], "m")
    FilterBank.concat([layers] * 10).save(tmp_path / "large")
    FilterBank.from_layers([Layer("conv", filters[:1000])], "m").save(tmp_path / "small")
    memory = 160 << 20
    words = (tmp_path / "small", tmp_path / "large", tmp_path / "fit.parquet", memory)
    script = [sys.executable, "-c", MEMORY, *map(str, words)]
    kilobytes = int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    assert kilobytes * 1024 < memory  # the filters have 196 MB
    assert pq.read_metadata(tmp_path / "fit.parquet").num_rows == 1_000_000
