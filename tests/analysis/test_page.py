"""The page: what is written in it, and what a browser makes of it."""

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load, load_file

import mkf
from mkf.analysis import Analysis, analyze, identify, natural_keys, page, reconstruct, report
from mkf.bank import FilterBank, Layer

from .banks import noise, shifted

KEYS = mkf.keys.paper8()
NASTY = "net</script><b>&\"'"


@pytest.fixture(scope="module")
def bank() -> FilterBank:
    first = shifted(KEYS, [0] * 9 + [7] * 30, -2.0, 1.0) + 0.05 * noise(39, 7, 7)
    second = torch.cat([noise(40, 7, 7, seed=1), torch.zeros(1, 7, 7), torch.full((1, 7, 7), torch.nan)])
    third = shifted(KEYS, [7] * 5) + 0.02 * noise(5, 7, 7, seed=2)
    return FilterBank.concat(
        [
            FilterBank.from_layers([Layer("blocks.0", first), Layer("blocks.1", second)], NASTY),
            FilterBank.from_layers([Layer("only", third)], "other_a", source="a <file>", licence="MIT"),
            FilterBank.from_layers([Layer("only", third[:3])], "other_b"),
            FilterBank.from_layers([Layer("only", noise(30, 7, 7, seed=3))], "other-untrained"),
        ]
    )


@pytest.fixture(scope="module")
def analysis(bank: FilterBank) -> Analysis:
    return analyze(bank, KEYS, atlas=6)


@pytest.fixture(scope="module")
def text(bank: FilterBank, analysis: Analysis) -> str:
    image = noise(40, 40).numpy().cumsum(0).cumsum(1)
    natural = natural_keys(image)
    return page.render(analysis, identify(bank), (natural, reconstruct(image, natural.keys)), bank=bank)


def data_of(text: str) -> dict:
    [document] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(document)


def test_it_is_one_file_that_loads_nothing(text: str) -> None:
    assert text.startswith("<!doctype html>")
    assert "default-src 'none'" in text
    outside = re.sub(r'(src|href)="(data:[^"]*|#[a-z]+)"', "", text)
    assert not re.search(r"""\b(src|href)=|url\(|https?://|@import|\bfetch\(|XMLHttpRequest""", outside)


def test_it_tells_what_it_was_made_of_and_by(text: str) -> None:
    assert f"Made by mkf {mkf.__version__} from" in text
    assert "other_a: a &lt;file&gt;; licence MIT" in text
    assert "other_b:" not in text  # of which nothing is known
    assert "8 random keys (Gaussian white noise, seed 0)" in text


def test_names_are_escaped(text: str) -> None:
    assert NASTY not in text
    assert html.escape(NASTY) in text
    assert data_of(text)["models"][0]["name"] == NASTY


def test_the_atlas_is_the_sample(analysis: Analysis, text: str) -> None:
    data = data_of(text)
    atlas = {name: base64.b64decode(value) for name, value in data["atlas"].items()}
    filters = np.frombuffer(atlas["filters"], np.int8).reshape(-1, 49).astype(float)
    residual = np.frombuffer(atlas["residual"], np.uint8) / 255
    channel = np.frombuffer(atlas["channel"], "<u4")
    positive = np.frombuffer(atlas["positive"], np.uint8)
    start = 0
    for model, entry in zip(analysis.models, data["models"], strict=True):
        for layer, sampled in zip(model.layers, entry["layers"], strict=True):
            assert sampled["name"] == layer.layer
            assert sampled["sampled"] == np.minimum(layer.tally.counts, 6).tolist()
            for key, count in enumerate(sampled["sampled"]):
                for row in range(start, start + count):
                    [own] = np.flatnonzero(layer.sample.channel == channel[row])
                    assert layer.sample.index[own] == key
                    assert residual[row] == pytest.approx(layer.sample.residual[own], abs=0.5 / 255 + 1e-9)
                    assert positive[row] == (layer.sample.scale[own] > 0)
                    f = layer.sample.filters[own].ravel() * np.sign(layer.sample.scale[own])
                    cosine = np.corrcoef(f, filters[row])[0, 1]
                    assert cosine > 0.9995  # 8 bits
                start += count
    assert start == len(filters) == len(channel)


