"""Image folders in Parquet, as the Hugging Face hub lays them out, decoded once into memory."""

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mkf.train.config import TrainConfig

Batches = DataLoader[tuple[torch.Tensor, int]]
TRAIN_SPLITS = ("train",)
TEST_SPLITS = ("test", "val", "validation")

KEPT = 1 << 30
"""Bytes of prepared images that `keep_if_small` keeps at most."""


class ParquetImages(Dataset[tuple[torch.Tensor, int]]):
    """The images and labels of one split, decoded once and kept as uint8, for sets of small images.

    The folder holds `SPLIT-*.parquet` files with the columns `image` (a struct with the field `bytes`: any format that
    Pillow reads, of 8 bits a channel) and `label` (integers from 0). Grey, palette and transparent images become RGB.

    Attributes:
        images: One uint8 array (H, W, 3) per image; the sizes may differ.
        labels: int64 array (N,).
        split: The split they are of, one of the names looked for.
        transform: Takes a PIL image and returns what the loader collates; set it before use.
    """

    def __init__(self, folder: str | Path, splits: tuple[str, ...] = TRAIN_SPLITS) -> None:
        """Read the first of `splits` that the folder has.

        Args:
            folder: The folder with the Parquet files.
            splits: Names to look for, in this order.

        Raises:
            FileNotFoundError: The folder is missing or has no file of these splits.
            ValueError: A file is not Parquet, lacks a column, holds no image, or an image cannot be decoded or has more
                than 8 bits a channel.
        """
        import pyarrow.compute as pc

        self.images: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        files = _files(Path(folder), splits)
        self.split = files[0].name.split("-")[0]
        for path in files:
            table = _read(path, ["image", "label"])
            labels.append(table["label"].to_numpy())
            contents = pc.struct_field(table["image"], "bytes")
            self.images.extend(_decode(value.as_py(), f"{path}, row {row}") for row, value in enumerate(contents))
        if not self.images:
            raise ValueError(f"{folder}: the {'/'.join(splits)} split holds no image")
        self.labels = np.concatenate(labels).astype(np.int64)
        if self.labels.min() < 0:
            raise ValueError(f"{folder}: the {'/'.join(splits)} split has negative labels (unlabelled images?)")
        self.transform: Callable[[Any], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        if self.transform is None:
            raise RuntimeError("ParquetImages.transform is not set")
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and the standard deviation of red, green and blue over all pixels, in [0, 1]."""
        pixels = sum(image.shape[0] * image.shape[1] for image in self.images)
        total, squares = np.zeros(3), np.zeros(3)
        for image in self.images:
            values = image.reshape(-1, 3).astype(np.float64) / 255
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
        mean = total / pixels
        deviation = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-12))
        return tuple(mean.tolist()), tuple(deviation.tolist())


def count_classes(folder: str | Path) -> int:
    """One more than the largest label of both splits; no image is read.

    Raises:
        FileNotFoundError: The folder is missing or lacks a split.
        ValueError: A file is not Parquet or lacks a column.
    """
    files = [path for splits in (TRAIN_SPLITS, TEST_SPLITS) for path in _files(Path(folder), splits)]
    return 1 + max(int(_read(path, ["label"])["label"].to_numpy().max(initial=0)) for path in files)


def loaders(config: TrainConfig, train_set: ParquetImages, test_set: ParquetImages) -> tuple[Batches, Batches]:
    """Give both splits their transforms, normalised by the training split's statistics, and return their loaders."""
    from timm.data import create_transform

    mean, std = train_set.channel_statistics()
    common = {"input_size": config.image_size, "mean": mean, "std": std, "interpolation": "bicubic"}
    try:
        train_set.transform = create_transform(
            **common,
            is_training=True,
            scale=(config.min_crop, 1.0),
            hflip=config.hflip,
            color_jitter=None,
            auto_augment=config.randaug or None,
            re_prob=config.erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"randaug {config.randaug!r} is not timm's notation, such as rand-m9-n2-mstd0.5") from error
    test_set.transform = create_transform(**common, crop_pct=1.0)
    return (
        DataLoader(train_set, config.batch_size, shuffle=True, drop_last=True, num_workers=config.workers),
        DataLoader(test_set, 2 * config.batch_size, num_workers=config.workers),
    )


def evaluation_loader(
    images: ParquetImages, train_set: ParquetImages, image_size: int, per_class: int | None = None, seed: int = 0
) -> Batches:
    """Images of any split prepared as for a test: always the same, in the same order.

    Args:
        images: What to load; its transform is set.
        train_set: Whose statistics normalise them.
        image_size: Side of the square input in pixels.
        per_class: Only so many of each class, drawn at random; all if None.
        seed: Of that draw.

    Raises:
        ValueError: A class has fewer images.
    """
    from timm.data import create_transform
    from torch.utils.data import Subset

    mean, std = train_set.channel_statistics()
    images.transform = create_transform(image_size, mean=mean, std=std, interpolation="bicubic", crop_pct=1.0)
    if per_class is None:
        return DataLoader(images, 256)
    rng = np.random.default_rng(seed)
    chosen = []
    for label, count in zip(*np.unique(images.labels, return_counts=True), strict=True):
        if count < per_class:
            raise ValueError(f"class {label} has {count} images in the {images.split} split, fewer than {per_class}")
        chosen += rng.choice(np.flatnonzero(images.labels == label), per_class, replace=False).tolist()
    return DataLoader(Subset(images, sorted(chosen)), 256)


def keep_if_small(loader: Batches) -> Iterable[Any]:
    """The batches, to look at many times: prepared once and kept up to a GiB, else prepared anew at each look."""
    images: Any = loader.dataset
    return list(loader) if len(images) * images[0][0].nbytes <= KEPT else loader


def _files(folder: Path, splits: tuple[str, ...]) -> list[Path]:
    """Return the Parquet files of the first split the folder has, sorted by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder {folder}")
    for split in splits:
        if files := sorted(folder.glob(f"{split}-*.parquet")):
            return files
    wanted = " or ".join(f"{split}-*.parquet" for split in splits)
    raise FileNotFoundError(f"{folder} has no {wanted}: a Parquet image folder as on the Hugging Face hub is needed")


def _read(path: Path, columns: list[str]) -> Any:
    """Return columns of one file after checking all that are needed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    names = ", ".join(schema.names)
    if missing := [name for name in ("image", "label") if name not in schema.names]:
        raise ValueError(f"{path} has no column {' and no column '.join(missing)} (its columns: {names})")
    image, label = schema.field("image").type, schema.field("label").type
    if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
        raise ValueError(f"{path}: column image has type {image}; a struct with a field `bytes` is needed")
    if not pa.types.is_integer(label):
        raise ValueError(f"{path}: column label has type {label}; integers are needed")
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:  # its schema is whole, a page is not
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if nulls := table["label"].null_count:
        raise ValueError(f"{path}: column label has {nulls} nulls")
    return table


def _decode(content: bytes | None, where: str) -> np.ndarray:
    """Decode one image to a uint8 array (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(BytesIO(content or b"")) as image:
            mode = image.mode
            if mode not in ("I", "F") and not mode.startswith("I;16"):  # Pillow would cut all above 255 off
                return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # what Pillow raises for damaged and for huge images differs from format to format
        raise ValueError(f"{where}: the image cannot be decoded: {error}") from error
    raise ValueError(f"{where}: the image has more than 8 bits a channel (Pillow's mode {mode})")
