"""The statistics against independent float64 counts, on filters whose answer is known, and on real ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mkf
from mkf.analysis import analyze, counting, report, statistics
from mkf.analysis.page import sections
from mkf.analysis.statistics import QUANTILES, RESIDUAL_BINS, Tally
from mkf.bank import FilterBank, Layer
from mkf.ops.fit_statistics import histogram_quantile

from .banks import bank_of, noise, shifted

KEYS = mkf.keys.paper8()


def fit_float64(filters: torch.Tensor, keys: mkf.KeySet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, sign of the scale and |correlation| of the best key, written from the definition."""
    f = filters.double().flatten(1).numpy()
    x = keys.filters.double().flatten(1).numpy()
    f, x = f - f.mean(1, keepdims=True), x - x.mean(1, keepdims=True)
    correlation = (f / np.linalg.norm(f, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    index = abs(correlation).argmax(1)
    best = np.take_along_axis(correlation, index[:, None], 1)[:, 0]
    return index, np.sign(best), abs(best)


def test_against_float64() -> None:
    first, second = noise(150, 7, 7), noise(80, 7, 7, seed=1) + 3 * shifted(KEYS, [i % 8 for i in range(80)])
    analysis = analyze(bank_of(first, second), KEYS)
    assert [layer.layer for layer in analysis.models[0].layers] == ["0", "1"]
    for filters, layer in zip((first, second), analysis.models[0].layers, strict=True):
        index, sign, correlation = fit_float64(filters, KEYS)
        tally = layer.tally
        assert tally.filters == tally.live == len(filters)
        assert tally.counts.tolist() == np.bincount(index, minlength=8).tolist()
        assert tally.positive.tolist() == np.bincount(index[sign > 0], minlength=8).tolist()
        assert tally.mean_correlation == pytest.approx(correlation.mean(), abs=1e-6)
        residual = np.sqrt(1 - correlation**2)
        assert tally.residual_quantiles == pytest.approx(np.quantile(residual, QUANTILES), abs=0.501 / RESIDUAL_BINS)
        control = np.sqrt(1 - fit_float64(filters, analysis.control)[2] ** 2)
        assert tally.control_quantiles == pytest.approx(np.quantile(control, QUANTILES), abs=0.501 / RESIDUAL_BINS)


def test_exact_shifts_go_to_their_key() -> None:
    filters = torch.cat([shifted(KEYS, [0, 0, 3], -2.0, 5.0), shifted(KEYS, [7], 1e-3)])
    tally = analyze(bank_of(filters), KEYS).tally
    assert tally.counts.tolist() == [2, 0, 0, 1, 0, 0, 0, 1]
    assert tally.positive.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert tally.positive_share == 0.25
    assert tally.shares.tolist() == [0.5, 0, 0, 0.25, 0, 0, 0, 0.25]
    assert tally.mean_correlation == pytest.approx(1)
    assert tally.residual_quantiles.max() < 1 / RESIDUAL_BINS
    assert tally.control_quantiles.min() > 0.5


def test_dead_and_non_finite_filters_are_counted_apart_and_named() -> None:
    clean = noise(6, 7, 7)
    dirty = clean.clone()
    dirty[1], dirty[2] = 0, -3.5
    dirty[3, 2, 2], dirty[5, 0, 0] = math.nan, math.inf
    analysis = analyze(bank_of(clean, dirty), KEYS)
    whole, broken = (layer.tally for layer in analysis.models[0].layers)
    assert (broken.filters, broken.live, broken.dead, broken.non_finite) == (6, 2, 2, 2)
    assert broken.counts.sum() == broken.residuals.sum() == broken.control_residuals.sum() == 2
    alone = analyze(bank_of(clean[[0, 4]]), KEYS).tally
    assert broken.counts.tolist() == alone.counts.tolist()
    assert broken.mean_correlation == alone.mean_correlation
    assert (whole.dead, whole.non_finite) == (0, 0)
    model = analysis.models[0].model
    assert analysis.non_finite == [(model, "1", 3), (model, "1", 5)]
    assert len(analysis.sample) == 8
    assert np.isfinite(analysis.sample.filters).all()


def test_a_bank_without_a_live_filter_has_null_statistics() -> None:
    analysis = analyze(bank_of(torch.zeros(4, 7, 7)), KEYS)
    assert analysis.tally.dead == 4
    assert np.isnan(analysis.tally.shares).all()
    total = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))["total"]
    assert total["shares"] == [None] * 8
    assert total["residual_quantiles"] == [None] * 5
    assert total["mean_correlation"] is total["positive_share"] is None
    assert total["counts"] == [0] * 8


