"""Reading of Parquet image folders."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import mkf.train.data
from mkf.train import ParquetImages, TrainConfig, evaluation_loader
from mkf.train.data import TEST_SPLITS, count_classes, loaders
from tests.train.conftest import WriteImages, png

IMAGE = pa.struct([("bytes", pa.binary())])


def test_every_mode_becomes_rgb(tmp_path: Path, write_images: WriteImages) -> None:
    red = Image.new("RGB", (5, 3), (200, 10, 20))
    modes = [red, red.convert("RGBA"), red.convert("L"), red.convert("LA"), red.convert("P"), red.convert("1")]
    write_images(tmp_path / "train-0.parquet", modes, [0, 1, 2, 3, 4, 5])
    images = ParquetImages(tmp_path)
    assert len(images) == 6
    assert {(image.shape, image.dtype) for image in images.images} == {((3, 5, 3), np.dtype(np.uint8))}
    assert images.images[1].tolist() == images.images[0].tolist()  # alpha is dropped, colours stay
    grey = images.images[2]
    assert (grey == grey[..., :1]).all()
    assert grey[0, 0, 0] == round((200 * 299 + 10 * 587 + 20 * 114) / 1000)
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_sizes_may_differ_and_batches_are_square(tmp_path: Path, write_images: WriteImages) -> None:
    images = [Image.new("RGB", size, (i, 0, 0)) for i, size in enumerate([(9, 20), (33, 7), (1, 1), (12, 12)])]
    write_images(tmp_path / "train-0.parquet", images, [0, 1, 0, 1])
    write_images(tmp_path / "test-0.parquet", images, [0, 1, 0, 1])
    config = TrainConfig(model="ConvMixer", data=str(tmp_path), out="", image_size=8, batch_size=4)
    train, test = loaders(config, ParquetImages(tmp_path), ParquetImages(tmp_path, TEST_SPLITS))
    for loader in (train, test):
        batch, labels = next(iter(loader))
        assert batch.shape == (4, 3, 8, 8)
        assert batch.dtype == torch.float32
        assert sorted(labels.tolist()) == [0, 0, 1, 1]


def test_shards_in_order_and_first_split_wins(tmp_path: Path, write_images: WriteImages) -> None:
    def pixel(value: int) -> list[Image.Image]:
        return [Image.new("RGB", (1, 1), (value, 0, 0))]

    for split, shard, value in [("train", 1, 1), ("train", 0, 0), ("validation", 0, 2), ("val", 0, 3)]:
        write_images(tmp_path / f"{split}-{shard:05}-of-00002.parquet", pixel(value), [value])
    assert ParquetImages(tmp_path).labels.tolist() == [0, 1]
    assert [image[0, 0, 0] for image in ParquetImages(tmp_path).images] == [0, 1]
    assert ParquetImages(tmp_path, TEST_SPLITS).labels.tolist() == [3]


def test_channel_statistics(tmp_path: Path, write_images: WriteImages) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in [(4, 9), (1, 2), (7, 7)]]
    write_images(tmp_path / "train-0.parquet", [Image.fromarray(array) for array in arrays], [0, 0, 0])
    mean, deviation = ParquetImages(tmp_path).channel_statistics()
    pixels = np.concatenate([array.reshape(-1, 3) for array in arrays]).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(deviation, pixels.std(axis=0), rtol=1e-9)


def test_constant_channel_has_a_positive_deviation(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path / "train-0.parquet", [Image.new("RGB", (2, 2), (9, 9, 9))], [0])
    assert min(ParquetImages(tmp_path).channel_statistics()[1]) > 0


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data folder"):
        ParquetImages(tmp_path / "nowhere")
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"has no train-\*\.parquet"):
        ParquetImages(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test-\*\.parquet or val-\*\.parquet or validation-\*\.parquet"):
        ParquetImages(tmp_path, TEST_SPLITS)
    (tmp_path / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet is not a readable Parquet file"):
        ParquetImages(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": pa.array([b"x"]), "y": pa.array([1])}, r"no column image and no column label \(its columns: img, y\)"),
        ({"image": pa.array([b"x"]), "label": pa.array([1])}, "column image has type binary"),
        ({"image": pa.array([{"bytes": b""}], IMAGE), "label": pa.array(["cat"])}, "column label has type string"),
        ({"image": pa.array([{"bytes": b""}], IMAGE), "label": pa.array([None], pa.int64())}, "has 1 nulls"),
        ({"image": pa.array([{"bytes": b"?"}], IMAGE), "label": pa.array([1])}, "row 0: the image cannot be decoded"),
        ({"image": pa.array([None], IMAGE), "label": pa.array([1])}, "row 0: the image cannot be decoded"),
        ({"image": pa.array([], IMAGE), "label": pa.array([], pa.int64())}, "train split holds no image"),
    ],
)
def test_column_errors(tmp_path: Path, columns: dict[str, pa.Array], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=message):
        ParquetImages(tmp_path)


def test_classes_are_counted_over_both_splits(tmp_path: Path, write_images: WriteImages) -> None:
    image = Image.new("RGB", (4, 4))
    write_images(tmp_path / "train-0.parquet", [image] * 2, [0, 1])
    with pytest.raises(FileNotFoundError, match="has no test-"):
        count_classes(tmp_path)
    write_images(tmp_path / "test-0.parquet", [], [])
    assert count_classes(tmp_path) == 2
    write_images(tmp_path / "test-1.parquet", [image], [4])
    assert count_classes(tmp_path) == 5


def test_truncated_image_and_negative_label(tmp_path: Path, write_images: WriteImages) -> None:
    content = png(Image.effect_noise((64, 64), 50))[:200]
    table = pa.table({"image": pa.array([{"bytes": content}], IMAGE), "label": pa.array([0])})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="cannot be decoded"):
        ParquetImages(tmp_path)
    write_images(tmp_path / "train-0.parquet", [Image.new("RGB", (2, 2))], [-1])
    with pytest.raises(ValueError, match="negative labels"):
        ParquetImages(tmp_path)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.arange(4, dtype=np.uint16).reshape(2, 2) * 20000),
        Image.fromarray(np.full((2, 2), 70000, np.int32)),
        Image.fromarray(np.full((2, 2), 0.5, np.float32)),
    ],
)
def test_more_than_8_bits_are_refused(tmp_path: Path, image: Image.Image) -> None:
    buffer = BytesIO()
    image.save(buffer, "TIFF")
    table = pa.table({"image": pa.array([{"bytes": buffer.getvalue()}], IMAGE), "label": pa.array([0])})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet, row 0: the image has more than 8 bits a channel"):
        ParquetImages(tmp_path)


def test_a_damaged_image(tmp_path: Path) -> None:
    content = bytearray(png(Image.effect_noise((400, 400), 50)))
    content[content.rindex(b"IDAT")] = 1  # no name of a chunk, which is seen after the first has been read
    table = pa.table({"image": pa.array([{"bytes": bytes(content)}], IMAGE), "label": pa.array([0])})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="row 0: the image cannot be decoded"):
        ParquetImages(tmp_path)


def test_an_image_that_is_too_large_for_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    table = pa.table({"image": pa.array([{"bytes": png(Image.new("RGB", (3, 3)))}], IMAGE), "label": pa.array([0])})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="row 0: the image cannot be decoded: Image size"):
        ParquetImages(tmp_path)


def test_a_damaged_page_is_told_with_its_file(tmp_path: Path, write_images: WriteImages) -> None:
    path = write_images(tmp_path / "train-0.parquet", [Image.effect_noise((64, 64), 50)], [0])
    content = bytearray(path.read_bytes())
    content[4:44] = bytes(40)  # the header of the first page, after the magic word
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-0\.parquet is damaged"):
        ParquetImages(tmp_path)


def test_transform_must_be_set(colours: Path) -> None:
    with pytest.raises(RuntimeError, match="transform"):
        ParquetImages(colours)[0]


def test_evaluation_loader_draws_the_same_images_of_each_class_every_time(colours: Path) -> None:
    images = ParquetImages(colours)
    assert images.split == "train"
    assert ParquetImages(colours, TEST_SPLITS).split == "val"
    loader = evaluation_loader(images, images, 16, per_class=5, seed=1)
    (first, labels), (again, _) = next(iter(loader)), next(iter(loader))
    assert torch.equal(first, again)
    assert labels.bincount().tolist() == [5, 5]
    assert first.shape == (10, 3, 16, 16)
    everything = torch.cat([batch for batch, _ in evaluation_loader(images, images, 16)])
    assert len(everything) == 24
    assert everything.mean((0, 2, 3)).abs().max() < 0.02  # normalised by the statistics of these very images
    assert {row.sum().item() for row in first} <= {row.sum().item() for row in everything}
    with pytest.raises(ValueError, match=r"class 0 has 12 images in the train split, fewer than 13"):
        evaluation_loader(images, images, 16, per_class=13)


def test_batches_that_are_looked_at_often_are_kept_if_they_are_small(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ParquetImages(colours)
    loader = evaluation_loader(images, images, 16, per_class=5)
    monkeypatch.setattr(mkf.train.data, "KEPT", 10 * 3 * 16 * 16 * 4)
    ((kept, _),) = mkf.train.data.keep_if_small(loader)
    assert torch.equal(kept, next(iter(loader))[0])
    assert isinstance(mkf.train.data.keep_if_small(loader), list)
    monkeypatch.setattr(mkf.train.data, "KEPT", 10 * 3 * 16 * 16 * 4 - 1)
    assert mkf.train.data.keep_if_small(loader) is loader


def test_real_images(data_dir: Path) -> None:
    images = ParquetImages(data_dir / "images" / "cifar10", TEST_SPLITS)
    assert np.bincount(images.labels).tolist() == [1000] * 10
    assert {image.shape for image in images.images} == {(32, 32, 3)}
