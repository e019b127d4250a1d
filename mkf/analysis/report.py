"""An analysis for people and programs: tables for a terminal, JSON, CSV and figures in a folder."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mkf._files import replacing
from mkf.analysis.counting import DUPLICATES_WITHIN
from mkf.analysis.similarity import DUPLICATE
from mkf.analysis.statistics import QUANTILES, Analysis, Tally, key_labels

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_KEY_COLUMNS = 8
"""With more keys than this a table names the most frequent ones instead of giving each a column."""

_NAMED = 5
"""How many non-finite filters the notes name; the JSON file names all."""

_QUARTILES = [QUANTILES.index(level) for level in (0.25, 0.5, 0.75)]


def model_table(analysis: Analysis) -> Table:
    """One row per model: filters, layers, dead ones, each key's share in per cent, mean |correlation|, residuals."""
    table = _table("Share of each key, % of live filters")
    _columns(table, analysis, before=("model", "filters", "layers", "dead"), after=("|corr|", "resid", "random"))

    def row(name: str, layers: int, tally: Tally) -> None:
        counted = (str(tally.filters), str(layers), str(tally.dead))
        _, median, _, control = _residuals(tally)
        table.add_row(_as_it_is(name), *counted, *_shares(tally), _decimal(tally.mean_correlation), median, control)

    for model in analysis.models:
        row(model.model, len(model.layers), model.tally)
    if len(analysis.models) > 1:
        table.add_section()
        row("all", sum(len(model.layers) for model in analysis.models), analysis.tally)
    return table


def layer_tables(analysis: Analysis) -> list[Table]:
    """For each model one row per layer: how many filters go to each key, and residuals."""
    tables = []
    for model in analysis.models:
        table = _table(f"{model.model}: filters of each key")
        _columns(table, analysis, before=("layer", "filters", "dead"), after=("25%", "50%", "75%", "random"))
        for layer in model.layers:
            tally = layer.tally
            counted = (str(tally.filters), str(tally.dead))
            table.add_row(_as_it_is(layer.layer), *counted, *_counts(tally), *_residuals(tally))
        tables.append(table)
    return tables


def notes(analysis: Analysis) -> list[str]:
    """Sentences that belong under the tables: which keys, what was left out or broken, and how to read the figures."""
    keys, size = analysis.keys, f"{analysis.keys.kernel_size}x{analysis.keys.kernel_size}"
    models, layers = len(analysis.models), sum(len(model.layers) for model in analysis.models)
    counted = f"{_plural(analysis.tally.filters, 'filter')} of {size}"
    lines = [f"{counted} in {_plural(layers, 'layer')} of {_plural(models, 'model')}."]
    lines.append(f"Keys: {keys.provenance or len(keys)}.")
    labelled = [f"{number} {label}" for number, label in enumerate(key_labels(keys), 1) if label != str(number)]
    if labelled and len(keys) <= _KEY_COLUMNS:
        lines.append("; ".join(labelled) + ".")
    for k, number in analysis.left_out.items():
        lines.append(f"Left out: {_plural(number, 'filter')} of {k}x{k}, because the keys are {size}.")
    if broken := analysis.non_finite:
        named = "; ".join(f"{model} {layer} channel {channel}" for model, layer, channel in broken[:_NAMED])
        more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        lines.append(f"Not finite, counted under no key: {_plural(len(broken), 'filter')} ({named}{more}).")
    dimension, taps = analysis.effective_dimension, analysis.keys.kernel_size**2
    alike = f"not counted, as a layer has more than {DUPLICATES_WITHIN:,} filters"
    if analysis.tally.duplicates is not None:
        alike = _plural(analysis.tally.duplicates, "filter")
    lines.append(
        f"Effective dimension (participation ratio): {dimension:.1f} of {taps - 1}. Near-duplicates of an earlier "
        f"filter of their layer (|correlation| >= {DUPLICATE}): {alike}."
    )
    control = f" ({analysis.control.provenance})" if analysis.control.provenance else ""
    lines.append(
        "Every filter is counted under the key of largest |correlation|, whose mean is |corr|; resid is the median "
        "(25%, 50%, 75%: quartiles) of the part of a filter's norm about its mean that scale * key + shift leaves "
        "over, 0 for a linear shift of the key and 1 for nothing in common; random is its median with "
        f"{_plural(len(analysis.control), 'random key')}{control}; white-noise filters reach a |corr| of "
        f"{_decimal(analysis.noise_correlation)} with these keys by chance."
    )
    return lines


