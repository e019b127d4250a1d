"""Training of classifiers on Parquet image folders: data, recipe and loop, made of timm's parts."""

from typing import TYPE_CHECKING

from mkf.train.config import TrainConfig

if TYPE_CHECKING:
    from mkf.train.data import ParquetImages, evaluation_loader
    from mkf.train.engine import EpochRecord, train
    from mkf.train.filters import learned_filters
    from mkf.train.model import build_model, load_weights
else:
    from mkf._lazy import importer

    __getattr__, __dir__ = importer(
        __name__,
        {
            "data": ["ParquetImages", "evaluation_loader"],
            "engine": ["EpochRecord", "train"],
            "filters": ["learned_filters"],
            "model": ["build_model", "load_weights"],
        },
    )

__all__ = [
    "EpochRecord",
    "ParquetImages",
    "TrainConfig",
    "build_model",
    "evaluation_loader",
    "learned_filters",
    "load_weights",
    "train",
]
