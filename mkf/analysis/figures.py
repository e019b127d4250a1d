"""Figures of keys and of the filters that are linear shifts of them, drawn with matplotlib (the extra `report`).

Every function returns a `matplotlib.figure.Figure`; `save` writes it as PNG, SVG or PDF. Filters are drawn centred,
with L2 norm 1 and the sign of their scale undone, so that a filter looks like its key; red is positive, blue negative.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch

from mkf.analysis.statistics import QUANTILES, key_labels
from mkf.ops.affine_fit import affine_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mkf.analysis.statistics import Analysis, ModelStatistics
    from mkf.keys import KeySet

Array = np.ndarray[Any, np.dtype[Any]]
P = ParamSpec("P")
R = TypeVar("R")

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names are drawn as they are, dollar signs too
}

_COLOURS = ("#1f4e79", "#2a9d8f", "#6aaed6", "#94d2bd", "#d1495b", "#f4a261", "#7d5ba6", "#c9c9c9")
"""One colour per published key: blue and green the first differences along y and x, warm the two derivatives."""

_COLOURS_ON_DARK = ("#4f8fd0", "#2fae9f", "#8cc4f0", "#a5e0d4", "#e5647b", "#f6ae70", "#a283d0", "#7d858d")

_LIMIT = 0.6
"""Colours saturate at this tap value of a centred filter of norm 1, so that flat filters keep their shape visible."""

_PIXELS: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -_LIMIT, "vmax": _LIMIT, "interpolation": "nearest"}
_FRAME: dict[str, Any] = {"linewidth": 0.4, "color": "0.6"}


def _drawn(function: Callable[P, R]) -> Callable[P, R]:
    """Draw in the house's style, and say how to install matplotlib where it is missing."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'mkf[report]'") from error
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return wrapper


@_drawn
def keys_row(keys: KeySet) -> Figure:
    """The keys side by side, eight to a row, each under its number and over its kind or name.

    Args:
        keys: K keys of k x k.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = min(len(keys), 8)
    rows = -(-len(keys) // columns)
    figure = _figure(0.95 * columns, 1.45 * rows)
    for panel, (key, name) in enumerate(zip(keys.centred().numpy(), key_labels(keys), strict=True)):
        axes = figure.add_subplot(rows, columns, panel + 1)
        _image(axes, key)
        axes.set_title(str(panel + 1), fontweight="bold", pad=3)
        axes.set_xlabel(fill(name, 14), fontsize=6.5, labelpad=3)
    return figure


@_drawn
def keys_rows(sets: Mapping[str, KeySet]) -> Figure:
    """Key sets under each other, the first key of one under the first of the other.

    Args:
        sets: Key sets by name, drawn from top to bottom in the order of their keys.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = max(len(keys) for keys in sets.values())
    figure = _figure(0.8 * columns + 0.9, 0.85 * len(sets))
    grid = figure.add_gridspec(len(sets), columns + 1, width_ratios=[1.1, *([1] * columns)])
    for row, (name, keys) in enumerate(sets.items()):
        label = figure.add_subplot(grid[row, 0])
        label.axis("off")
        label.text(0.0, 0.5, fill(name, 14), fontsize=7.5, va="center")
        for column, key in enumerate(keys.centred().numpy()):
            _image(figure.add_subplot(grid[row, column + 1]), key)
    return figure


