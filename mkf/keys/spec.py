"""Keys by a word of the command line."""

from pathlib import Path

from mkf.keys.gaussian import SCALES, analytic
from mkf.keys.key_set import KeySet
from mkf.keys.published import paper8


def parse(spec: str) -> KeySet:
    """The keys that a word stands for: `paper8`, `analytic:METHOD`, `analytic:METHOD:k` or the path of a key file.

    `analytic:B` is 7x7, `analytic:B:3` the same keys cut to 3x3. A key file is what `KeySet.load` reads.

    Raises:
        ValueError: None of these, a method that does not exist, or a damaged file.
        OSError: The file cannot be read.
    """
    name, *parts = spec.split(":")
    if spec == "paper8":
        return paper8()
    if name == "analytic" and len(parts) in (1, 2) and all(part.isdigit() for part in parts[1:]):
        return analytic(parts[0], *(int(part) for part in parts[1:]))
    if Path(spec).is_file():
        return KeySet.load(spec)
    raise ValueError(
        f"no keys called {spec!r}: give paper8, analytic:METHOD or analytic:METHOD:k with METHOD one of "
        f"{', '.join(SCALES)} and k their size, or the path of a key file"
    )
