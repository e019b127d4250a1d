"""The paper's way from an autoencoder to its keys: eliminate, look again around the best, and eliminate once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mkf.ops.arguments import MAX_KEYS
from mkf.search.autoencoder import NEIGHBOURS, Autoencoder, with_neighbours
from mkf.search.clusters import check_count
from mkf.search.eliminate import Elimination, eliminate
from mkf.search.objectives import Objective

CANDIDATES = 50
FIRST_ROUND = 10
"""Keys that go on to the second round, as in the paper."""


def two_rounds(
    coder: Autoencoder,
    k: int,
    objective: Objective,
    *,
    candidates: int = CANDIDATES,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Elimination, Elimination]:
    """Eliminate from uniform codes to 10 keys, then from these and their neighbours on the code axis to k.

    Args:
        coder: Whose codes are decoded.
        k: How many keys to end with; if more than 10, as many leave the first round.
        objective: What keys are judged by; see `eliminate`.
        candidates: Uniform codes that the first round begins with.
        state: A folder for `first-round.json` and `elimination.json`, from which a search that was killed goes on.
        progress: Called as `eliminate` does, in each round anew.

    Returns:
        Both rounds; the keys are those of the second.

    Raises:
        ValueError: What `check_rounds` refuses, before anything is done, and what `eliminate` does.
        OSError: The state cannot be read or written.
    """
    check_rounds(k, candidates)
    first_file, second_file = (state and state / name for name in ("first-round.json", "elimination.json"))
    pool = coder.candidates(candidates)
    first = eliminate(pool, _best(k, candidates), objective, state=first_file, progress=progress)
    second = eliminate(coder.around(first.keys), k, objective, state=second_file, progress=progress)
    return first, second


def check_rounds(k: int, candidates: int = CANDIDATES) -> None:
    """Refuse numbers of keys and candidates with which a round could not begin; needs no autoencoder.

    Raises:
        ValueError: More than 256 candidates, fewer than keys, or so many keys that with their neighbours they may be
            more than 256 candidates of the second round.
    """
    check_count(candidates)
    if not 1 <= k <= candidates:
        raise ValueError(f"k={k}: there are {candidates} candidates, so ask for 1 to {candidates} keys")
    best = _best(k, candidates)
    # Which are the best is not known yet: they have no more neighbours than each its own, and than all together.
    of_all = with_neighbours(i / candidates for i in range(1, candidates + 1))
    most = min(best * (1 + NEIGHBOURS), len(of_all))
    if most > MAX_KEYS:
        raise ValueError(
            f"k={k}: with the neighbours of the {best} best the second round would have up to {most} candidates, and "
            f"{MAX_KEYS} are the most: ask for 1 to {MAX_KEYS // (1 + NEIGHBOURS)} keys, or eliminate in one round"
        )


def _best(k: int, candidates: int) -> int:
    """How many leave the first round."""
    return min(max(k, FIRST_ROUND), candidates)
