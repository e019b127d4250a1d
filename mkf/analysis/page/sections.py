"""The sections of the page, each as HTML."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from mkf.analysis import report
from mkf.analysis.identification import CONSTANT, NAMES, Identification, identify
from mkf.analysis.natural import NaturalKeys, Reconstruction
from mkf.analysis.page.text import base64_text, decimal, size, whole
from mkf.analysis.similarity import match
from mkf.analysis.statistics import QUANTILES, key_labels
from mkf.keys.family import KINDS

if TYPE_CHECKING:
    from mkf.analysis.statistics import Analysis, ModelStatistics, Tally
    from mkf.ops.fit_statistics import FitStatistics

_TABLE_LAYERS = 600  # beyond so many layers their table is only in the CSV file
_DOCUMENT = 1_500_000  # a longer JSON document is not put into the page


def summary(analysis: Analysis) -> str:
    """The one paragraph and the numbers that somebody in a hurry reads."""
    tally, k = analysis.tally, analysis.keys.kernel_size
    layers = sum(len(model.layers) for model in analysis.models)
    median, random = (quantiles[2] for quantiles in (tally.residual_quantiles, tally.control_quantiles))
    alike = "near-duplicates not counted"
    if tally.duplicates is not None:
        alike = f"and {whole(tally.duplicates)} near-duplicates"
    facts = [
        (whole(tally.filters), "filters", f"{k} &times; {k}, {whole(layers)} layers"),
        (whole(len(analysis.models)), "networks", f"{whole(len(analysis.families))} families"),
        (
            decimal(tally.mean_correlation),
            "mean |correlation|",
            f"chance gives {decimal(analysis.noise_correlation)}",
        ),
        (decimal(median), "median residual", f"random keys {decimal(random)}"),
        (decimal(analysis.effective_dimension, 1), "effective dimension", f"of {k * k - 1}"),
        (
            whole(tally.dead + tally.non_finite),
            "dead or not finite",
            alike,
        ),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for value, name, note in facts)
    if tally.live:
        most = int(np.argmax(tally.shares))
        sentence = (
            f"<b>{whole(tally.live)} live filters</b>, each written as <i>a · key + b</i> with the nearest of "
            f"{len(analysis.keys)} keys. Their correlation with it is <b>{decimal(tally.mean_correlation)}</b> on "
            f"average; the most frequent is key {most + 1}, {escape(key_labels(analysis.keys)[most])}, with "
            f"<b>{tally.shares[most]:.0%}</b>."
        )
    else:
        sentence = "No filter is live: all are constant or not finite."
    return f'<p class="lead">{sentence}</p><dl class="facts">{tiles}</dl>'


def left_out(analysis: Analysis) -> str:
    """What the numbers above do not count."""
    sentences = []
    if analysis.left_out:
        others = ", ".join(f"{whole(number)} of {k} &times; {k}" for k, number in analysis.left_out.items())
        sentences.append(f"Left out because the keys are of another size: {others}.")
    controls = len(analysis.models) - len(analysis.trained.models)
    if controls:
        sentences.append(
            f"Not counted here, among the keys' shares and residuals, and under <i>all</i>: {controls} untrained "
            f"network{'s' * (controls > 1)}, as controls."
        )
    return f'<p class="small">{" ".join(sentences)}</p>' if sentences else ""


def keys(analysis: Analysis) -> str:
    """The keys with their shares, kinds and scales."""
    keys, tally = analysis.keys, analysis.tally
    found = identify(keys)
    tiles = []
    for number, (label, name) in enumerate(zip(key_labels(keys), found.name, strict=True)):
        scales = f"s<sub>x</sub> {decimal(found.scale_x[number])}, s<sub>y</sub> {decimal(found.scale_y[number])}"
        meant = "" if label == name else f"<br>nearest: {escape(name)}"
        share = f"{tally.shares[number]:.1%}" if tally.live else ""
        tiles.append(
            f'<li class="k{number + 1}"><canvas data-set="keys" data-number="{number}" role="img" '
            f'aria-label="key {number + 1}"></canvas><b>{number + 1}<span>{share}</span></b>'
            f"<small>{escape(label)}{meant}<br>{scales}</small></li>"
        )
    return (
        "<p>Each is drawn centred and of norm 1; red is positive, blue negative. Under it its share of the live "
        "filters, what it is, and the scales in pixels of the nearest discrete Gaussian derivative.</p>"
        f'<ul class="tiles{" eight" if len(keys) == 8 else ""}">{"".join(tiles)}</ul>'
    )


def shares(analysis: Analysis) -> str:
    """A row for each network, then the families."""
    rows = [
        _row(model.model, model.tally, len(model.layers), model.effective_dimension, analysis)
        for model in analysis.models
    ]
    trained = analysis.trained
    if len(trained.models) > 1:
        layers = sum(len(model.layers) for model in trained.models)
        rows.append(_row("all", trained.tally, layers, trained.effective_dimension, analysis, "all"))
    heads = (
        '<th>network</th><th>share of each key</th><th class="num">filters</th><th class="num optional">layers</th>'
        '<th class="num">|corr|</th><th class="num">residual</th><th class="num optional">random</th>'
        '<th class="num optional">dimension</th><th class="num optional">dead</th>'
    )
    return (
        "<p>Every live filter is counted under the key of largest |correlation|. The residual is the median part of a "
        "filter's norm about its mean that <i>a · key + b</i> leaves over; <i>random</i> is the same with as many "
        f"random keys. <i>dimension</i> tells over how many of {analysis.keys.kernel_size**2 - 1} the filters spread "
        "(participation ratio); <i>dead</i> counts constant and not finite ones.</p>"
        f"{_legend(analysis)}<table class='shares'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        f"{_families(analysis)}"
    )


def _row(name: str, tally: Tally, layers: int, dimension: float, analysis: Analysis, css: str = "") -> str:
    residual, random = (decimal(quantiles[2]) for quantiles in (tally.residual_quantiles, tally.control_quantiles))
    numbers = (
        (whole(tally.filters), ""), (whole(layers), " optional"), (decimal(tally.mean_correlation), ""),
        (residual, ""), (random, " optional"), (decimal(dimension, 1), " optional"),
        (whole(tally.dead + tally.non_finite), " optional"),
    )  # fmt: skip
    cells = "".join(f'<td class="num{more}">{value}</td>' for value, more in numbers)
    return (
        f'<tr class="{css}"><td>{escape(name)}</td><td class="wide">{_stack(tally.shares, analysis)}</td>{cells}</tr>'
    )


def _families(analysis: Analysis) -> str:
    """Shares by family, and whether they are stable within one; nothing where every network is a family of its own."""
    families = analysis.families
    if len(families) == len(analysis.models) or len(families) < 1:
        return ""
    rows = []
    for family in families:
        shares = family.shares.mean(0)
        spread = "; ".join(
            f"key {number}: {share:.1%}" + ("" if math.isnan(std) else f" ± {std:.1%}")
            for number, (share, std) in enumerate(zip(shares, family.spread, strict=True), 1)
        )
        rows.append(
            f'<tr><td>{escape(family.family)}</td><td class="wide" title="{escape(spread)}">{_stack(shares, analysis)}'
            f'</td><td class="num">{len(family.models)}</td>'
            f'<td class="num">{decimal(100 * family.spread.max(), 1)}</td>'
            f'<td class="num">{decimal(family.distance)}</td></tr>'
        )
    within, between = analysis.family_distance
    sentence = "Mean shares over the networks of a family, their largest standard deviation in percentage points, and "
    sentence += "the mean distance of two of its networks, &Sigma;|p &minus; q| / 2."
    if not math.isnan(within + between):
        sentence += (
            f" Two networks of one family differ by {decimal(within)} on average, two of different families by "
            f"{decimal(between)}."
        )
    return (
        f"<h3>Families</h3><p>{sentence}</p><table class='shares'><thead><tr><th>family</th>"
        '<th>mean share of each key</th><th class="num">networks</th><th class="num">± points</th>'
        '<th class="num">distance</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def depth(analysis: Analysis) -> str:
    """The shares in every layer of every network."""
    figures = [
        _depth_figure(number, model)
        for number, model in enumerate(analysis.models)
        if any(layer.tally.live for layer in model.layers)
    ]
    if not figures:
        return "<p>No filter is live.</p>"
    trained = [model for model in analysis.trained.models if model.tally.live]
    if len(trained) > 1:
        parts = max(1, min(10, *(len(model.layers) for model in trained)))  # so that no part is empty
        bars = [
            (index / parts, 1 / parts, tally, f"depth {index / parts:.2f} to {(index + 1) / parts:.2f}")
            for index, tally in enumerate(analysis.trained.over_depth(parts))
        ]
        figures.insert(0, _stacked_columns("all, by normalised depth", bars))
    return (
        "<p>The share of each key in every layer, from the first layer to the last. Choose a layer to see its filters "
        f'in the atlas.</p>{_legend(analysis)}<div class="depths">{"".join(figures)}</div>'
    )


def _depth_figure(number: int, model: ModelStatistics) -> str:
    width = 1 / len(model.layers)
    columns = []
    for index, layer in enumerate(model.layers):
        top = int(np.argmax(layer.tally.counts))
        what = f"{layer.layer}: {whole(layer.tally.filters)} filters"
        if layer.tally.live:
            what += f", key {top + 1} {layer.tally.shares[top]:.0%}"
        columns.append((index * width, width, layer.tally, what))
    return _stacked_columns(model.model, columns, number)


def _stacked_columns(name: str, columns: Sequence[tuple[float, float, Tally, str]], model: int | None = None) -> str:
    """A column for each (left, width, tally, what it is) with 0 <= left < 1, as an SVG as wide as there is room."""
    keys = len(columns[0][2].counts)
    paths = [""] * keys
    targets = []
    for index, (left, width, tally, what) in enumerate(columns):
        if tally.live:
            x, w = 1000 * left, 1000 * width - min(3, 100 * width)
            edges = 100 * np.concatenate([[0], np.cumsum(tally.shares)])
            for key in range(keys):
                if tally.counts[key]:
                    bottom, top = 100 - edges[key], 100 - edges[key + 1]
                    paths[key] += f"M{x:.1f} {top:.2f}h{w:.1f}v{bottom - top:.2f}h-{w:.1f}z"
        link = "" if model is None else f' data-model="{model}" data-layer="{index}"'
        targets.append(
            f'<rect x="{1000 * left:.1f}" y="0" width="{1000 * width:.1f}" height="100"{link}>'
            f"<title>{escape(what)}</title></rect>"
        )
    drawn = "".join(f'<path class="k{key + 1}" d="{path}"/>' for key, path in enumerate(paths) if path)
    return (
        f'<figure><figcaption title="{escape(name)}">{escape(name)}</figcaption><svg viewBox="0 0 1000 100" '
        f'preserveAspectRatio="none" role="img" aria-label="shares over depth of {escape(name)}">{drawn}'
        f'{"".join(targets)}</svg><div class="ends"><span>first layer</span><span>last</span></div></figure>'
    )


def residuals(analysis: Analysis) -> str:
    """Box plots key by key, beside random keys."""
    total, control = analysis.key_residuals.over_groups(), analysis.control_residuals.over_groups().over_keys()
    least = np.nanmin([*total.quantile(0.05)[0], *control.quantile(0.05)[0], 1])
    start, step = (0.5, 0.1) if least > 0.5 else (0.0, 0.25)  # of the axis, whose lower half may be empty
    rows = []
    for key, label in enumerate(key_labels(analysis.keys)):
        rows.append(_box(f"{key + 1} · {label}", f"k{key + 1}", total, key, start))
    rows.append(_box("all keys", "kall", total.over_keys(), 0, start))
    rows.append(_box(f"{len(analysis.control)} random keys", "kall", control, 0, start))
    steps = round((1 - start) / step)
    ticks = "".join(
        f'<span style="left:{100 * tick / steps:.2f}%">{start + tick * step:g}</span>' for tick in range(steps + 1)
    )
    return (
        "<p>How far filters are from their key: 0 is an exact linear shift of it, 1 has nothing in common with it. "
        "Boxes hold the middle half, whiskers 5 % to 95 %, the line is the median; at the right mean and standard "
        "deviation. The last row fits the same filters to random keys.</p>"
        f'<div class="boxes" style="--tick:{100 / steps:.2f}%">{"".join(rows)}'
        '<div class="box axis"><span class="label"></span>'
        f'<div class="track">{ticks}</div><span class="mean">mean ± std</span></div></div>'
    )


def _box(label: str, css: str, statistics: FitStatistics, key: int, start: float) -> str:
    """A row with a box plot on the axis from `start` to 1."""
    quantiles = 100 * (statistics.quantile(QUANTILES)[:, 0, key] - start) / (1 - start)
    low, first, median, third, high = quantiles
    mean, std, filters = statistics.mean[0, key], statistics.std[0, key], int(statistics.count[0, key])
    if filters:
        marks = (
            f'<div class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></div><div class="quartiles" '
            f'style="left:{first:.2f}%;width:{third - first:.2f}%"></div>'
            f'<div class="median" style="left:{median:.2f}%"></div>'
        )
        right = f"{decimal(mean)} ± {decimal(std)}"
    else:
        marks, right = "", "no filters"
    return (
        f'<div class="box {css}" title="{whole(filters)} filters"><span class="label">{escape(label)}</span>'
        f'<div class="track">{marks}</div><span class="mean">{right}</span></div>'
    )


def atlas(analysis: Analysis) -> str:
    """The controls of the atlas and the canvas that the script draws on."""
    chips = "".join(
        f'<button type="button" class="k{number + 1}" data-key="{number}" aria-pressed="true" title="{escape(label)}">'
        f'<canvas data-set="keys" data-number="{number}"></canvas>{number + 1}</button>'
        for number, label in enumerate(key_labels(analysis.keys))
    )
    return f"""<p>A random sample of the live filters of every layer and key, so that each layer and key is seen.