def test_a_family_of_one_network_has_no_spread(text: str) -> None:
    rows = re.findall(r'title="(key 1: [^"]*)".*?<td class="num">(\d+)</td><td class="num">([^<]*)</td>', text)
    assert [number for _, number, _ in rows] == ["1", "2", "1"]
    assert [("±" in shares, spread == "\N{EN DASH}") for shares, _, spread in rows] == [
        (False, True), (True, False), (False, True)
    ]  # fmt: skip


def downloads(text: str) -> dict[str, bytes]:
    links = dict(re.findall(r'<a download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', text))
    return {name: base64.b64decode(content) for name, content in links.items()}


def test_the_downloads_hold_the_numbers(analysis: Analysis, text: str, tmp_path: Path) -> None:
    files = downloads(text)
    assert set(files) == {
        "models.csv", "layers.csv", "families.csv", "keys.csv", "keys.safetensors", "fits.safetensors", "analysis.json",
    }  # fmt: skip
    assert json.loads(files["analysis.json"]) == analysis.to_dict()
    for name, rows in report.tables(analysis).items():
        read = list(csv.DictReader(io.StringIO(files[f"{name}.csv"].decode())))
        assert [next(iter(row.values())) for row in read] == [str(next(iter(row.values()))) for row in rows]
    (tmp_path / "keys").write_bytes(files["keys.safetensors"])
    assert mkf.KeySet.load(tmp_path / "keys") == KEYS


def test_every_filter_can_be_rebuilt_from_the_downloads(bank: FilterBank, text: str, tmp_path: Path) -> None:
    for name, content in downloads(text).items():
        (tmp_path / name).write_bytes(content)
    fits = load_file(tmp_path / "fits.safetensors")
    with safe_open(tmp_path / "fits.safetensors", "numpy") as file:
        layers = json.loads(file.metadata()["layers"])
        assert file.metadata()["format"] == "mkf.fits/1"
    keys = mkf.KeySet.load(tmp_path / "keys.safetensors").filters.double().numpy()
    filters = bank.filters.double().numpy()
    assert len(filters) == len(fits["index"])
    for column, values in (
        ("model", [layers[number][0] for number in fits["layer"]]),
        ("layer", [layers[number][1] for number in fits["layer"]]),
        ("channel", fits["channel"].tolist()),
    ):
        assert bank.metadata[column].to_pylist() == values
    finite = np.isfinite(filters).all((1, 2))
    assert (fits["index"][~finite] == -1).all()
    f, index, scale, shift, residual = (
        x[finite] for x in (filters, *(fits[name] for name in ("index", "scale", "shift", "residual")))
    )
    left = np.linalg.norm(f - scale[:, None, None] * keys[index] - shift[:, None, None], axis=(1, 2))
    variation = np.linalg.norm(f - f.mean((1, 2), keepdims=True), axis=(1, 2))
    assert np.allclose(left, residual * variation, atol=1e-5)


def test_fits_name_any_of_256_keys() -> None:
    keys = mkf.keys.random(7, 256)
    bank = FilterBank.from_layers([Layer("l", 2 * keys.filters)], "net")
    assert load(page.fits.fits_file(bank, keys))["index"].tolist() == list(range(256))


