"""Keys by a word of the command line."""

from pathlib import Path

from mkf.keys.gaussian import SCALES, analytic
from mkf.keys.key_set import KeySet
from mkf.keys.published import paper8


def parse(spec: str) -> KeySet:
    """The keys that `paper8`, `analytic:METHOD` or the path of a key file stands for.

    Raises:
        ValueError: None of these, a method that does not exist, or a damaged file.
        OSError: The file cannot be read.
    """
    name, _, method = spec.partition(":")
    if spec == "paper8":
        return paper8()
    if name == "analytic":
        return analytic(method)
    if Path(spec).is_file():
        return KeySet.load(spec)
    raise ValueError(
        f"no keys called {spec!r}: give paper8, analytic:METHOD with METHOD one of {', '.join(SCALES)}, or a key file"
    )
