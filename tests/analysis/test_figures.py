"""What the figures show: the right filters, with the right sign, in the right order."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mkf
from mkf.analysis import analyze, figures
from mkf.bank import FilterBank, Layer

from .banks import bank_of, noise, shifted

KEYS = mkf.keys.paper8()


def images(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def residuals(figure) -> list[float]:
    return [float(text.get_text()) for text in figure.axes[0].texts if text.get_text().startswith((".", "1."))]


def test_keys_row() -> None:
    figure = figures.keys_row(KEYS)
    assert np.array_equal(images(figure), KEYS.centred().numpy())
    assert [axes.get_title() for axes in figure.axes] == [str(number) for number in range(1, 9)]
    assert figure.axes[7].get_xlabel() == "Gaussian"


def test_keys_without_kinds_show_their_names() -> None:
    assert figures.keys_row(mkf.KeySet(noise(2, 5, 5), names=["left", "right"])).axes[1].get_xlabel() == "right"


def test_atlas_undoes_scale_and_shift() -> None:
    filters = torch.cat([shifted(KEYS, [5, 5], -7.0, 2.0), torch.zeros(1, 7, 7), torch.full((1, 7, 7), torch.nan)])
    drawn = images(figures.atlas(filters, KEYS))
    assert len(drawn) == 8 + 2  # every key, and the two filters that are alive
    sixth = KEYS.centred()[5].numpy()
    assert sum(np.allclose(image, sixth, atol=1e-5) for image in drawn) == 3


def test_atlas_goes_from_well_to_badly_fitted() -> None:
    key = mkf.KeySet(KEYS.filters[7:])
    filters = shifted(key, [0] * 200) + torch.linspace(0, 0.3, 200)[:, None, None] * noise(200, 7, 7)
    shown = residuals(figures.atlas(filters, key, columns=6))
    assert len(shown) == 6
    assert shown == sorted(shown)
    every = mkf.affine_fit(filters, key).residual.numpy()
    assert shown == pytest.approx(np.quantile(every, (np.arange(6) + 0.5) / 6), abs=0.02)


def test_an_atlas_of_many_keys_is_laid_out_at_once(tmp_path: Path) -> None:
    keys = mkf.keys.random(7, 40)
    figure = figures.atlas(torch.cat([keys.filters, noise(4000, 7, 7)]), keys)
    assert len(images(figure)) > 40 * 9
    assert len(figure.axes) == 1  # the time to lay panels out grows with the square of their number
    assert figures.save(figure, tmp_path / "atlas.png").stat().st_size > 1000
    [axes] = figure.axes
    edges = [tuple(image.get_extent()) for image in axes.images]
    assert len(set(edges)) == len(edges)
    rows = {bottom for _, _, bottom, _ in edges}
    assert len(rows) == 40
    assert max(right for _, right, _, _ in edges) < max(axes.get_xlim())
    assert max(rows) < max(axes.get_ylim())


def test_shares_over_depth_are_stacked_to_one_hundred() -> None:
    analysis = analyze(bank_of(noise(20, 7, 7), torch.zeros(3, 7, 7), noise(9, 7, 7, seed=1)), KEYS)
    [axes] = figures.shares_over_depth(analysis).axes
    assert len(axes.collections) == 8
    tops = np.zeros(2)
    for key, collection in enumerate(axes.collections):
        boxes = [path.get_extents() for path in collection.get_paths()]
        assert [(box.x0 + box.x1) / 2 for box in boxes] == pytest.approx([0, 1])  # the layer of zeros has no bar
        assert [box.y0 for box in boxes] == pytest.approx(tops)
        tops = np.array([box.y1 for box in boxes])
        shares = [layer.tally.shares[key] for layer in analysis.models[0].layers if layer.tally.live]
        assert [box.height for box in boxes] == pytest.approx([100 * share for share in shares])
    assert tops == pytest.approx([100, 100])


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    assert figures.save(figures.keys_row(KEYS), tmp_path / f"keys{suffix}").stat().st_size > 1000


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        figures.save(figures.keys_row(KEYS), tmp_path / "keys.docx")


def test_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.keys_row(KEYS)
    assert dict(matplotlib.rcParams) == before


def test_residual_boxes() -> None:
    filters = torch.cat([shifted(KEYS, [0] * 50), noise(300, 7, 7)])
    analysis = analyze(bank_of(filters), KEYS)
    [axes] = figures.residual_boxes(analysis).axes
    assert [label.get_text() for label in axes.get_yticklabels()][-3:] == ["8 Gaussian", "all keys", "8 random keys"]
    assert len(axes.patches) == 10
    total = analysis.key_residuals.over_groups()
    for key, box in enumerate(axes.patches[:8]):
        extent = box.get_path().get_extents()
        assert (extent.y0 + extent.y1) / 2 == pytest.approx(key)
        assert [extent.x0, extent.x1] == pytest.approx([total.quantile(q)[0, key] for q in (0.25, 0.75)])


def test_colours() -> None:
    for number in (1, 8, 40):
        for dark in (False, True):
            colours = figures.key_colours(number, dark)
            assert len(set(colours)) == number
            assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours)


def test_code_axis_shows_every_candidate_over_the_histogram() -> None:
    candidates = mkf.keys.random(5, 13)
    histogram = np.arange(50)
    figure = figures.code_axis(candidates, histogram)
    (below,) = (axes for axes in figure.axes if axes.get_xlabel() == "code")
    assert [bar.get_height() for bar in below.patches] == histogram.tolist()
    assert [bar.get_x() for bar in below.patches] == pytest.approx(np.arange(50) / 50)
    drawn = [a for a in figure.axes if a.images]
    assert [a.get_xlabel() for a in drawn] == list(candidates.names)
    assert np.array_equal(drawn[12].images[0].get_array(), candidates.centred()[12])


def test_elimination_draws_the_curve_and_its_two_marks() -> None:
    losses = {n: 1 / n for n in range(20, 0, -1)}
    (axes,) = figures.elimination(losses, "a loss", 8, 5).axes
    curve, kept, elbow = axes.lines
    assert dict(zip(*curve.get_data(), strict=True)) == losses
    assert (kept.get_xdata()[0], elbow.get_xdata()[0]) == (8, 5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kept: 8", "elbow: 5"]


def test_keys_rows_stand_in_their_order() -> None:
    few = mkf.keys.random(7, 3)
    figure = figures.keys_rows({"eight": KEYS, "three": few})
    assert np.array_equal(images(figure), np.concatenate([KEYS.centred(), few.centred()]))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["eight", "three"]


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    names = ["cost$_$", "$x^2$"]
    keys = mkf.KeySet(noise(2, 7, 7), names=names)
    filters = FilterBank.from_layers([Layer("l", noise(20, 7, 7, seed=1))], names[0])
    analysis = analyze(filters, keys)
    drawings = (
        figures.keys_row(keys),
        figures.keys_rows({names[0]: keys}),
        figures.atlas(filters.filters, keys),
        figures.shares_over_depth(analysis),
        figures.residual_boxes(analysis),
        figures.bars({names[0]: {names[0]: 1.0, names[1]: 2.0}}, names[1]),
        figures.code_axis(keys, np.arange(50)),
        figures.elimination({2: 0.1, 1: 0.5}, names[0], 1, 1),
    )
    for figure in drawings:
        written = figures.save(figure, tmp_path / "figure.svg").read_text()
        assert names[0] in written or names[1] in written
