"""An analysis as one HTML page that needs no network: tables, figures, and an atlas of filters to browse."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mkf import __version__
from mkf.analysis.figures import key_colours
from mkf.analysis.identification import Identification
from mkf.analysis.natural import NaturalKeys, Reconstruction
from mkf.analysis.page import sections
from mkf.analysis.page.data import atlas_size, script_data
from mkf.analysis.page.fits import MOST_FILTERS, fits_file
from mkf.analysis.page.text import whole

if TYPE_CHECKING:
    from mkf.analysis.statistics import Analysis
    from mkf.bank import FilterBank

__all__ = ["atlas_size", "render"]

_HERE = Path(__file__).parent


def render(
    analysis: Analysis,
    found: Identification | None = None,
    natural: tuple[NaturalKeys, Reconstruction] | None = None,
    title: str = "",
    bank: FilterBank | None = None,
) -> str:
    """The page of an analysis, as the text of one HTML file.

    It opens from a disk, in light and dark, on a phone, and asks nothing of any network: style, script, numbers,
    pictures and downloads are in it. The atlas shows the samples of the layers, each filter centred, of norm 1, with
    the sign of its scale undone, and rounded to 8 bits.

    Args:
        analysis: What `analyze` returned, best with `atlas=atlas_size(...)`.
        found: What the same filters are, as `identify` tells; without it that section is left out.
        natural: Keys of natural images and an image rebuilt from them; without it that section is left out.
        title: The heading; made of the models' names if empty.
        bank: What was analyzed, whose fits are then among the downloads (`fits.safetensors`, described by `fits_file`)
            if it has at most 100 000 filters of the keys' size; without it they are left out.
    """
    title = title or _title(analysis.trained)
    parts = {
        "keys": ("The keys", sections.keys(analysis.trained)),
        "shares": ("Which keys", sections.shares(analysis)),
        "depth": ("Over depth", sections.depth(analysis)),
        "residuals": ("How close", sections.residuals(analysis.trained)),
        "atlas": ("Atlas", sections.atlas(analysis)),
    }
    if found is not None:
        parts["kinds"] = ("What they are", sections.kinds(found))
    if natural is not None:
        parts["natural"] = ("Natural images", sections.natural(analysis, *natural))
    parts["numbers"] = ("Numbers", sections.numbers(analysis, *_fits(analysis, bank)))
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, (heading, _) in parts.items())
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, (heading, content) in parts.items()
    )
    data = json.dumps(
        script_data(analysis, found, natural[0] if natural else None), separators=(",", ":"), allow_nan=False
    ).replace("<", "\\u003c")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="mkf">
<link rel="icon" href="data:,">
<title>{escape(title)} · master key filters</title>
<style>{(_HERE / "style.css").read_text("utf-8")}{_colour_rules(len(analysis.keys))}</style>
<script>document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
</script>
</head>
<body>
<nav><div>{links}<button id="theme" type="button" aria-label="Switch between light and dark">◐</button></div></nav>
<header class="top">
<p class="eyebrow">Master key filters</p>
<h1>{escape(title)}</h1>
{sections.summary(analysis.trained)}{sections.left_out(analysis)}
</header>
<main>
<noscript><p><b>The pictures of filters and the atlas are drawn by a script, which this browser does not run.</b></p>
</noscript>
{body}
</main>
<footer>Made by mkf {__version__} from {whole(analysis.tally.filters)} filters.
Keys: {escape(analysis.keys.provenance or "given")}.
This page is one file and loads nothing.</footer>
<script type="application/json" id="data">{data}</script>
<script>{(_HERE / "page.js").read_text("utf-8")}</script>
</body>
</html>
"""


def _fits(analysis: Analysis, bank: FilterBank | None) -> tuple[bytes, str]:
    """The file of fits, empty where there is none, and what to say about it."""
    if bank is None:
        return b"", ""
    if analysis.tally.filters > MOST_FILTERS:
        return b"", f"The fits of {whole(analysis.tally.filters)} filters are not in this page: mkf fit writes them."
    said = "In fits.safetensors: index (of the key, from 0), scale, shift, residual, layer and channel of every filter."
    return fits_file(bank.select(k=analysis.keys.kernel_size), analysis.keys), said


def _title(analysis: Analysis) -> str:
    names = [model.model for model in analysis.models]
    return " and ".join(names) if len(names) <= 2 else f"{len(names)} networks and {len(analysis.keys)} keys"


def _colour_rules(keys: int) -> str:
    """`--c` of the class of each key, on light and on dark."""
    light, dark = key_colours(keys), key_colours(keys, dark=True)
    rules = [f".k{number}{{--c:{colour}}}" for number, colour in enumerate(light, 1)]
    rules += [f'[data-theme="dark"] .k{number}{{--c:{colour}}}' for number, colour in enumerate(dark, 1)]
    return "".join([*rules, ".kall{--c:#9aa3ab}"])
