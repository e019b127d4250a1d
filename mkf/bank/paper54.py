"""The checkpoints that the paper took its filters from.

Source: "The Quest for Universal Master Key Filters in DS-CNNs" (NeurIPS 2025), appendix A.2: 54 entries, of which one
(MogaNet tiny at 224) is listed twice, so 53 checkpoints. timm has 38 of them. The others are files their authors
publish elsewhere, and the user has to bring them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mkf.bank import hub, storage
from mkf.bank.checkpoint import stem_of
from mkf.bank.filter_bank import FilterBank

KERNEL_SIZE = 7


class Entry(NamedTuple):
    """One checkpoint of the list.

    Attributes:
        name: timm's name with its tag, or the beginning of the name of the file to bring.
        in_timm: Whether timm has it.
        note: What the file is.
    """

    name: str
    in_timm: bool = True
    note: str = ""


def _timm(architecture: str, *tags: str) -> tuple[Entry, ...]:
    return tuple(Entry(f"{architecture}.{tag}") for tag in tags)


_V2_1K, _V2_22K, _V2_22K_384 = "fcmae_ft_in1k", "fcmae_ft_in22k_in1k", "fcmae_ft_in22k_in1k_384"
_V1_1K, _V1_22K_1K, _V1_22K_1K_384, _V1_22K = "fb_in1k", "fb_in22k_ft_in1k", "fb_in22k_ft_in1k_384", "fb_in22k"

ENTRIES: tuple[Entry, ...] = (
    *(entry for size in ("atto", "femto", "pico") for entry in _timm(f"convnextv2_{size}", _V2_1K)),
    *(
        entry
        for size in ("nano", "tiny", "base", "large")
        for entry in _timm(f"convnextv2_{size}", _V2_1K, _V2_22K, _V2_22K_384)
    ),
    *_timm("convnextv2_huge", _V2_1K, _V2_22K_384, "fcmae_ft_in22k_in1k_512"),
    *(
        entry
        for size in ("tiny", "small", "base", "large")
        for entry in _timm(f"convnext_{size}", _V1_1K, _V1_22K_1K, _V1_22K_1K_384, _V1_22K)
    ),
    *_timm("convnext_xlarge", _V1_22K_1K, _V1_22K_1K_384, _V1_22K),
    Entry("convnext_base_1k_384", in_timm=False, note="ConvNeXt base trained on ImageNet-1k, 384"),
    Entry("convnext_large_1k_384", in_timm=False, note="ConvNeXt large trained on ImageNet-1k, 384"),
    Entry("convnext_xlarge_1k_224", in_timm=False, note="ConvNeXt xlarge trained on ImageNet-1k, 224"),
    Entry("moganet_tiny_sz224", in_timm=False, note="MogaNet tiny, 224, which the list names twice"),
    Entry("moganet_tiny_sz256", in_timm=False, note="MogaNet tiny, 256"),
    *(
        Entry(f"moganet_{size}_sz224", in_timm=False, note=f"MogaNet {size}, 224")
        for size in ("small", "base", "large", "xlarge")
    ),
    *(
        Entry(f"hornet_{size}_7x7", in_timm=False, note=f"HorNet {size} with 7x7 convolutions")
        for size in ("tiny", "small", "base", "large")
    ),
    *_timm("convmixer_768_32", "in1k"),
    Entry("convmixer_512_20", in_timm=False, note="ConvMixer 512/20"),
    Entry("convmixer_768_32_initialised", in_timm=False, note='the ConvMixer that the list calls "768-initialised"'),
)


class Build(NamedTuple):
    """What came of building the list: the bank that was saved, and for each checkpoint that is not in it the reason."""

    bank: FilterBank
    missing: dict[str, str]


def build(
    path: str | os.PathLike[str],
    files: str | os.PathLike[str] | None = None,
    progress: Callable[[Entry], None] = lambda entry: None,
) -> Build:
    """Build the bank of the paper's list as far as its checkpoints can be had, and save it.

    A checkpoint is read from `files` if a file of its name is there, otherwise fetched through timm. What the bank at
    `path` holds already is kept and not fetched again, so that an interrupted or incomplete build can be taken up. What
    was gathered before an interruption is saved. Only the 7x7 filters are kept, as in the paper.

    Args:
        path: Folder of the bank.
        files: Folder of checkpoints you brought: `ENTRY_NAME.safetensors` or another suffix; the names of those that
            are not in timm may go on after the entry's name, as `hornet_tiny_7x7_ema.pth`.
        progress: Called with each entry before it is read or fetched.

    Raises:
        FileExistsError: `path` is a file, or a folder that holds something else than a bank, or besides one.
        FileNotFoundError: There is no folder `files`.
        OSError: The bank cannot be written.
        ValueError: Nothing could be built, or the bank at `path` is damaged.
    """
    if files is not None and not (files := Path(files).expanduser()).is_dir():
        raise FileNotFoundError(f"there is no folder {files}")
    path = storage.settle(path)
    storage.refuse_other_things(path)  # now, and not after all the work
    bank = FilterBank.open(path) if storage.is_bank(path) else FilterBank()
    present = set(bank.models)
    gathered: list[FilterBank] = []
    missing: dict[str, str] = {}
    unreachable = False
    try:
        for entry in ENTRIES:
            progress(entry)
            if entry.name in present:
                continue
            try:
                if file := _brought(entry, files):
                    found = FilterBank.from_checkpoint(file, entry.name)
                elif not entry.in_timm:
                    missing[entry.name] = f"not in timm; bring the file as {entry.name}.pth ({entry.note})"
                    continue
                elif unreachable and not hub.is_cached(entry.name):
                    missing[entry.name] = "the hub cannot be reached, and the weights are not in its cache"
                    continue
                else:
                    found = FilterBank.from_timm(entry.name)
            except (ValueError, OSError) as error:
                missing[entry.name] = str(error)
                unreachable = unreachable or isinstance(error, hub.HubUnreachableError)
                continue
            found = found.select(k=KERNEL_SIZE)
            if len(found):
                gathered.append(found)
            else:
                missing[entry.name] = f"holds no {KERNEL_SIZE}x{KERNEL_SIZE} depthwise filters"
    finally:
        if gathered:
            FilterBank.concat([bank, *gathered]).save(path)
    if not gathered and not present:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        raise ValueError(f"none of the {len(ENTRIES)} checkpoints could be had:\n{reasons}")
    return Build(FilterBank.open(path), missing)


def _brought(entry: Entry, files: str | os.PathLike[str] | None) -> Path | None:
    """The file brought for an entry; timm's names begin like each other, so theirs must match to the end."""
    if files is None:
        return None
    for file in sorted(Path(files).iterdir()):
        stem = stem_of(file)
        if (
            file.is_file()
            and file.name != stem
            and (stem == entry.name or (not entry.in_timm and stem.startswith(entry.name)))
        ):
            return file
    return None
