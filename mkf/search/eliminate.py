"""From many candidates to few keys, by giving up one at a time."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mkf._files import replacing
from mkf.keys import KeySet
from mkf.search.objectives import Judge, Loss, Objective, fingerprint

FORMAT = "mkf.elimination"
VERSION = 1
SAVE_EVERY = 1.0
"""Seconds between two writes within a step; every step is written when it ends."""

SAME = 1e-3
"""Difference of losses that rounding can make, on a GPU or with a shuffled loader."""


class Step(NamedTuple):
    """A point of the curve.

    Attributes:
        keys: How many keys are left.
        loss: The objective's loss with them.
        removed: The name of the candidate whose removal led here; None for all candidates.
    """

    keys: int
    loss: float
    removed: str | None


@dataclass(frozen=True, eq=False)
class Elimination:
    """What `eliminate` found.

    Attributes:
        keys: The keys that are left, in the order of the candidates, with their names.
        curve: The loss with all candidates, then after each removal, down to one key.
        elbow: The number of keys at the curve's elbow; see `elbow`.
        candidates: What it began with.
        objective: What was measured, in words.
    """

    keys: KeySet
    curve: tuple[Step, ...]
    elbow: int
    candidates: KeySet
    objective: str

    def at(self, k: int) -> KeySet:
        """The k keys that were left when there were k.

        Raises:
            ValueError: k is not 1 to the number of candidates.
        """
        count = len(self.candidates)
        if not 1 <= k <= count:
            raise ValueError(f"k={k}: there were {count} candidates, so ask for 1 to {count} keys")
        gone = {step.removed for step in self.curve[: count - k + 1]}
        left = self.candidates[[i for i, name in enumerate(self.candidates.names) if name not in gone]]
        source = f"; candidates: {left.provenance}" if left.provenance else ""
        told = f"greedy elimination from {count} candidates to {k} by {self.objective}{source}"
        return KeySet(left.filters, left.names, left.kinds, told, left.licence)


def eliminate(
    candidates: KeySet | Tensor,
    k: int | None = 8,
    objective: Objective | None = None,
    *,
    state: str | os.PathLike[str] | None = None,
    allow_test: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Elimination:
    """Give up candidates one at a time, always the one without which the objective is best, until k are left.

    This follows Algorithm 1 of "The Quest for Universal Master Key Filters in DS-CNNs" (NeurIPS 2025): each remaining
    candidate is left out in turn, the filters are refitted to the others and judged, and one candidate goes for good.
    The paper gives up the one whose removal changes accuracy least; here it is the one without which the objective is
    best, because a key whose removal helps is no loss. All correlations of filters and candidates are computed once;
    without a key only the filters that had it change theirs. The paper judges by accuracy (`Accuracy`); `Residual` and
    `OutputError` are ours. Where two candidates are missed equally, the one that stands first goes.

    The search goes on to a single key whatever k is, so that the curve shows its elbow. On few images the curve is
    optimistic, as each of its points is the best of up to K - 1 noisy measurements: test the keys on other images.

    Args:
        candidates: K different filters, for example `autoencoder(...).candidates(50)`: a `KeySet`, or (K, k, k) of
            which one can be made.
        k: How many keys to keep, 1 to K; None for the curve's elbow.
        objective: `Residual(filters)`, `OutputError(model, batches, split=)` or `Accuracy(model, loader, split=)`.
        state: A JSON file that holds what is done so far: written (atomically) after every step, and within a step that
            takes long every second. If it is there already, the search goes on from it.
        allow_test: Also accept an objective on images of a test set. Keys chosen so must not be tested on that set.
        progress: Called as `progress(done, total)`, in candidates left out and judged.

    Raises:
        ValueError: No objective, k out of 1 to K, an objective on a test set, candidates of another size than the
            filters, or a state that is a folder, damaged or of another search.
        OSError: The state file cannot be read or written.
    """
    candidates = candidates if isinstance(candidates, KeySet) else KeySet(candidates)
    count = len(candidates)
    if objective is None or isinstance(objective, str):
        raise ValueError("say what keys are judged by: objective=mkf.search.Residual(filters), OutputError or Accuracy")
    if k is not None and not 1 <= k <= count:
        raise ValueError(f"k={k}: there are {count} candidates, so ask for 1 to {count} keys")
    if objective.split == "test" and not allow_test:
        raise ValueError(
            "the objective's images are of a test set, so the keys would be chosen by what they are tested on: use a "
            "split of the training set, or pass allow_test=True if that is what you want"
        )
    judge = objective.begin(candidates)
    search = _Search(judge, count, None if state is None else _State(Path(state), candidates, objective))
    removed, losses = search.run(progress)
    names = [None, *(candidates.names[i] for i in removed)]
    curve = tuple(Step(count - i, loss[0], name) for i, (loss, name) in enumerate(zip(losses, names, strict=True)))
    bend = elbow({step.keys: step.loss for step in curve})
    found = Elimination(candidates, curve, bend, candidates, objective.description)
    return Elimination(found.at(k or bend), curve, bend, candidates, objective.description)


def elbow(losses: dict[int, float]) -> int:
    """The number of keys at which a falling curve bends most: where it is farthest below the chord of its ends.

    Numbers of keys and losses are scaled to 0..1 first. The rule is ours; the paper reads the elbow off its figure.

    Args:
        losses: The loss with each number of keys.

    Returns:
        The number of keys; the smallest among equals, also where the curve is level.
    """
    few, many = min(losses), max(losses)
    height = losses[few] - losses[many]
    if many == few or height <= 0:
        return few
    below = {n: 1 - (n - few) / (many - few) - (loss - losses[many]) / height for n, loss in losses.items()}
    return max(sorted(below), key=lambda n: round(below[n], 9))


class _State:
    """The file that a search can be resumed from."""

    def __init__(self, path: Path, candidates: KeySet, objective: Objective):
        self._path = path
        self._identity = {
            "format": FORMAT,
            "version": VERSION,
            "candidates": fingerprint([candidates.filters]),
            "names": list(candidates.names),
            "objective": objective.description,
            "judged": objective.fingerprint(),
        }

    def read(self) -> tuple[list[int], list[Loss], dict[int, Loss]] | None:
        """Candidates removed so far, the losses of the curve, and the losses known in the current step."""
        if not self._path.exists():
            return None
        if self._path.is_dir():
            raise ValueError(f"state={self._path}: this is a folder; name a file")
        try:
            content = json.loads(self._path.read_text())
            differs = [name for name, value in self._identity.items() if content[name] != value]
            if not differs:
                scores = {int(key): tuple(loss) for key, loss in content["without"].items()}
                return list(content["removed"]), [tuple(loss) for loss in content["losses"]], scores
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._path} is damaged or no search's state: delete it to start anew") from error
        raise ValueError(
            f"{self._path} belongs to another search ({', '.join(differs)} differ): name another file, or delete it"
        )

    def write(self, removed: list[int], losses: list[Loss], without: dict[int, Loss]) -> None:
        content: dict[str, Any] = {**self._identity, "removed": removed, "losses": losses, "without": without}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as file:
            file.write(json.dumps(content).encode())


class _Search:
    """The loop of `eliminate`."""

    def __init__(self, judge: Judge, count: int, state: _State | None):
        self._judge, self._count, self._state = judge, count, state

    def run(self, progress: Callable[[int, int], None] | None) -> tuple[list[int], list[Loss]]:
        removed, losses, without = self._resume()
        total = self._count * (self._count + 1) // 2 - 1
        while len(removed) < self._count - 1:
            left = self._count - len(removed)
            done = total - (left * (left + 1) // 2 - 1)
            saved = time.monotonic()
            for key, loss in self._judge.losses_without(without):
                without[key] = loss
                if progress is not None:
                    progress(done + len(without), total)
                if self._state and time.monotonic() - saved > SAVE_EVERY:
                    self._state.write(removed, losses, without)
                    saved = time.monotonic()
            loss, key = min((loss, key) for key, loss in without.items())
            self._judge.drop(key)
            removed.append(key)
            losses.append(loss)
            without = {}
            if self._state:
                self._state.write(removed, losses, without)
        return removed, losses

    def _resume(self) -> tuple[list[int], list[Loss], dict[int, Loss]]:
        known = self._state.read() if self._state else None
        loss = self._judge.loss()
        if known is None:
            if self._state:
                self._state.write([], [loss], {})
            return [], [loss], {}
        if abs(known[1][0][0] - loss[0]) > SAME:
            raise ValueError(
                f"with all candidates the loss was {known[1][0][0]:.4f} when this search began and is {loss[0]:.4f} "
                "now: resume it with the same filters, network and images"
            )
        for key in known[0]:
            self._judge.drop(key)
        return known