def write(analysis: Analysis, out: Path) -> list[Path]:
    """Write `analysis.json` and the CSV files of `tables` into a folder, which is made if need be.

    Args:
        analysis: What `analyze` returned.
        out: The folder.

    Returns:
        The files written. `Analysis.to_dict` documents the JSON; the CSV files hold the same numbers, with empty cells
        where there is nothing to measure.

    Raises:
        OSError: The folder cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    document = analysis.to_dict()
    files = {"analysis.json": json.dumps(document, indent=1, allow_nan=False) + "\n"}
    files |= {f"{name}.csv": as_csv(rows) for name, rows in tables(analysis).items()}
    for name, text in files.items():
        with replacing(out / name) as file:
            file.write(text.encode())
    return [out / name for name in files]


def tables(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """The numbers of `Analysis.to_dict` as rows of equal columns: `models`, `layers`, `families` and `keys`.

    In `keys` every row is a key with the residuals of its filters; the last, `random`, is all random keys together.
    Families are left out where there are none, which is where no filter is live.
    """
    document = analysis.to_dict()
    layer_names = ("layer", "depth", "normalised_depth")
    keys = []
    for name, kind, entry in zip(
        [*analysis.keys.names, "random"],
        [*analysis.keys.kinds, f"{len(analysis.control)} random keys"],
        [*document["key_residuals"], document["control_residuals"]],
        strict=True,
    ):
        levels = {_level("residual", level): x for level, x in zip(QUANTILES, entry["quantiles"], strict=True)}
        keys.append({"key": name, "kind": kind, **{x: entry[x] for x in ("filters", "mean", "std")}, **levels})
    rows = {
        "models": [
            {"model": model["model"], **_flat(model), "effective_dimension": model["effective_dimension"]}
            for model in document["models"]
        ],
        "layers": [
            {"model": model["model"], **{name: layer[name] for name in layer_names}, **_flat(layer)}
            for model in document["models"]
            for layer in model["layers"]
        ],
        "families": [
            {
                "family": family["family"],
                "models": len(family["models"]),
                **_flat(family),
                "distance": family["distance"],
            }
            for family in document["families"]
        ],
        "keys": keys,
    }
    return {name: table for name, table in rows.items() if table}


def write_figures(analysis: Analysis, out: Path, suffix: str = ".png") -> list[Path]:
    """Draw the keys, the atlas of filters, the share of keys over depth and their residuals into a folder.

    Args:
        analysis: What `analyze` returned.
        out: The folder, which exists.
        suffix: `.png`, `.svg` or `.pdf`.

    Returns:
        The files written: `keys`, `atlas`, `depth` and `residuals`; only `keys` where no filter is live.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
        OSError: The folder cannot be written.
    """
    from mkf.analysis import figures

    drawings = {"keys": figures.keys_row(analysis.keys)}
    if analysis.tally.live:
        drawings["atlas"] = figures.atlas(torch.from_numpy(analysis.sample.filters), analysis.keys)
        drawings["depth"] = figures.shares_over_depth(analysis)
        drawings["residuals"] = figures.residual_boxes(analysis)
    return [figures.save(figure, out / f"{name}{suffix}") for name, figure in drawings.items()]


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    heading = _as_it_is(title, "bold")
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)


def _as_it_is(name: str, style: str = "") -> Text:
    """A name for a table, in which brackets and colons are no markup."""
    from rich.text import Text

    return Text(name, style)


def _columns(table: Table, analysis: Analysis, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """A column of names, which may fold, then columns of numbers: the keys' stand between `before` and `after`."""
    table.add_column(before[0], overflow="fold", min_width=10)
    keys = [str(number + 1) for number in range(len(analysis.keys))]
    for heading in (*before[1:], *(keys if len(keys) <= _KEY_COLUMNS else ["most frequent"]), *after):
        table.add_column(heading, justify="right", no_wrap=True, min_width=2)


def _residuals(tally: Tally) -> list[str]:
    """The quartiles of the residual, and its median with random keys."""
    quartiles = tally.residual_quantiles[_QUARTILES]
    return [*map(_decimal, quartiles), _decimal(tally.control_quantiles[QUANTILES.index(0.5)])]


def _shares(tally: Tally) -> list[str]:
    """A cell for each key, or one cell that names the most frequent."""
    if len(tally.counts) <= _KEY_COLUMNS:
        return [_percent(share) for share in tally.shares]
    return [" ".join(f"{key + 1}:{_percent(tally.shares[key])}" for key in _most_frequent(tally))]


def _counts(tally: Tally) -> list[str]:
    if len(tally.counts) <= _KEY_COLUMNS:
        return [str(count) for count in tally.counts]
    return [" ".join(f"{key + 1}:{tally.counts[key]}" for key in _most_frequent(tally))]


def _most_frequent(tally: Tally) -> list[int]:
    order = (-tally.counts).argsort(kind="stable")[:4]
    return [int(key) for key in order if tally.counts[key]]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def _decimal(value: float) -> str:
    """Two decimals without the leading zero, as correlations are printed."""
    return "-" if math.isnan(value) else f"{value:.2f}".removeprefix("0")


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """A tally's dictionary with one CSV column per key and per quantile."""
    flat = {name: entry[name] for name in ("filters", "dead", "non_finite", "duplicates")}
    flat |= {f"key_{number}": count for number, count in enumerate(entry["counts"], 1)}
    flat |= {name: entry[name] for name in ("positive_share", "mean_correlation")}
    for name in ("residual", "control_residual"):
        for level, value in zip(QUANTILES, entry[f"{name}_quantiles"], strict=True):
            flat[_level(name, level)] = value
    return flat


def _level(name: str, level: float) -> str:
    return f"{name}_q{round(100 * level):02d}"


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of equal columns, at least one, as the text of a CSV file."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