def test_fits_of_too_many_filters_are_left_out(
    bank: FilterBank, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkf.analysis.page.MOST_FILTERS", 100)
    text = page.render(analysis, bank=bank)
    assert "fits.safetensors" not in downloads(text)
    assert f"The fits of {analysis.tally.filters} filters are not in this page: mkf fit writes them." in text


def test_a_page_of_the_most_filters_is_below_6_mb() -> None:
    layers, keys = 500, mkf.keys.paper8()
    noisy = noise(page.fits.MOST_FILTERS // layers, 7, 7, seed=4)
    bank = FilterBank.from_layers([Layer(f"stages.{i}.conv_dw", noisy) for i in range(layers)], "net")
    text = page.render(analyze(bank, keys, atlas=page.atlas_size(layers, len(keys), 7)), bank=bank)
    assert "fits.safetensors" in downloads(text)
    assert len(text.encode()) < 6_000_000


def test_controls_are_not_in_the_headline(analysis: Analysis, text: str) -> None:
    trained = analysis.trained.tally
    assert f"<b>{trained.live} live filters</b>" in text
    assert "1 untrained network, as controls" in text
    assert "other-untrained" in text
    notes = text.partition("<h3>Notes</h3>")[2]
    assert f"{trained.filters} filters of 7x7" in notes
    assert f"(participation ratio): {analysis.trained.effective_dimension:.1f} of 48" in notes


def test_sections_can_be_left_out(analysis: Analysis) -> None:
    text = page.render(analysis, title="Mine & yours")
    assert "<h1>Mine &amp; yours</h1>" in text
    assert 'id="natural"' not in text
    assert 'id="kinds"' not in text


def test_a_bank_without_live_filters() -> None:
    dead = FilterBank.from_layers([Layer("0", torch.zeros(4, 7, 7))], "dead")
    text = page.render(analyze(dead, KEYS, atlas=4), identify(dead))
    assert "No filter is live" in text
    assert ">nan" not in text.lower()


def test_many_keys() -> None:
    keys = mkf.keys.random(5, 40)
    bank = FilterBank.from_layers([Layer("0", noise(300, 5, 5, seed=9))], "net")
    text = page.render(analyze(bank, keys, atlas=2), identify(bank))
    assert ".k40{--c:#" in text


def test_room_in_the_atlas() -> None:
    assert page.atlas_size(20, 8, 7) == 48
    for layers, keys, k in ((1500, 8, 7), (432, 8, 7), (100, 256, 3)):
        size = page.atlas_size(layers, keys, k)
        assert 1 <= size <= 48
        assert size * layers * keys * (k * k + 6) <= 1_600_000 or size == 1
    assert page.atlas_size(10**6, 256, 11) == 1


# In a browser: the page with two scripts more, one that keeps what goes wrong and one that clicks and reads.

WATCH = """<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
for (const level of ["error", "warn"]) console[level] = (...what) => problems.push(what.join(" "));
</script>"""

CLICK = """<script>addEventListener("load", () => {
const by = (id) => document.getElementById(id), results = {};
const status = () => by("status").textContent;
const pick = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("change")); };
const colour = (canvas, x, y) => { // of one pixel, read from a copy
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  return Array.from(context.getImageData(x, y, 1, 1).data);
};
const pixel = (canvas, x, y) => colour(canvas, x * canvas.width, y * canvas.height);
const first = () => { // the middle of the first filter in the grid, which has one row
  const half = by("grid").height / 2;
  return colour(by("grid"), half, half);
};
const point = () => {
  const box = by("grid").getBoundingClientRect();
  const options = { clientX: box.left + 5, clientY: box.top + 5, bubbles: true };
  by("grid").dispatchEvent(new PointerEvent("pointermove", options));
  return by("detail").textContent;
};
results.everything = status();
results.theme = document.documentElement.dataset.theme;
results.icon = pixel(document.querySelector("#keys canvas[data-number='7']"), .5, .5);
results.corner = pixel(document.querySelector("#keys canvas[data-number='7']"), .1, .1);
pick("model", MODEL);
results.model = status();
results.layers = Array.from(by("layer").options, (option) => option.value);
pick("layer", "blocks.0");
results.layer = status();
by("chips").children[7].click();
results.key = status();
results.pressed = Array.from(by("chips").children, (chip) => chip.getAttribute("aria-pressed"));
results.centre = first();
pick("signed", "yes");
results.turned = first();
results.detail = point();
pick("order", "worst");
results.worst = point();
by("chips").children[4].click();
results.none = status();
by("chips").children[4].click();
results.again = status();
document.querySelector("#depth rect[data-model='1']").dispatchEvent(new MouseEvent("click", { bubbles: true }));
results.jumped = [by("model").value, by("layer").value, status()];
by("theme").click();
results.dark = [document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor];
results.icon_dark = pixel(document.querySelector("#keys canvas[data-number='7']"), .1, .1);
results.download = document.querySelectorAll("a[download]").length;
results.wide = [innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth];
results.problems = problems;
(parent === window ? document : parent.document).body.insertAdjacentHTML("beforeend", "<pre id=results></pre>");
(parent === window ? document : parent.document).getElementById("results").textContent = JSON.stringify(results);
});</script>"""


def chromium(path: Path, width: int = 1280) -> dict:
    """What the clicking script found, with the page open in a browser; every message on its console is a failure."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
    command = [browser, *options.split(), f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},900"]
    run = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in run.stderr
    [found] = re.findall(r'<pre id="results">(.*?)</pre>', run.stdout, re.DOTALL)
    return json.loads(html.unescape(found))


def instrumented(text: str) -> str:
    text = text.replace("<head>", "<head>" + WATCH, 1)
    return text.replace("</body>", CLICK.replace("MODEL", json.dumps(NASTY).replace("<", "\\u003c")) + "</body>", 1)


def test_in_a_browser(analysis: Analysis, text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(instrumented(text), encoding="utf-8")
    found = chromium(path)
    assert found["problems"] == []
    first, second = (layer.sample for layer in analysis.models[0].layers)
    total = sum(len(layer.sample) for model in analysis.models for layer in model.layers)

    def status(number: int) -> str:
        return f"{number} of {number} sampled filters shown"

    assert found["everything"] == status(total)
    assert found["model"] == status(len(first) + len(second))
    assert found["layers"] == ["", "blocks.0", "blocks.1"]
    assert found["layer"] == found["again"] == status(len(first)) == status(12)
    assert found["key"] == status(6)
    assert found["pressed"] == ["false"] * 7 + ["true"]
    assert found["none"] == "No sampled filter is of this layer and key."
    assert found["jumped"] == ["other_a", "only", status(len(analysis.models[1].layers[0].sample))]
    # Key 8 is a Gaussian: red in the middle. Its filters here have negative scales: blue as they are in the network.
    for red, green, blue, _ in (found["icon"], found["centre"]):
        assert red > 1.5 * max(green, blue)
    assert found["turned"][2] > 1.5 * found["turned"][0]
    of_key = np.flatnonzero(first.index == 7)
    for name, number in (
        ("detail", of_key[np.argmin(first.residual[of_key])]),
        ("worst", of_key[np.argmax(first.residual[of_key])]),
    ):
        expected = f"{NASTY} · blocks.0 · channel {first.channel[number]} · key 8 Gaussian"
        assert found[name].startswith(expected)
        assert f"residual {first.residual[number]:.2f}" in found[name]
        assert found[name].endswith("negative")
    assert found["theme"] == "light"
    assert found["dark"][0] == "dark"
    assert sum(map(int, re.findall(r"\d+", found["dark"][1])[:3])) < 120
    assert sum(found["corner"][:3]) > 600
    assert sum(found["icon_dark"][:3]) < 200
    assert found["download"] == 7


def test_on_a_phone(text: str, tmp_path: Path) -> None:
    """In a frame of 390 pixels nothing is wider than the screen."""
    frame = html.escape(instrumented(text))
    path = tmp_path / "phone.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe srcdoc="{frame}" width=390 height=800></iframe></body>',
        encoding="utf-8",
    )
    found = chromium(path)
    assert found["problems"] == []
    assert found["wide"] == [390, 0]


def test_with_many_keys_of_another_size(tmp_path: Path) -> None:
    bank = FilterBank.from_layers([Layer("blocks.0", noise(300, 5, 5, seed=9))], NASTY)
    script = "<script>addEventListener('load', () => { const pre = document.createElement('pre'); pre.id = 'results';"
    script += "pre.textContent = JSON.stringify([problems, document.getElementById('status').textContent]);"
    script += "document.body.append(pre); });</script></body>"
    text = page.render(analyze(bank, mkf.keys.random(5, 40), atlas=2), identify(bank))
    path = tmp_path / "report.html"
    path.write_text(text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", script, 1), encoding="utf-8")
    problems, status = chromium(path)
    assert problems == []
    assert status.endswith("sampled filters shown")
