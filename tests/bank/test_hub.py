"""timm's models by name, without a network."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from mkf.bank import FilterBank, hub, load, paper54


def no_network(*args: Any, **kwargs: Any) -> None:
    raise LocalEntryNotFoundError("cannot find the requested files")


@pytest.mark.parametrize(
    ("name", "filters"), [("convnextv2_pico", 2944), ("convnextv2_tiny", 6624), ("convmixer_768_32", 24576)]
)
def test_untrained_models(name: str, filters: int) -> None:
    bank = FilterBank.from_timm(name, pretrained=False)
    assert (len(bank), bank.kernel_sizes, bank.models) == (filters, (7,), (f"{name}-untrained",))
    assert bank.filters.shape == (filters, 7, 7)
    assert bank.layers()["source"][0].as_py() == f"timm {timm.__version__}, untrained"


def test_several_names_and_mixed_kernel_sizes() -> None:
    bank = FilterBank.from_timm(["mixnet_s", "convnextv2_atto.fcmae"], pretrained=False)
    assert bank.models == ("mixnet_s-untrained", "convnextv2_atto-untrained")
    assert bank.kernel_sizes == (3, 5, 7, 9, 11)
    assert set(bank.select(model="mixnet_s-untrained").layers()["stride"].to_pylist()) == {1, 2}


def test_trained_models_are_named_with_tag_source_and_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    bank = FilterBank.from_timm("convnextv2_atto")
    assert bank.models == ("convnextv2_atto.fcmae_ft_in1k",)
    row = bank.layers().slice(0, 1).to_pylist()[0]
    assert row["source"] == f"timm/convnextv2_atto.fcmae_ft_in1k, timm {timm.__version__}"
    assert row["licence"] == "cc-by-nc-4.0"


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(ValueError, match="timm has no model 'ConvNextV2_pcio'; did you mean convnextv2_pico, "):
        FilterBank.from_timm("ConvNextV2_pcio", pretrained=False)
    with pytest.raises(ValueError, match=r"no weights 'convnextv2_pico\.in1k'; did you mean convnextv2_pico\.fcmae, "):
        FilterBank.from_timm("convnextv2_pico.in1k")
    with pytest.raises(ValueError, match="timm has no trained weights for 'convnext"):
        FilterBank.from_timm(next(name for name in timm.list_models("convnext*") if not timm.is_model_pretrained(name)))


def test_without_network_the_error_says_what_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_network)
    message = (
        r"could not fetch the weights of convnextv2_atto from "
        r"https://huggingface\.co/timm/convnextv2_atto\.fcmae_ft_in1k \(cannot find.*from_checkpoint\(path\)"
    )
    with pytest.raises(OSError, match=message):
        FilterBank.from_timm("convnextv2_atto")


def test_load_tells_folders_files_and_names_apart(small_bank: FilterBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "bank")
    assert len(load(str(tmp_path / "bank"))) == 18
    torch.save({"c.weight": torch.ones(4, 1, 3, 3)}, tmp_path / "net.pth")
    assert len(load(str(tmp_path / "net.pth"))) == 4
    assert load("convnextv2_atto", pretrained=False).models == ("convnextv2_atto-untrained",)
    for missing in ("net.pth", "some/where"):
        with pytest.raises(FileNotFoundError, match=f"there is no file or folder {missing}"):
            load(missing)


def test_the_paper_list_has_54_entries_one_of_them_twice_and_timm_has_38() -> None:
    names = [entry.name for entry in paper54.ENTRIES]
    assert len(names) == len(set(names)) == 53
    in_timm = [entry.name for entry in paper54.ENTRIES if entry.in_timm]
    assert len(in_timm) == 38
    assert set(in_timm) <= set(timm.list_pretrained())


def brought(folder: Path, name: str, k: int = 7) -> None:
    folder.mkdir(exist_ok=True)
    torch.save(
        {"model": {"conv.weight": torch.ones(4, 1, k, k), "small.weight": torch.ones(4, 1, 3, 3)}}, folder / name
    )


def test_paper54_builds_what_it_can_names_the_rest_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def from_timm(cls: type[FilterBank], name: str) -> FilterBank:
        tried.append(name)
        if name.startswith("convnextv2"):
            return FilterBank.from_model(torch.nn.Conv2d(8, 8, 7, groups=8), name)
        raise OSError(f"no {name} today")

    monkeypatch.setattr(FilterBank, "from_timm", classmethod(from_timm))
    brought(tmp_path / "files", "hornet_tiny_7x7_ema.pth")
    brought(tmp_path / "files", "convnext_tiny.fb_in22k.pth")  # not the name of convnext_tiny.fb_in22k_ft_in1k
    brought(tmp_path / "files", "moganet_tiny_sz224_ep300.pth.tar", k=5)
    seen: list[str] = []
    bank, missing = paper54.build(tmp_path / "bank", tmp_path / "files", lambda entry: seen.append(entry.name))
    assert len(seen) == 53
    assert len(bank.models) == 18 + 2
    assert bank.kernel_sizes == (7,)
    assert len(missing) == 53 - 20
    assert missing["convnext_tiny.fb_in22k_ft_in1k"] == "no convnext_tiny.fb_in22k_ft_in1k today"
    assert missing["moganet_tiny_sz224"] == "holds no 7x7 depthwise filters"
    assert "not in timm; bring the file as hornet_small_7x7.pth" in missing["hornet_small_7x7"]
    assert "convnext_tiny.fb_in22k" not in tried

    tried.clear()
    brought(tmp_path / "files", "hornet_small_7x7.pth")
    again, missing = paper54.build(tmp_path / "bank", tmp_path / "files")
    assert len(again.models) == 21
    assert again.models[:20] == bank.models
    assert not any(name.startswith("convnextv2") for name in tried)
    assert len(missing) == 53 - 21


def test_paper54_keeps_what_it_has_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_timm(cls: type[FilterBank], name: str) -> FilterBank:
        if "femto" in name:
            raise KeyboardInterrupt
        return FilterBank.from_model(torch.nn.Conv2d(8, 8, 7, groups=8), name)

    monkeypatch.setattr(FilterBank, "from_timm", classmethod(from_timm))
    with pytest.raises(KeyboardInterrupt):
        paper54.build(tmp_path / "bank")
    assert FilterBank.open(tmp_path / "bank").models == ("convnextv2_atto.fcmae_ft_in1k",)


def test_paper54_goes_on_with_the_bank_that_a_killed_run_had_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_timm(cls: type[FilterBank], name: str) -> FilterBank:
        raise OSError(f"no {name} today")

    monkeypatch.setattr(FilterBank, "from_timm", classmethod(from_timm))
    monkeypatch.setenv("HOME", str(tmp_path))
    brought(tmp_path / "files", "hornet_tiny_7x7.pth")
    paper54.build("~/bank", "~/files")
    (tmp_path / "bank").rename(tmp_path / ".bank.previous")  # what a process leaves that is killed between the renames
    (tmp_path / "files" / "hornet_tiny_7x7.pth").unlink()
    brought(tmp_path / "files", "hornet_small_7x7.pth")
    assert paper54.build("~/bank", "~/files").bank.models == ("hornet_tiny_7x7", "hornet_small_7x7")


def test_paper54_goes_on_with_a_bank_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FilterBank, "from_timm", classmethod(no_network))
    monkeypatch.setenv("HOME", str(tmp_path))
    FilterBank.from_model(torch.nn.Conv2d(8, 8, 7, groups=8), "hornet_tiny_7x7").save("~/bank")
    assert paper54.build("~/bank").bank.models == ("hornet_tiny_7x7",)


def test_paper54_refuses_a_folder_of_other_things_before_it_reads(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other files and no bank"):
        paper54.build(tmp_path, progress=lambda entry: pytest.fail(f"read {entry.name}"))


def test_a_cached_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {("timm/convnextv2_atto.fcmae_ft_in1k", "model.safetensors"): "/cache/file"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *key: cached.get(key))
    assert hub.is_cached("convnextv2_atto.fcmae_ft_in1k")
    assert not hub.is_cached("convnextv2_femto.fcmae_ft_in1k")


def test_paper54_without_network_tries_the_hub_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *a, **k: calls.append(1) or no_network())
    monkeypatch.setattr(hub, "is_cached", lambda name: False)
    with pytest.raises(ValueError, match="none of the 53 checkpoints could be had") as caught:
        paper54.build(tmp_path / "bank")
    assert "convnextv2_atto.fcmae_ft_in1k: could not fetch" in str(caught.value)
    assert "convnext_tiny.fb_in1k: the hub cannot be reached" in str(caught.value)
    assert 1 <= len(calls) <= 2
    assert not (tmp_path / "bank").exists()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        paper54.build(tmp_path / "bank", tmp_path / "nowhere")