@_drawn
def atlas(filters: torch.Tensor, keys: KeySet, *, columns: int = 10) -> Figure:
    """Each key in a row with filters that are linear shifts of it, from well fitted to badly fitted.

    The filters shown stand at equally spaced quantiles of the residual among the key's filters, so a row is a fair
    picture, not a choice of the best. The residual is printed under each.

    Args:
        filters: Filters to choose from, float (N, k, k); constant and non-finite ones are not drawn.
        keys: K keys of k x k.
        columns: How many filters to a key, at most.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    filters = filters.detach().cpu()
    fit = affine_fit(filters, keys)
    index, scale, residual = fit.index.numpy(), fit.scale.numpy(), fit.residual.numpy()
    # All of it stands in a single panel, measured in inches: one for each filter takes minutes with many keys.
    side, step, left, top, of_filters = 0.54, (0.62, 0.78), 1.03, 0.18, 1.73
    width, height = of_filters + step[0] * columns, top + step[1] * len(keys)
    figure = _figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(left, top - 0.06, "key", fontsize=7.5)
    axes.text(of_filters, top - 0.06, "filters, from well to badly fitted; below each its residual", fontsize=7.5)
    for row, (key, name) in enumerate(zip(keys.centred().numpy(), key_labels(keys), strict=True)):
        y = top + step[1] * row
        axes.text(0.03, y + side / 2, str(row + 1), fontsize=11, fontweight="bold", va="center")
        axes.text(0.23, y + side / 2, fill(name, 14), fontsize=7, va="center", linespacing=1.2)
        _place(axes, key, left, y, side)
        of_key = np.flatnonzero((index == row) & (scale != 0))
        of_key = of_key[np.argsort(residual[of_key], kind="stable")]
        shown = min(columns, len(of_key))
        ranks = (np.arange(shown) + 0.5) / max(shown, 1) * len(of_key)
        for column, number in enumerate(of_key[ranks.astype(int)]):
            x = of_filters + step[0] * column
            _place(axes, _as_key(filters[number].double().numpy(), float(scale[number])), x, y, side)
            label = f"{residual[number]:.2f}".removeprefix("0")
            axes.text(x + side / 2, y + side + 0.03, label, fontsize=6.5, ha="center", va="top")
    return figure


@_drawn
def shares_over_depth(analysis: Analysis) -> Figure:
    """For each model the share of every key in each layer, over normalised depth, stacked in the order of the keys.

    Args:
        analysis: What `analyze` returned, with at least one live filter. Layers without one leave a gap.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    models = [model for model in analysis.models if model.tally.live]
    columns = min(len(models), 3)
    rows = -(-len(models) // columns)
    figure = _figure(max(4.2, 2.55 * columns), 1.6 * rows + 0.7)
    colours = key_colours(len(analysis.keys))
    for panel, model in enumerate(models):
        axes = figure.add_subplot(rows, columns, panel + 1)
        _stack(axes, model, colours)
        axes.set_title(model.model, loc="left", pad=3)
        if panel % columns == 0:
            axes.set_ylabel("share of filters, %")
        else:
            axes.set_yticklabels([])
        if panel + columns >= len(models):
            axes.set_xlabel("normalised depth")
        else:
            axes.set_xticklabels([])
    if len(analysis.keys) <= len(_COLOURS):
        _legend(figure, analysis.keys, colours, columns=4 if columns == 3 else 2)
    return figure


@_drawn
def residual_boxes(analysis: Analysis) -> Figure:
    """The residuals of each key's filters, of all filters, and of the same filters with random keys, as box plots.

    Boxes hold the middle half, whiskers reach from 5 % to 95 %, the line is the median and the dot the mean.

    Args:
        analysis: What `analyze` returned, with at least one live filter. Keys without one leave a gap.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    total, control = analysis.key_residuals.over_groups(), analysis.control_residuals.over_groups().over_keys()
    labels = [f"{number} {label}" for number, label in enumerate(key_labels(analysis.keys), 1)]
    rows = [(label, total, key) for key, label in enumerate(labels)]
    rows += [("all keys", total.over_keys(), 0), (f"{len(analysis.control)} random keys", control, 0)]
    figure = _figure(6.0, 0.24 * len(rows) + 0.5)
    axes = figure.add_subplot()
    colours = [*key_colours(len(analysis.keys)), "0.75", "0.75"]
    names = ("whislo", "q1", "med", "q3", "whishi")
    for place, ((_, statistics, key), colour) in enumerate(zip(rows, colours, strict=True)):
        if statistics.count[0, key]:
            box = dict(zip(names, statistics.quantile(QUANTILES)[:, 0, key], strict=True))
            axes.bxp(
                [box | {"mean": statistics.mean[0, key]}],
                positions=[place], orientation="horizontal", widths=0.65, showfliers=False, showmeans=True,
                patch_artist=True, boxprops={"facecolor": colour, "linewidth": 0.5}, capprops={"linewidth": 0},
                whiskerprops={"linewidth": 0.7}, medianprops={"color": "black", "linewidth": 1.1},
                meanprops={"marker": ".", "markersize": 4, "markerfacecolor": "black", "markeredgecolor": "none"},
            )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="residual")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@_drawn
def bars(panels: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """Horizontal bars, one panel under the other, each with its value behind it.

    Args:
        panels: Title of each panel and its values by name, drawn from top to bottom.
        label: What a value is, under the last panel.
    """
    rows = [len(values) for values in panels.values()]
    figure = _figure(6.0, 0.24 * sum(rows) + 0.45 * len(rows))
    for axes, (title, values) in zip(
        figure.subplots(len(rows), squeeze=False, height_ratios=rows)[:, 0], panels.items(), strict=True
    ):
        drawn = axes.barh(list(values), list(values.values()), color=_COLOURS[0], height=0.7)
        axes.bar_label(drawn, fmt="{:.3g}", padding=2, fontsize=7)
        axes.set_title(title, loc="left", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    return figure


@_drawn
def code_axis(candidates: KeySet, histogram: Array) -> Figure:
    """What an autoencoder's one-dimensional code stands for: decoded filters along it, over how many have each code.

    Args:
        candidates: The filters of uniform codes, in ascending order, named by their codes.
        histogram: (bins,) filters by their code, in equal bins over [0, 1].

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = min(len(candidates), 10)
    rows = -(-len(candidates) // columns)
    figure = _figure(0.7 * columns, 0.85 * rows + 1.2)
    grid = figure.add_gridspec(2, 1, height_ratios=(0.85 * rows, 1.2))
    above = figure.add_subfigure(grid[0])
    for panel, (filter_, name) in enumerate(zip(candidates.centred().numpy(), candidates.names, strict=True)):
        axes = above.add_subplot(rows, columns, panel + 1)
        _image(axes, filter_)
        axes.set_xlabel(name, fontsize=6.5, labelpad=1.5)
    axes = figure.add_subplot(grid[1])
    bins = len(histogram)
    axes.bar((np.arange(bins) + 0.5) / bins, histogram, 1 / bins, color=_COLOURS[0], edgecolor="white", linewidth=0.3)
    axes.set(xlim=(0, 1), xlabel="code", ylabel="filters")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@_drawn
def elimination(losses: Mapping[int, float], label: str, chosen: int, elbow: int) -> Figure:
    """The loss over the number of keys that are left.

    Args:
        losses: The loss with each number of keys.
        label: What the loss is.
        chosen: The number of keys that were kept.
        elbow: The number at the curve's elbow.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(4.6, 2.6)
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), color=_COLOURS[0], marker=".", markersize=4, linewidth=1)
    for count, word, colour in ((chosen, "kept", _COLOURS[4]), (elbow, "elbow", "0.5")):
        axes.axvline(count, color=colour, linewidth=0.8, linestyle="--", label=f"{word}: {count}")
    axes.set(xlabel="keys left", ylabel=fill(label, 40))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@_drawn
def save(figure: Figure, path: Path) -> Path:
    """Write a figure; the suffix of the path names the format: `.png` (200 dpi), `.svg` or `.pdf`.

    Args:
        figure: What a function of this module returned.
        path: The file to write.

    Returns:
        The path.

    Raises:
        ValueError: matplotlib knows no format of that suffix.
        OSError: The file cannot be written.
    """
    figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.04, facecolor="white")
    return path


@_drawn
def check(path: Path) -> None:
    """Tell whether `save` can write a figure of that name, before there is one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib knows no format of that suffix.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{path}: a figure's name must end in one of {', '.join(f'.{name}' for name in known)}")


def _figure(width: float, height: float) -> Figure:
    """An empty figure in inches. Without pyplot: no window, no global state, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _image(axes: Axes, filter_: Array) -> None:
    """A k x k filter as an image, with the same colours in every panel."""
    axes.imshow(filter_, **_PIXELS)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(**_FRAME)


def _place(axes: Axes, filter_: Array, x: float, y: float, side: float) -> None:
    """The same within a panel whose y axis points down, at its upper left corner."""
    from matplotlib.patches import Rectangle

    axes.imshow(filter_, extent=(x, x + side, y + side, y), aspect="auto", **_PIXELS)
    axes.add_patch(Rectangle((x, y), side, side, fill=False, **_FRAME))


def _as_key(filter_: Array, scale: float) -> Array:
    """The filter centred, with norm 1 and the sign of its scale undone."""
    centred = filter_ - filter_.mean()
    shown: Array = np.sign(scale) * centred / np.linalg.norm(centred)
    return shown


def _stack(axes: Axes, model: ModelStatistics, colours: list[Any]) -> None:
    """Stacked bars, one per layer, as wide as the smallest distance between two layers."""
    layers = [layer for layer in model.layers if layer.tally.live]
    depth = np.array([layer.normalised_depth for layer in layers])
    gaps = np.diff(np.unique(depth))
    width = float(gaps.min()) if len(gaps) else 0.2
    # Filled steps, broken by NaN after each layer: one artist per key, since a bar each makes large banks slow to draw.
    x = np.stack([depth - width / 2, depth + width / 2, np.full_like(depth, np.nan)], axis=1).ravel()
    edges = 100 * np.cumsum([[0, *layer.tally.shares] for layer in layers], axis=1)
    for key, colour in enumerate(colours):
        bottom, top = np.repeat(edges[:, key : key + 2], 3, axis=0).T
        axes.fill_between(x, bottom, top, color=colour, linewidth=0.3, edgecolor="white")
    axes.set(xlim=(-width / 2, 1 + width / 2), ylim=(0, 100), xticks=[0, 0.5, 1], yticks=[0, 50, 100])
    axes.spines[["top", "right"]].set_visible(False)


def key_colours(number: int, dark: bool = False) -> list[str]:
    """A colour `#rrggbb` for each of so many keys, on white or on dark: a palette of eight, else evenly spaced hues."""
    palette = _COLOURS_ON_DARK if dark else _COLOURS
    if number <= len(palette):
        return list(palette[:number])
    rgb = [colorsys.hls_to_rgb(hue / number, 0.6 if dark else 0.48, 0.55) for hue in range(number)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in rgb]


def _legend(figure: Figure, keys: KeySet, colours: list[Any], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=colour, label=f"{number} {name}")
        for number, (name, colour) in enumerate(zip(key_labels(keys), colours, strict=True), 1)
    ]

    figure.legend(loc="outside lower center", handles=handles, ncols=columns, frameon=False, fontsize=7, handlelength=1)