def test_other_kernel_sizes_are_left_out_with_their_number() -> None:
    bank = bank_of(noise(5, 7, 7), noise(4, 5, 5), noise(3, 3, 3), noise(2, 7, 7))
    analysis = analyze(bank, KEYS)
    assert analysis.left_out == {3: 3, 5: 4}
    assert [(layer.layer, layer.depth) for layer in analysis.models[0].layers] == [("0", 0), ("3", 3)]
    assert analysis.tally.filters == 7


@pytest.mark.parametrize("k", [3, 5, 11])
def test_keys_of_any_size(k: int) -> None:
    keys = mkf.keys.random(k, 3, seed=1)
    analysis = analyze(bank_of(shifted(keys, [2, 2, 0], -1.0, 0.5)), keys)
    assert analysis.tally.counts.tolist() == [1, 0, 2]
    assert (analysis.control.kernel_size, len(analysis.control)) == (k, 3)


def test_no_filter_of_the_keys_size() -> None:
    with pytest.raises(ValueError, match=r"keys are 7x7 but the bank holds only other sizes \(3 of 3x3, 4 of 5x5\)"):
        analyze(bank_of(noise(4, 5, 5), noise(3, 3, 3)), KEYS)


def test_an_empty_bank() -> None:
    with pytest.raises(ValueError, match="bank is empty"):
        analyze(bank_of(noise(4, 7, 7)).select(model="no such model"), KEYS)


def test_a_control_of_another_size() -> None:
    with pytest.raises(ValueError, match="control keys are 5x5 but the keys are 7x7"):
        analyze(bank_of(noise(4, 7, 7)), KEYS, control=mkf.keys.random(5, 8, seed=0))


