"""What a row of a bank is: the Arrow columns, and the layers they are made from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    import pyarrow as pa

KERNEL_SIZES = (3, 5, 7, 9, 11)
UNTRAINED = "-untrained"  # ends the name of a model whose filters were taken before training, as a control
METADATA = ("model", "layer", "depth", "normalised_depth", "channel", "kernel_size", "stride", "source", "licence")
COLUMNS = ("filter", *METADATA)


class Layer(NamedTuple):
    """The depthwise filters of one layer.

    Attributes:
        name: The layer's name in its model.
        filters: (C, k, k) or (C, 1, k, k), any real floating dtype, row-major, k odd, 3 to 11. Values are held as
            float32, and must be within its range where they are finite.
        stride: The convolution's stride; None where it is unknown or differs between the axes.
    """

    name: str
    filters: torch.Tensor
    stride: int | None = None


def schema(kernel_size: int) -> pa.Schema:
    """The columns of k x k filters: `filter`, a fixed-size list of k*k float32 (row-major), and the metadata."""
    import pyarrow as pa

    columns = {
        # Numbers that cannot be null: a reader then has no validity to work out, which costs it a quarter of its time.
        "filter": pa.list_(pa.field("item", pa.float32(), nullable=False), kernel_size * kernel_size),
        "model": pa.string(),
        "layer": pa.string(),
        "depth": pa.int32(),
        "normalised_depth": pa.float32(),
        "channel": pa.int32(),
        "kernel_size": pa.int32(),
        "stride": pa.int32(),
        "source": pa.string(),
        "licence": pa.string(),
    }
    return pa.schema([pa.field(name, columns[name], nullable=name == "stride") for name in COLUMNS])


def metadata_schema() -> pa.Schema:
    """The metadata's columns, the same for every kernel size."""
    import pyarrow as pa

    return pa.schema([schema(3).field(name) for name in METADATA])


def layer_tables(layers: Iterable[Layer], model: str, source: str, licence: str) -> dict[int, pa.Table]:
    """Turn one model's layers, in the order of their depth, into one table per kernel size.

    The filters are copied, so that a model that trains on does not change its bank.
    """
    import pyarrow as pa

    layers = [layer._replace(filters=_as_float32(layer)) for layer in layers]
    tables: dict[int, list[pa.Table]] = {}
    for depth, (name, filters, stride) in enumerate(layers):
        rows, k = len(filters), filters.shape[-1]
        values = {
            "filter": pa.FixedSizeListArray.from_arrays(pa.array(filters.reshape(-1).numpy()), type=schema(k)[0].type),
            "model": pa.repeat(model, rows),
            "layer": pa.repeat(name, rows),
            "depth": pa.repeat(pa.scalar(depth, pa.int32()), rows),
            "normalised_depth": pa.repeat(pa.scalar(depth / max(len(layers) - 1, 1), pa.float32()), rows),
            "channel": pa.array(range(rows), pa.int32()),
            "kernel_size": pa.repeat(pa.scalar(k, pa.int32()), rows),
            "stride": pa.array([stride] * rows, pa.int32()),
            "source": pa.repeat(source, rows),
            "licence": pa.repeat(licence, rows),
        }
        tables.setdefault(k, []).append(pa.table(values, schema=schema(k)))
    # One chunk each: then `.filters` can hand the memory out as it is.
    return {k: pa.concat_tables(parts).combine_chunks() for k, parts in sorted(tables.items())}


def _as_float32(layer: Layer) -> torch.Tensor:
    filters = layer.filters.detach()
    if filters.ndim == 4 and filters.shape[1] == 1:
        filters = filters[:, 0]
    k = filters.shape[-1] if filters.ndim == 3 else 0
    if k not in KERNEL_SIZES or filters.shape[-2] != k:
        sizes = ", ".join(map(str, KERNEL_SIZES))
        raise ValueError(
            f"layer {layer.name!r}: expected filters (C, k, k) or (C, 1, k, k) with k one of {sizes}, "
            f"got {tuple(layer.filters.shape)}"
        )
    if not filters.is_floating_point():
        raise ValueError(f"layer {layer.name!r}: expected real floating-point filters, got {filters.dtype}")
    if filters.is_meta:
        raise ValueError(
            f"layer {layer.name!r}: its weights are on the meta device and have no values; load them first"
        )
    rounded = filters.to("cpu", torch.float32, copy=True).contiguous()
    if (rounded.isinf() & filters.cpu().isfinite()).any():
        raise ValueError(
            f"layer {layer.name!r}: its filters are {filters.dtype} with values up to "
            f"{filters[filters.isfinite()].abs().max():.3g}, beyond the range of float32, in which a bank keeps them: "
            "scale them down, or leave this layer out"
        )
    return rounded
