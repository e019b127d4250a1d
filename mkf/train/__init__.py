"""Training of classifiers on Parquet image folders: data, recipe and loop, made of timm's parts."""

from mkf.train.config import TrainConfig
from mkf.train.data import ParquetImages, evaluation_loader
from mkf.train.engine import EpochRecord, train
from mkf.train.filters import learned_filters
from mkf.train.model import build_model, load_weights

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