Filters are drawn centred, of norm 1, with the sign of their scale undone, and stored in 8 bits; the line under each has
the colour of its key. Point at one to read what it is.</p>
<div class="controls">
<label>network<select id="model"></select></label>
<label>layer<select id="layer"></select></label>
<label>order<select id="order"><option value="best">well fitted first</option>
<option value="worst">badly fitted first</option><option value="depth">by depth</option></select></label>
<label>sign<select id="signed"><option value="no">of the key</option>
<option value="yes">as in the network</option></select></label></div>
<div class="chips" id="chips" role="group" aria-label="keys">{chips}</div>
<p class="small" id="status" role="status"></p>
<div><canvas id="grid" role="img" aria-label="sampled filters"></canvas></div>
<p><button id="more" type="button" hidden>Show more</button></p>
<div id="detail" aria-live="polite">Point at a filter to read where it is from.</div>"""


def kinds(found: Identification) -> str:
    """The kinds of the discrete Gaussian family by frequency."""
    live = found.index[(found.index >= 0) & (found.index != CONSTANT)]
    counts = np.bincount(live, minlength=len(KINDS))
    rows = []
    for kind in np.argsort(-counts, kind="stable"):
        if not counts[kind]:
            continue
        of_kind = found.index == kind
        s_x, s_y, residual = (np.median(x[of_kind]) for x in (found.scale_x, found.scale_y, found.residual))
        share, length = counts[kind] / len(live), 100 * counts[kind] / counts.max()
        rows.append(
            f'<tr><td><canvas data-set="kinds" data-number="{kind}" role="img" aria-label=""></canvas></td>'
            f'<td>{NAMES[kind]}</td><td class="optional wide"><span class="bar" style="width:{length:.1f}%"></span>'
            f'</td><td class="num">{share:.1%}</td><td class="num">{decimal(s_x)}</td><td class="num">{decimal(s_y)}'
            f'</td><td class="num">{decimal(residual)}</td></tr>'
        )
    return (
        "<p>The same filters, without any keys: each named by the nearest member of the discrete Gaussian family "
        "(Gaussians, their first and second differences, differences of Gaussians) at its best scales. Scales in "
        "pixels and residuals are medians over the filters of a kind; the picture is the member at those scales.</p>"
        '<table><thead><tr><th></th><th>kind</th><th class="optional"></th><th class="num">share</th>'
        '<th class="num">s<sub>x</sub></th><th class="num">s<sub>y</sub></th><th class="num">residual</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def natural(analysis: Analysis, eigenvectors: NaturalKeys, rebuilt: Reconstruction) -> str:
    """The eigenvectors of a natural image, and the image rebuilt from them."""
    names = identify(eigenvectors.keys).name
    cosines = np.abs(match(eigenvectors.keys, analysis.keys).cosines)
    partner = [f"<br>|cos| {decimal(row.max())} with key {row.argmax() + 1}" for row in cosines]
    tiles = "".join(
        f'<li><canvas data-set="natural" data-number="{i}" role="img" aria-label="eigenvector {i + 1}"></canvas>'
        f"<b>{i + 1}<span>{eigenvectors.share[i]:.1%}</span></b><small>{escape(names[i])}{partner[i]}</small></li>"
        for i in range(len(eigenvectors.keys))
    )
    explained = eigenvectors.share[: len(eigenvectors.keys)].sum()
    return (
        "<p>The leading eigenvectors of small patches of a natural image under a Gaussian window, with their share of "
        f"the variance ({explained:.0%} together), what they are, and the key nearest to each. "
        f"They come from {escape(eigenvectors.keys.provenance.partition(' of ')[2])}.</p>"
        f'<ul class="tiles{" eight" if len(eigenvectors.keys) == 8 else ""}">{tiles}</ul><div class="pictures">'
        f'<figure><img alt="the image" src="{_jpeg(rebuilt.original, rebuilt.original)}">'
        f'<figcaption>The image.</figcaption></figure><figure><img alt="the image rebuilt" '
        f'src="{_jpeg(rebuilt.image, rebuilt.original)}"><figcaption>Rebuilt from patches that do not '
        f"overlap, each its mean plus a linear combination of these {len(eigenvectors.keys)}: {rebuilt.psnr:.1f} dB."
        "</figcaption></figure></div>"
    )


def _jpeg(image: Any, original: Any) -> str:
    """An image as a data URL, from black to white as the original is."""
    from PIL import Image

    low, high = float(original.min()), float(original.max())
    grey = np.clip(255 * (image - low) / max(high - low, 1e-12), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64_text(file.getvalue())}"


def numbers(analysis: Analysis, fits: bytes = b"", said: str = "") -> str:
    """Downloads, with a file of fits unless that is empty, a table of each network's layers, sources, and notes."""
    document = json.dumps(analysis.to_dict(), separators=(",", ":"), allow_nan=False)
    files = [
        (f"{name}.csv", "text/csv", report.as_csv(rows).encode()) for name, rows in report.tables(analysis).items()
    ]
    with TemporaryDirectory() as folder:
        analysis.keys.save(path := Path(folder) / "keys.safetensors")
        files.append((path.name, "application/octet-stream", path.read_bytes()))
    if fits:
        files.append(("fits.safetensors", "application/octet-stream", fits))
    if len(document) < _DOCUMENT:
        files.append(("analysis.json", "application/json", document.encode()))
    links = "".join(
        f'<li><a download="{name}" href="data:{mime};base64,{base64_text(content)}">{name}<small>'
        f"{size(len(content))}</small></a></li>"
        for name, mime, content in files
    )
    tables = ""
    if sum(len(model.layers) for model in analysis.models) <= _TABLE_LAYERS:
        tables = "<h3>Every layer</h3>" + "".join(_layer_table(model) for model in analysis.models)
    notes = "".join(f"<p class='small'>{escape(line)}</p>" for line in report.notes(analysis.trained))
    below = f'<p class="small">{escape(said)}</p>' if said else ""
    return f'<ul class="downloads">{links}</ul>{below}{tables}{_origins(analysis)}<h3>Notes</h3>{notes}'


