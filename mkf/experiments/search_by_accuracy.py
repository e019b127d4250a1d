"""The paper's search by accuracy on a network of one's own: the shape of its Figure 3 and of its Table 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mkf.keys import KeySet, paper8, random
from mkf.search import Accuracy, Elimination, autoencoder, clusters, two_rounds

if TYPE_CHECKING:
    from mkf.bank import FilterBank

UNIFORM = 50, 25, 10
"""Numbers of uniform codes that the paper's Table 1 has, beside its eight keys."""

RANDOM_SEEDS = 0, 1, 2


@dataclass(frozen=True, eq=False)
class SearchByAccuracy:
    """What was found, and what it is worth on images that no search has seen.

    Attributes:
        first: The elimination from uniform codes to ten.
        second: The elimination among these and their neighbours; its keys are the keys found.
        accuracy: Test accuracy by what the filters were replaced with, from 0 to 1.
        images: Test images.
    """

    first: Elimination
    second: Elimination
    accuracy: dict[str, float]
    images: int

    def markdown(self) -> str:
        """The accuracies as a Markdown table."""
        rows = [f"| {name} | {100 * top1:.1f} |" for name, top1 in self.accuracy.items()]
        return "\n".join(["| filters | test accuracy, % |", "|---|---|", *rows])

    def draw(self, out: Path) -> Path:
        """Write `elimination.png`, the second round's error over the keys left, into a folder that exists."""
        from mkf.analysis import figures

        losses = {step.keys: step.loss for step in self.second.curve}
        drawn = figures.elimination(losses, self.second.objective, len(self.second.keys), self.second.elbow)
        return figures.save(drawn, out / "elimination.png")


def search_by_accuracy(
    bank: FilterBank,
    run: Path,
    data: Path,
    k: int = 8,
    *,
    per_class: int = 100,
    steps: int = 3000,
    seed: int = 0,
    state: Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> SearchByAccuracy:
    """Search k keys by the accuracy of a network on training images, and test them on the test split, once.

    Candidates come from an autoencoder of the bank, which need not hold the network. The network's depthwise filters of
    the bank's kernel size are replaced by linear shifts of the keys and nothing is fine-tuned. Beside the keys found
    are tested: the network as it is, 50, 25 and 10 uniform codes, the paper's keys (7 x 7), the bank's keys by
    clusters, and k random keys of three seeds.

    Args:
        bank: Filters of one kernel size.
        run: Folder of a finished run of `mkf train`.
        data: Its data folder, with a training and a test split.
        k: Number of keys.
        per_class: Training images of each class that judge the keys, 100 in the paper.
        steps: Training steps of the autoencoder at most.
        seed: Of autoencoder and clusters.
        state: A folder from which a search that was killed goes on.
        device: Where autoencoder and network run: `auto` (CUDA if there is one, else the CPU) or a torch device.
        progress: Called as `progress(done, total)`, in candidates left out and judged, in each round anew.

    Raises:
        FileNotFoundError: No finished run, no data, or a split is missing.
        ValueError: A network without depthwise filters of that size, a device that cannot be used, and what the
            searches refuse.
    """
    from mkf.train import ParquetImages, evaluation_loader, load_weights
    from mkf.train.data import TEST_SPLITS, keep_if_small
    from mkf.train.device import find_device

    place = find_device(device)
    network, metadata = load_weights(run / "model.safetensors")
    network.to(place)
    size = int(metadata["image_size"])
    training, test = ParquetImages(data), ParquetImages(data, TEST_SPLITS)
    judge = Accuracy(network, keep_if_small(evaluation_loader(training, training, size, per_class)), split="train")
    coder = autoencoder(bank, seed=seed, steps=steps, device=place, state=state and state / "autoencoder.pt")
    first, second = two_rounds(coder, k, judge, state=state, progress=progress)

    kernel_size = bank.kernel_sizes[0]
    sets: dict[str, KeySet | None] = {"original": None}
    sets |= {f"{codes} uniform codes": coder.candidates(codes) for codes in UNIFORM}
    sets[f"{k} keys, by accuracy"] = second.keys
    if kernel_size == 7:
        sets["paper8"] = paper8()
    sets[f"{k} keys, by clusters of the bank"] = clusters(bank, k, seed).keys
    sets |= {f"{k} random, seed {number}": random(kernel_size, k, number) for number in RANDOM_SEEDS}
    final = Accuracy(network, keep_if_small(evaluation_loader(test, training, size)), split="test")
    return SearchByAccuracy(first, second, {name: final.top1(keys) for name, keys in sets.items()}, len(test))
