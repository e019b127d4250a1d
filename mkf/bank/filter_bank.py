"""FilterBank: the depthwise filters of networks, each with where it comes from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mkf.bank import checkpoint, extract, hub, storage
from mkf.bank.schema import METADATA, Layer, layer_tables, metadata_schema, schema
from mkf.bank.shard import Shard, rechunk

if TYPE_CHECKING:
    import pyarrow as pa

EMBEDDED = Path(__file__).parent / "embedded"
READ_ROWS = 16_384


class FilterBank:
    """An immutable set of N depthwise filters with one row of metadata each.

    In memory a bank is an Arrow table; on disk it is a Parquet data set, and a bank that was opened reads from it only
    what is asked for, so it may be larger than memory. Rows are ordered by kernel size, and within one kernel size as
    they were put in: models as they were concatenated, layers by depth, channels. Saving and opening keep that order.

    Banks come from `from_model`, `from_timm`, `from_checkpoint`, `from_layers`, `open` and `embedded`.
    """

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        self._shards = tuple(sorted(shards, key=lambda shard: shard.kernel_size))

    @classmethod
    def from_layers(cls, layers: Iterable[Layer], model: str, source: str = "", licence: str = "") -> FilterBank:
        """Make a bank from filters you have as tensors.

        Args:
            layers: One model's layers in the order of their depth; `depth` counts from 0, `normalised_depth` is
                depth / (layers - 1), 0 for a single layer. The filters are copied and become float32.
            model: The model's name.
            source: Where the filters come from, in words.
            licence: Their licence, best as an SPDX identifier.

        Raises:
            ValueError: A layer's shape, size or dtype is not that of a `Layer`, its values are beyond float32's range,
                or it is on the meta device.
        """
        return cls(Shard(k, table) for k, table in layer_tables(layers, model, source, licence).items())

    @classmethod
    def from_model(
        cls, model: nn.Module, name: str | None = None, *, source: str = "", licence: str = ""
    ) -> FilterBank:
        """Collect the depthwise filters of a torch model.

        A layer counts if it is an `nn.Conv2d` or of a subclass, with groups == in_channels > 1, whatever its channel
        multiplier, and a square kernel of odd size 3 to 11; or a `KeyConv2d`, by its materialised filters.
        DataParallel, DistributedDataParallel and torch.compile are looked through; a layer used twice counts once, and
        so does a weight that several layers share, under the name and with the stride of the first: a bank is of
        filters. Weights under a parametrisation, or under the older weight_norm and spectral_norm, are those that the
        next forward would use. Depth is the order of `model.modules()`. Depthwise layers of other sizes are named in a
        `UserWarning`.

        Args:
            model: The model, on any device but meta, of any floating dtype.
            name: What the bank calls it; the name of its class if None.
            source: Where its weights come from, in words.
            licence: The weights' licence.

        Raises:
            ValueError: The model has no such filter, its values are beyond float32's range, or its weights are on the
                meta device.
        """
        layers, skipped = extract.depthwise_layers(model)
        name = name or type(extract.unwrap(model)).__name__
        _warn_of_skipped(name, skipped)
        return cls.from_layers(layers, name, source, licence)

    @classmethod
    def from_timm(cls, names: str | Sequence[str], pretrained: bool = True) -> FilterBank:
        """Collect the depthwise filters of timm's models.

        `source` tells timm's version and the hub's repository, `licence` what timm states for the weights. A pretrained
        model is named with its tag (`convnextv2_pico.fcmae_ft_in1k`), an untrained one by its architecture as a control
        (`convnextv2_pico-untrained`); its filters come from torch's global random generator.

        Args:
            names: timm's names, with or without a tag.
            pretrained: Fetch the trained weights (from the hub or its cache); otherwise the model is only initialised.

        Raises:
            ValueError: timm does not know a name (near ones are suggested), has no weights for it, or the model has no
                depthwise filters.
            OSError: The weights could not be fetched.
        """
        banks = []
        for name in [names] if isinstance(names, str) else names:
            created = hub.create(name, pretrained)
            banks.append(cls.from_model(created.model, created.name, source=created.source, licence=created.licence))
        return cls.concat(banks)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        source: str | None = None,
        licence: str | None = None,
    ) -> FilterBank:
        """Collect the depthwise filters of a checkpoint file, without the code of its model.

        A `.safetensors` file is read as such, any other by `torch.load(weights_only=True)`; nothing is ever unpickled.
        The weights are looked for under `model_ema`, `state_dict_ema`, `params_ema`, `model`, `state_dict`,
        `model_state_dict` and `params`, in this order (averaged weights first, as timm does), then in the file itself;
        `source` names the entry taken. Optimiser moments, which have the shapes of the weights, are never counted.

        A tensor is taken for depthwise filters by its shape (C, 1, k, k), C > 1, k odd, 3 to 11, if its name ends in
        `weight`. Only the model's code could tell them from an ordinary convolution of a single channel, such as the
        first layer of a network for grey images. A tensor named `MODEL/LAYER`, as in a collection of filters, is taken
        by its shape alone, and its model is MODEL. Depth is the order in the file; safetensors files do not keep one,
        so their names are sorted naturally (`blocks.3` before `blocks.10`). The stride is unknown, hence null. A tensor
        that a model's layers share counts once, under its first name. Tensors like depthwise filters of another size or
        dtype are named in a `UserWarning`.

        Args:
            path: The file.
            name: The model's name; the file's without suffix if None.
            source: Where the weights come from; the file's name and entry if None.
            licence: Their licence; what a safetensors file's metadata state under `licence` or `license` if None.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated or damaged, needs code to be run, holds no weights where they are looked
                for, or no depthwise filters, or two layers of one name, with and without what a wrapper put before it.
        """
        found = checkpoint.read(path, name)
        banks = []
        for model, layers in found.models.items():
            banks.append(
                cls.from_layers(
                    layers,
                    model,
                    found.source if source is None else source,
                    found.licence if licence is None else licence,
                )
            )
        _warn_of_skipped(Path(path).name, found.skipped)
        return cls.concat(banks)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FilterBank:
        """Open a saved bank; no filter is read before it is asked for.

        The bank goes on reading from the folder: open it again after the folder was replaced.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: The folder is not a bank, or an incomplete or damaged one.
        """
        return cls(storage.open_shards(path))

    @classmethod
    def embedded(cls) -> FilterBank:
        """Open the bank that comes with mkf.

        Raises:
            FileNotFoundError: This installation has none.
        """
        if not storage.is_bank(EMBEDDED):
            raise FileNotFoundError(f"this installation of mkf has no embedded bank (looked in {EMBEDDED})")
        return cls.open(EMBEDDED)

    @classmethod
    def concat(cls, banks: Iterable[FilterBank]) -> FilterBank:
        """Put banks one after the other, within each kernel size; nothing is copied or read.

        Raises:
            TypeError: Something else than a bank.
        """
        banks = tuple(banks)
        if strange := [type(bank).__name__ for bank in banks if not isinstance(bank, cls)]:
            raise TypeError(f"concat takes banks, not {strange[0]}: make one with from_model, from_checkpoint or open")
        return cls(chain.from_iterable(bank._shards for bank in banks))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to a folder as a Parquet data set, which other tools read without mkf.

            pyarrow.dataset.dataset("bank")
            polars.scan_parquet("bank/**/*.parquet")
            duckdb.sql("FROM 'bank/**/*.parquet'")

        The folder holds one data set per kernel size, partitioned by model, with a fixed-size list column `filter`
        (k*k float32, row-major) and the metadata; where there are several sizes, name one: `bank/kernel_size=7`.
        Writing is atomic: a bank already there is replaced only once the new one is complete, and survives any failure.
        A process that is killed can leave a hidden folder `.NAME.saving-...` beside it, which may be deleted. Memory
        stays bounded, whatever the size of the bank.

        Raises:
            FileExistsError: The path is a file, or a folder that holds something else than a bank, or besides one.
            OSError: The folder cannot be written.
            ValueError: A model's name is too long for a folder.
        """
        storage.save(self._shards, path)

    def select(
        self,
        k: int | None = None,
        stride: int | None = None,
        model: str | Sequence[str] | None = None,
        layer: str | Sequence[str] | None = None,
    ) -> FilterBank:
        """The filters that satisfy all the conditions given; none may, then the bank is empty.

        Nothing is read from disk: the conditions are applied when rows are. An unknown stride equals no stride.

        Args:
            k: Kernel size.
            stride: Stride of the layer.
            model: A model's name, or several.
            layer: A layer's name, or several.
        """
        conditions: dict[str, Sequence[str | int]] = {}
        if stride is not None:
            conditions["stride"] = [stride]
        for column, names in (("model", model), ("layer", layer)):
            if names is not None:
                conditions[column] = [names] if isinstance(names, str) else list(names)
        shards = [shard.where(conditions) for shard in self._shards if k in (None, shard.kernel_size)]
        if k is not None and not shards:
            shards = [Shard(k, schema(k).empty_table())]
        return FilterBank(shards)

    def __len__(self) -> int:
        """N. Of a bank on disk, the rows are counted without reading filters."""
        return sum(shard.rows for shard in self._shards)

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """The sizes k of the filters, ascending."""
        return tuple(dict.fromkeys(shard.kernel_size for shard in self._shards if shard.rows))

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in order of first appearance."""
        import pyarrow.compute as pc

        names: dict[str, None] = {}
        for shard in self._shards:
            for batch in shard.read(["model"], READ_ROWS):
                names.update(dict.fromkeys(pc.unique(batch["model"]).to_pylist()))
        return tuple(names)

    @property
    def filters(self) -> torch.Tensor:
        """All filters, (N, k, k) float32 on the CPU, row-major.

        Of a bank in memory this may be the bank's own memory: clone it before writing into it. Of a bank on disk all
        filters are read into a new tensor: use `batches` where they are more than memory holds.

        Raises:
            ValueError: The filters have several sizes, or the bank is empty and of no size.
        """
        sizes = self.kernel_sizes or tuple(dict.fromkeys(shard.kernel_size for shard in self._shards))
        if len(sizes) > 1:
            found = ", ".join(f"{k}x{k}" for k in sizes)
            raise ValueError(f"the bank mixes kernel sizes ({found}): choose one with select(k={sizes[-1]})")
        if not sizes:
            raise ValueError("the bank is empty: it has no filters and no kernel size")
        shards = [shard for shard in self._shards if shard.kernel_size == sizes[0]]
        return _filters_tensor(shards, sizes[0], sum(shard.rows for shard in shards))

    @property
    def metadata(self) -> pa.Table:
        """One row per filter, in the order of the filters.

        Columns: model, layer (string), depth (int32, 0-based order of the layer in its model), normalised_depth
        (float32, depth / (layers - 1)), channel, kernel_size (int32), stride (int32, null where unknown), source,
        licence (string). Of a bank on disk all N rows are read.
        """
        import pyarrow as pa

        names = self._shards[0].metadata_names if self._shards else METADATA
        batches = chain.from_iterable(shard.read(names, READ_ROWS) for shard in self._shards)
        return pa.Table.from_batches(batches, schema=pa.schema([metadata_schema().field(name) for name in names]))

    def layers(self) -> pa.Table:
        """One row per layer: its metadata without `channel`, and `filters`, their number."""
        import pyarrow as pa

        keys = [name for name in METADATA if name != "channel"]
        counts = [metadata_schema().empty_table().select(keys).append_column("filters", pa.array([], pa.int64()))]
        for shard in self._shards:
            for batch in shard.read(keys, READ_ROWS):
                counts.append(
                    _sum_by(pa.Table.from_batches([batch]).append_column("filters", pa.repeat(1, len(batch))), keys)
                )
        return _sum_by(pa.concat_tables(counts), keys)

    def batches(self, rows: int = READ_ROWS, metadata: Sequence[str] = METADATA) -> Iterator[FilterBank]:
        """Yield the bank in order as banks in memory of at most `rows` filters, each of a single kernel size.

        Memory stays bounded, whatever the size of the bank.

        Args:
            rows: Filters of a part at most.
            metadata: The columns of metadata that the parts shall have. Without some of them reading takes less time,
                but such a part cannot be saved.

        Raises:
            ValueError: `rows` is not positive, or there is no such column.
        """
        if rows < 1:
            raise ValueError(f"rows must be positive, got {rows}")
        if unknown := [name for name in metadata if name not in METADATA]:
            raise ValueError(f"the bank has no column {', '.join(unknown)}; it has {', '.join(METADATA)}")
        columns = ["filter", *(name for name in METADATA if name in metadata)]
        for k, shards in groupby(self._shards, key=lambda shard: shard.kernel_size):
            batches = chain.from_iterable(shard.read(columns, rows) for shard in shards)
            for table in rechunk(batches, rows):
                yield FilterBank([Shard(k, table)])

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}x{k}" for k in self.kernel_sizes) or "no size"
        return f"FilterBank({len(self)} filters, {sizes})"


def _sum_by(table: pa.Table, keys: list[str]) -> pa.Table:
    """Add up `filters` over rows of equal keys, in order of first appearance."""
    summed = table.group_by(keys, use_threads=False).aggregate([("filters", "sum")])
    return summed.rename_columns({"filters_sum": "filters"})


def _filters_tensor(shards: list[Shard], k: int, rows: int) -> torch.Tensor:
    if len(shards) == 1 and shards[0].in_memory and shards[0].data["filter"].num_chunks == 1:
        # DLPack, since torch warns of the read-only arrays that Arrow gives to numpy.
        return torch.from_dlpack(shards[0].data["filter"].chunk(0).flatten()).view(rows, k, k)
    filters = torch.empty(rows, k, k, device="cpu")
    flat, start = filters.view(-1).numpy(), 0
    for shard in shards:
        for batch in shard.read(["filter"], READ_ROWS):
            values = batch["filter"].flatten().to_numpy()
            flat[start : start + len(values)] = values
            start += len(values)
    return filters


def _warn_of_skipped(name: str, skipped: list[str]) -> None:
    if skipped:
        warnings.warn(
            f"{name}: left out {len(skipped)} depthwise layers whose kernel is not square, odd and 3 to 11 wide: "
            + ", ".join(skipped),
            stacklevel=3,
        )