def _origins(analysis: Analysis) -> str:
    """Where each network is from, and its licence, as far as the bank knows."""
    told = {
        model.model: "; ".join(filter(None, (model.source, model.licence and f"licence {model.licence}")))
        for model in analysis.models
    }
    lines = "".join(f"<p class='small'>{escape(f'{name}: {words}')}</p>" for name, words in told.items() if words)
    return f"<h3>Where they come from</h3>{lines}" if lines else ""


def _layer_table(model: ModelStatistics) -> str:
    keys = range(len(model.tally.counts))
    heads = "".join(f'<th class="num">{key + 1}</th>' for key in keys)
    rows = []
    for layer in model.layers:
        tally = layer.tally
        shares = "".join(
            f'<td class="num heat k{key + 1}" style="--v:{share:.2f}">{100 * share:.0f}</td>'
            if tally.live else "<td></td>"
            for key, share in zip(keys, tally.shares, strict=True)
        )  # fmt: skip
        rows.append(
            f'<tr><td>{escape(layer.layer)}</td><td class="num">{whole(tally.filters)}</td>{shares}'
            f'<td class="num">{decimal(tally.residual_quantiles[2])}</td>'
            f'<td class="num">{decimal(tally.control_quantiles[2])}</td></tr>'
        )
    return (
        f'<details><summary>{escape(model.model)}</summary><div class="scroll"><table><thead><tr><th>layer</th>'
        f'<th class="num">filters</th>{heads}<th class="num">residual</th><th class="num">random</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _stack(shares: Iterable[float], analysis: Analysis) -> str:
    """A bar of the keys' shares, each as wide as it is large."""
    labels = key_labels(analysis.keys)
    parts = "".join(
        f'<i class="k{number}" style="width:{100 * share:.2f}%" title="{number} {escape(label)}: {share:.1%}"></i>'
        for number, (share, label) in enumerate(zip(shares, labels, strict=True), 1)
        if share > 0
    )
    return f'<div class="stack">{parts}</div>'


def _legend(analysis: Analysis) -> str:
    if len(analysis.keys) > 16:
        return ""
    items = "".join(
        f'<li class="k{number}">{number} {escape(label)}</li>'
        for number, label in enumerate(key_labels(analysis.keys), 1)
    )
    return f'<ul class="legend">{items}</ul>'
