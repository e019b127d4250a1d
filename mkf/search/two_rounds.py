"""The paper's way from an autoencoder to its keys: eliminate, look again around the best, and eliminate once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mkf.search.autoencoder import Autoencoder
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
        ValueError: Fewer candidates than keys, and what `eliminate` refuses.
        OSError: The state cannot be read or written.
    """
    if k > candidates:
        raise ValueError(f"k={k}: there are {candidates} candidates, so ask for 1 to {candidates} keys")
    first_file, second_file = (state and state / name for name in ("first-round.json", "elimination.json"))
    pool = coder.candidates(candidates)
    best = min(max(k, FIRST_ROUND), len(pool))
    first = eliminate(pool, best, objective, state=first_file, progress=progress)
    second = eliminate(coder.around(first.keys), k, objective, state=second_file, progress=progress)
    return first, second
