"""Filter banks: the depthwise filters of networks, each with where it comes from."""

from __future__ import annotations

from pathlib import Path

from mkf.bank import hub
from mkf.bank.checkpoint import SUFFIXES
from mkf.bank.filter_bank import FilterBank
from mkf.bank.schema import UNTRAINED, Layer

__all__ = ["UNTRAINED", "FilterBank", "Layer", "load"]


def load(source: str, pretrained: bool = True) -> FilterBank:
    """Get a bank from one word, as the command line takes it.

    `embedded` is the bank that comes with mkf, a folder that exists a saved bank, a file that exists a checkpoint; any
    other word is timm's name of a model, unless it looks like a path.

    Raises:
        FileNotFoundError: The word looks like a path, by a slash or a checkpoint's suffix, and nothing is there.
        ValueError: See `FilterBank.open`, `from_checkpoint` and `from_timm`.
        OSError: See `FilterBank.from_timm`.
    """
    if not source:
        raise ValueError("a source of filters is empty: name a bank, a checkpoint file or a model of timm")
    if source == "embedded":
        return FilterBank.embedded()
    path = Path(source).expanduser()
    if path.is_dir():
        return FilterBank.open(path)
    if path.is_file():
        return FilterBank.from_checkpoint(path)
    if source.endswith(SUFFIXES) or ("/" in source and ":" not in source):  # hf-hub:owner/name is timm's
        raise FileNotFoundError(f"there is no file or folder {source}")
    try:
        return FilterBank.from_timm(source, pretrained)
    except hub.UnknownModelError as error:
        raise ValueError(f"there is no file or folder {source}, and {error}") from error
