"""A tiny image folder in Parquet, as the Hugging Face hub lays them out."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

WriteImages = Callable[[Path, list[Image.Image], list[int]], Path]


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on many threads spend their time waiting, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_images() -> WriteImages:
    """Writes images and labels to one Parquet file."""

    def write(path: Path, images: list[Image.Image], labels: list[int]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"bytes": png(image), "path": None} for image in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())}), path)
        return path

    return write


@pytest.fixture
def colours(tmp_path: Path, write_images: WriteImages) -> Path:
    """Two classes told apart by colour: 24 training images in two shards, 8 for validation, 16x16 pixels."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "colours"

    def some(count: int) -> tuple[list[Image.Image], list[int]]:
        labels = [i % 2 for i in range(count)]
        pixels = rng.integers(0, 60, (count, 16, 16, 3))
        for image, label in zip(pixels, labels, strict=True):
            image[..., 2 * label] += 180
        return [Image.fromarray(image.astype(np.uint8)) for image in pixels], labels

    write_images(folder / "train-00000-of-00002.parquet", *some(12))
    write_images(folder / "train-00001-of-00002.parquet", *some(12))
    write_images(folder / "val-00000-of-00001.parquet", *some(8))
    return folder
