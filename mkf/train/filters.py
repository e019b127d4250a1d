"""The filters that finished runs learned, as a bank with its provenance; mkf's embedded bank is made this way."""

from pathlib import Path

from torch import nn

from mkf.bank import UNTRAINED, FilterBank
from mkf.train.model import load_weights


def learned_filters(*runs: str | Path, licence: str = "") -> FilterBank:
    """Collect the filters of runs of `train`: trained, and those of the same networks before training as a control.

    A run in the folder `NAME` gives the models `NAME` and `NAME-untrained`; one that started from trained weights has
    no such control. The bank's `source` tells data set, epochs, test accuracy, seed and command.

    Args:
        runs: Folders that `train` finished.
        licence: Of the filters.

    Raises:
        FileNotFoundError: A folder holds no finished run.
    """
    banks = []
    for run in map(Path, runs):
        model, metadata = load_weights(run / "model.safetensors")
        banks.append(_bank(model, metadata, run.name, licence))
        if not metadata.get("weights"):
            banks.append(_bank(*load_weights(run / "initial.safetensors"), f"{run.name}{UNTRAINED}", licence))
    return FilterBank.concat(banks)


def _bank(model: nn.Module, metadata: dict[str, str], name: str, licence: str) -> FilterBank:
    told = f"{metadata['epochs']} epochs"
    if "test_accuracy" in metadata:
        told += f", test accuracy {metadata['test_accuracy']} %"
    source = f"{metadata['data_set']}, {told}, seed {metadata['seed']}: {metadata['command']}"
    return FilterBank.from_model(model, name, source=source, licence=licence)