@pytest.mark.parametrize("on_disk", [False, True])
def test_batches_change_nothing(on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(noise(700, 7, 7), noise(33, 7, 7, seed=2))
    whole = analyze(bank, KEYS)
    if on_disk:
        bank.save(tmp_path / "bank")
        bank = FilterBank.open(tmp_path / "bank")
    monkeypatch.setattr(counting, "_BATCH_ROWS", 100)
    seen: list[tuple[int, int]] = []
    batched = analyze(bank, KEYS, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) >= 8
    assert seen[-1] == (733, 733)
    assert all(done <= total == 733 for done, total in seen)
    one, other = whole.to_dict(), batched.to_dict()
    assert one["total"].pop("mean_correlation") == pytest.approx(other["total"].pop("mean_correlation"), rel=1e-12)
    assert one["total"] == other["total"]
    assert np.array_equal(whole.sample.filters, batched.sample.filters)


def test_controls_are_counted_but_not_shown() -> None:
    trained, untrained = shifted(KEYS, [0, 1]), noise(5, 7, 7)
    banks = {"net": bank_of(trained), "net-untrained": bank_of(untrained)}
    named = {name: FilterBank.from_layers([Layer("0", bank.filters)], name) for name, bank in banks.items()}
    both = analyze(FilterBank.concat(named.values()), KEYS)
    assert both.tally.filters == 7
    assert len(both.sample) == 2
    assert len(analyze(named["net-untrained"], KEYS).sample) == 5


def test_the_sample_is_bounded_and_holds_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_SAMPLE_PER_KEY", 5)
    bank = bank_of(noise(400, 7, 7))
    analysis = analyze(bank, KEYS)
    index = fit_float64(torch.from_numpy(analysis.sample.filters), KEYS)[0]
    assert np.bincount(index, minlength=8).tolist() == np.minimum(analysis.tally.counts, 5).tolist()


def test_models_are_summed() -> None:
    one, other = bank_of(noise(5, 7, 7)), bank_of(noise(7, 7, 7, seed=1), noise(2, 7, 7, seed=2))
    parts = [analyze(bank, KEYS).tally for bank in (one, other)]
    total = parts[0] + parts[1]
    assert total.filters == 14
    assert total.counts.tolist() == (parts[0].counts + parts[1].counts).tolist()
    weighted = (parts[0].mean_correlation * 5 + parts[1].mean_correlation * 9) / 14
    assert total.mean_correlation == pytest.approx(weighted)
    empty = Tally.empty(8)
    assert (total + empty).to_dict() == total.to_dict()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_histogram_quantiles_are_numpys_to_half_a_bin(values: list[float]) -> None:
    histogram = np.bincount(np.minimum((np.array(values) * 64).astype(int), 63), minlength=64)
    assert histogram_quantile(histogram, QUANTILES) == pytest.approx(
        np.quantile(values, QUANTILES), abs=0.5 / 64 + 1e-9
    )


def test_white_noise_is_the_same_under_another_default_dtype() -> None:
    expected = counting.noise_correlation(KEYS)
    torch.set_default_dtype(torch.float64)
    try:
        assert counting.noise_correlation(KEYS) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_white_noise() -> None:
    assert counting.noise_correlation(KEYS) == pytest.approx(0.24, abs=0.005)
    # Filters of noise are no better off with the published keys than with random ones.
    tally = analyze(bank_of(noise(1000, 7, 7, seed=3)), KEYS).tally
    assert tally.mean_correlation == pytest.approx(0.24, abs=0.01)
    assert tally.residual_quantiles[2] == pytest.approx(tally.control_quantiles[2], abs=0.02)


def test_the_json_document_is_finite_and_complete() -> None:
    bad = noise(3, 7, 7)
    bad[0, 0, 0] = math.nan
    document = analyze(bank_of(bad, torch.zeros(2, 7, 7)), KEYS).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["schema"] == "mkf.analysis/2"
    assert np.shape(document["keys"]["filters"]) == (8, 7, 7)
    model = document["models"][0]
    assert [layer["non_finite_channels"] for layer in model["layers"]] == [[0], []]
    assert [layer["normalised_depth"] for layer in model["layers"]] == [0, 1]
    assert document["total"]["filters"] == sum(layer["filters"] for layer in model["layers"]) == 5
    assert document["quantiles"] == list(QUANTILES)


def test_the_json_document_tells_what_made_it_and_of_what() -> None:
    layers = [Layer("1", noise(3, 7, 7)), Layer("2", noise(3, 7, 7))]
    bank = FilterBank.from_layers(layers, "one", source="file.pth", licence="MIT")
    document = analyze(FilterBank.concat([bank, FilterBank.from_layers(layers, "two")]), KEYS).to_dict()
    assert document["mkf"] == mkf.__version__
    told = [(model["model"], model["source"], model["licence"]) for model in document["models"]]
    assert told == [("one", "file.pth", "MIT"), ("two", "", "")]


def test_real_filters(data_dir: Path) -> None:
    analysis = analyze(FilterBank.from_checkpoint(data_dir / "filters" / "trained_k7.safetensors"), KEYS)
    assert analysis.tally.filters == 2157
    assert sum(len(model.layers) for model in analysis.models) == 17
    assert analysis.tally.live == 2151
    assert analysis.tally.mean_correlation == pytest.approx(0.6352, abs=1e-4)
    assert all(0.61 < model.tally.mean_correlation < 0.725 for model in analysis.models)
    assert analysis.tally.residual_quantiles[2] < analysis.tally.control_quantiles[2] - 0.1


def test_a_real_training_checkpoint(data_dir: Path) -> None:
    analysis = analyze(FilterBank.from_checkpoint(data_dir / "filters" / "team38_rfdnext.pth"), KEYS)
    assert [len(analysis.models[0].layers), analysis.tally.filters] == [4, 200]
    assert analysis.tally.mean_correlation == pytest.approx(0.7189, abs=1e-4)


def named(**banks: FilterBank) -> FilterBank:
    """One bank of these, each called by its name with a dash for two underscores."""
    parts = []
    for name, bank in banks.items():
        layers = [Layer(row["layer"], bank.select(layer=row["layer"]).filters) for row in bank.layers().to_pylist()]
        parts.append(FilterBank.from_layers(layers, name.replace("__", "-")))
    return FilterBank.concat(parts)


def test_families() -> None:
    assert [
        statistics.family(model)
        for model in ("convnextv2_tiny.fcmae_ft_in1k", "convmixer_768_32", "mcunet-5fps", "net", "net-x-untrained", "_")
    ] == ["convnextv2", "convmixer", "mcunet", "net", "net-untrained", "_"]
    assert [
        statistics.family(model)
        for model in (
            "tf_efficientnet_b0.in1k", "hf-hub:timm/convnext_tiny", "test_convnext.r160_in1k",
            "hf-hub:timm/tf_efficientnet_b0.in1k", "efficientnet_b0-untrained", "tf_efficientnet_b0-untrained", "test_",
        )
    ] == ["efficientnet", "convnext", "convnext", "efficientnet", *["efficientnet-untrained"] * 2, "test_"]  # fmt: skip
    analysis = analyze(
        named(
            a_1=bank_of(shifted(KEYS, [0, 0, 0, 1])),
            a_2=bank_of(shifted(KEYS, [0, 1])),
            b=bank_of(shifted(KEYS, [7, 7])),
            dead=bank_of(torch.zeros(2, 7, 7)),
        ),
        KEYS,
    )
    first, second = analysis.families
    assert [first.family, second.family] == ["a", "b"]
    assert first.tally.counts.tolist()[:2] == [4, 2]
    assert first.spread[:2] == pytest.approx([0.125 * math.sqrt(2)] * 2)
    assert np.isnan(second.spread).all()
    assert analysis.to_dict()["families"][1]["spread"] == [None] * 8
    assert first.distance == pytest.approx(0.25)
    assert math.isnan(second.distance)
    within, between = analysis.family_distance
    assert (within, between) == pytest.approx((0.25, 1))


def test_depths() -> None:
    analysis = analyze(bank_of(*[noise(n, 7, 7, seed=n) for n in (2, 3, 4)]), KEYS)
    assert [tally.filters for tally in analysis.over_depth(4)] == [2, 0, 3, 4]
    assert sum(tally.filters for tally in analysis.over_depth()) == 9


@pytest.mark.parametrize("layers", [11, 21, 31, 101])
def test_depths_at_the_edges_of_their_parts(layers: int) -> None:
    bank = FilterBank.from_layers([Layer(str(n), noise(1, 7, 7, seed=n)) for n in range(layers)], "net")
    analysis = analyze(bank, KEYS)
    for bins in (1, 3, 5, 7, 10):
        wanted = [0] * bins
        for n in range(layers):
            wanted[min(n * bins // (layers - 1), bins - 1)] += 1
        assert [tally.filters for tally in analysis.over_depth(bins)] == wanted


def test_residuals_key_by_key() -> None:
    one, other = noise(120, 7, 7), noise(30, 7, 7, seed=1)
    analysis = analyze(named(a=bank_of(one), b=bank_of(other)), KEYS)
    assert analysis.key_residuals.groups == ("a", "b")
    index, _, correlation = fit_float64(torch.cat([one, other]), KEYS)
    residual = np.sqrt(1 - correlation**2)
    for key, entry in enumerate(analysis.to_dict()["key_residuals"]):
        of_key = residual[index == key]
        assert entry["filters"] == len(of_key)
        assert entry["mean"] == pytest.approx(of_key.mean(), abs=1e-5)
        assert entry["std"] == pytest.approx(of_key.std(), abs=1e-5)
        assert entry["quantiles"] == pytest.approx(np.quantile(of_key, QUANTILES), abs=1 / RESIDUAL_BINS)
    control = np.sqrt(1 - fit_float64(torch.cat([one, other]), analysis.control)[2] ** 2)
    assert analysis.to_dict()["control_residuals"]["mean"] == pytest.approx(control.mean(), abs=1e-5)


@pytest.mark.parametrize("rows", [10**6, 7])
def test_duplicates_and_dimension(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_BATCH_ROWS", rows)  # layers are cut, and counted all the same
    first, second = noise(40, 7, 7), noise(20, 7, 7, seed=1)
    first[30:] = -2 * first[:10] + 1
    second[:5] = first[:5]  # in another layer, which does not count
    analysis = analyze(named(a=bank_of(first, second), b=bank_of(noise(9, 7, 7, seed=2))), KEYS)
    assert [layer.tally.duplicates for layer in analysis.models[0].layers] == [10, 0]
    assert analysis.tally.duplicates == 10
    assert analysis.models[0].effective_dimension == pytest.approx(
        mkf.analysis.effective_dimension(torch.cat([first, second]))
    )


@pytest.mark.parametrize("rows", [10**6, 7])
def test_duplicates_of_a_layer_too_large_to_compare_are_not_counted(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_BATCH_ROWS", rows)
    monkeypatch.setattr(counting, "DUPLICATES_WITHIN", 40)
    analysis = analyze(bank_of(noise(20, 7, 7).repeat(2, 1, 1), noise(41, 7, 7), noise(9, 7, 7)), KEYS)
    assert [layer.tally.duplicates for layer in analysis.models[0].layers] == [20, None, 0]
    document = json.loads(json.dumps(analysis.to_dict()))
    assert document["total"]["duplicates"] is document["models"][0]["duplicates"] is None
    assert [row["duplicates"] for row in report.tables(analysis)["layers"]] == [20, None, 0]
    assert any("not counted, as a layer has more than" in line for line in report.notes(analysis))
    assert "near-duplicates not counted" in sections.summary(analysis)


@pytest.mark.parametrize("rows", [10**6, 50, 7])
def test_filters_of_a_layer_that_do_not_follow_one_another_are_refused(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_BATCH_ROWS", rows)
    one = bank_of(noise(40, 7, 7), noise(10, 7, 7, seed=1))
    with pytest.raises(ValueError, match="layer '0' of model 'Sequential' do not follow one another"):
        analyze(FilterBank.concat([one, one]), KEYS)


@pytest.mark.parametrize("rows", [10**6, 7])
def test_the_atlas(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(noise(200, 7, 7), torch.cat([noise(30, 7, 7, seed=1), torch.zeros(3, 7, 7)]))
    assert all(layer.sample is None for layer in analyze(bank, KEYS).models[0].layers)
    wanted = analyze(bank, KEYS, atlas=4).models[0].layers
    monkeypatch.setattr(counting, "_BATCH_ROWS", rows)
    for number, (layer, other) in enumerate(zip(analyze(bank, KEYS, atlas=4).models[0].layers, wanted, strict=True)):
        sample = layer.sample
        assert np.bincount(sample.index, minlength=8).tolist() == np.minimum(layer.tally.counts, 4).tolist()
        filters = bank.select(layer=str(number)).filters
        assert np.array_equal(sample.filters, filters.numpy()[sample.channel])
        fit = mkf.affine_fit(torch.from_numpy(sample.filters), KEYS)
        assert np.array_equal(sample.index, fit.index)
        assert np.array_equal(sample.scale, fit.scale)
        assert np.array_equal(sample.residual, fit.residual)
        assert np.array_equal(sample.filters, other.sample.filters)


def test_controls_can_be_left_out() -> None:
    bank = named(net=bank_of(shifted(KEYS, [0, 1])), net__untrained=bank_of(noise(9, 7, 7)))
    analysis = analyze(bank, KEYS)
    trained = analysis.trained
    assert [model.model for model in trained.models] == ["net"]
    assert trained.tally.counts.tolist() == trained.key_residuals.over_groups().count[0].tolist()
    assert trained.control_residuals.groups == ("net",)
    assert trained.effective_dimension == pytest.approx(mkf.analysis.effective_dimension(KEYS.filters[:2]))
    controls = analyze(bank.select(model="net-untrained"), KEYS)
    assert controls.trained is controls
