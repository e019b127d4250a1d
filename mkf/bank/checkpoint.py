"""Checkpoint files: read without ever running what is in them, and written as a whole or not at all."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mkf._files import replacing
from mkf.bank.compact import expand, is_part
from mkf.bank.extract import is_depthwise, unshared, without_compiled
from mkf.bank.schema import KERNEL_SIZES, Layer
from mkf.keys.storage import FORMAT as KEY_FILE

# Where training scripts put the weights; averaged weights first, since those are what is evaluated and published.
ENTRIES = ("model_ema", "state_dict_ema", "params_ema", "model", "state_dict", "model_state_dict", "params")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


class Checkpoint(NamedTuple):
    """What a file holds: layers by model in order of depth, and where they come from."""

    models: dict[str, list[Layer]]
    source: str
    licence: str
    skipped: list[str]


def read(path: str | os.PathLike[str], name: str | None = None) -> Checkpoint:
    """Read the depthwise filters of a file; `FilterBank.from_checkpoint` tells the rules."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint file; a saved bank is read by FilterBank.open")
    if path.suffix == ".safetensors":
        tensors, licence, source = *_read_safetensors(path), path.name
    else:
        entry, tensors = _weights(_load(path), path)
        tensors = expand(tensors)
        licence, source = "", path.name + (f", entry {entry}" if entry else "")

    models: dict[str, list[Layer]] = {}
    skipped = []
    for key, tensor in tensors.items():
        if not is_depthwise(key, tensor.shape):
            continue
        model, layer = _model_and_layer(key)
        k = tensor.shape[-1]
        if tensor.shape[-2] != k or k not in KERNEL_SIZES or not tensor.is_floating_point():
            kind = "" if tensor.is_floating_point() else f" {tensor.dtype}"
            skipped.append(f"{key} ({tensor.shape[-2]}x{k}{kind})")
        else:
            models.setdefault(model or name or stem_of(path), []).append(Layer(layer, tensor))
    if not models:
        raise ValueError(
            f"no depthwise filters in {path.name}: no weight has the shape (C, 1, k, k) with C > 1 and k odd, 3 to 11"
            + (f"; other sizes or types: {', '.join(skipped)}" if skipped else "")
        )
    models = {model: unshared(layers) for model, layers in models.items()}
    for layers in models.values():
        if twice := [name for name, times in Counter(layer.name for layer in layers).items() if times > 1]:
            raise _twice(path, twice[0])
    return Checkpoint(models, source, licence, skipped)


def state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, by the names in the model without wrappers; keys are written out as filters.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, needs code to run, holds no weights, or two by one name but for wrappers.
    """
    return expand(stored_state_dict(path))


def stored_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The same as it is stored, which may be compact.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        ValueError: It is damaged, needs code to run, holds no weights, or two by one name but for wrappers.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the checkpoint in it, such as {path / 'model.safetensors'}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        tensors = _weights(_load(path), path)[1]
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        other = plain.setdefault(_unwrapped(name), tensor)
        if other is not tensor and (other.dtype != tensor.dtype or not torch.equal(other, tensor)):
            raise _twice(path, _unwrapped(name))
    return plain


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file tells of itself; other checkpoints tell nothing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return {}
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def write(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict as a safetensors file, beside its place and moved there, so that no half file is left.

    Who may read the file, the umask decides; what safetensors' own `save_file` writes, its owner alone may.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors.torch import save

    # Copies, because a state dict may hold one tensor under two names, which the format refuses.
    plain = torch.contiguous_format
    copies = {name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in state.items()}
    data = save(copies, dict(metadata))
    with replacing(path) as file:
        file.write(data)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    with _open_safetensors(path) as file:
        metadata = file.metadata() or {}
        shapes = {key: file.get_slice(key).get_shape() for key in sorted(file.keys(), key=_natural)}
        wanted = [key for key in shapes if is_depthwise(key, shapes[key]) or is_part(key)]
        tensors = expand({key: file.get_tensor(key) for key in wanted})
    return tensors, metadata.get("licence", metadata.get("license", ""))


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open; that it holds keys and no network, or is damaged, is told by its name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == KEY_FILE:
                raise _keys(path)
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file; it may be truncated: {error}") from error


def _load(path: Path) -> Any:
    _refuse_other_kinds(path)
    # argparse.Namespace only holds values; timm's training script keeps its arguments in one.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, EOFError, OSError and others
            if code := re.search(r"unsupported global:?\s+(?:GLOBAL\s+)?(\S+)", str(error), re.IGNORECASE):
                raise ValueError(
                    f"{path} is a pickle that needs code to run ({code[1]}); mkf never runs code from a file. "
                    "If you trust the file, save its tensors alone, then read those: "
                    "state = torch.load(path, weights_only=False)['state_dict'] (or the entry that holds the weights; "
                    "of a whole model its .state_dict()); "
                    "safetensors.torch.save_file(state, 'weights.safetensors')"
                ) from error
            # torch's own text is left out: it advises to load the file with weights_only=False.
            raise ValueError(
                f"{path} is truncated, damaged, or no PyTorch checkpoint of tensors ({type(error).__name__})"
            ) from error


def _refuse_other_kinds(path: Path) -> None:
    """Say what a file is that is whole but holds no checkpoint."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path} is an array of numpy and no checkpoint: give it to mkf fit")
    if re.match(rb"(\xef\xbb\xbf)?\s*Filter\s", start):
        raise _keys(path)
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:  # what is no archive, or damaged, comes later
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError(
                f"{path} is a TorchScript program and no checkpoint: save its state_dict, then read that: "
                "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
            )


def _keys(path: Path) -> ValueError:
    return ValueError(f"{path} is a key file and no network: give it to --keys")


def _weights(checkpoint: Any, path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Find the state dict in a checkpoint: the name of its entry, and its tensors."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict or a checkpoint with one")
    candidates = {**{entry: checkpoint.get(entry) for entry in ENTRIES}, "": checkpoint}
    for entry, state in candidates.items():
        if isinstance(state, Mapping) and any(isinstance(value, torch.Tensor) for value in state.values()):
            return entry, {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    raise ValueError(
        f"no weights in {path.name}: looked for {', '.join(ENTRIES)} or a bare state dict, "
        f"found {', '.join(map(str, checkpoint)) or 'nothing'}"
    )


def _model_and_layer(key: str) -> tuple[str, str]:
    """Split `MODEL/LAYER`, or the name in a state dict, where the model is nameless; strip what wrappers added."""
    model, _, layer = key.rpartition("/")
    return model, _unwrapped(layer).removesuffix(".weight")


def _twice(path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path.name} holds {name} twice, with and without what DataParallel or torch.compile put before it, and they "
        "differ: save those of one of the two alone"
    )


def _unwrapped(name: str) -> str:
    """The name without what DataParallel and torch.compile put into it."""
    return without_compiled(re.sub(r"^((module|_orig_mod)\.)+", "", name))


def _natural(key: str) -> list[str | int]:
    """Sort key by which blocks.3 comes before blocks.10: text and numbers alternate, so like is compared with like."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def stem_of(path: Path) -> str:
    """The file's name without the suffixes of a checkpoint (`x.pth.tar` is x)."""
    name = path.name
    while name.endswith(SUFFIXES):
        name = name.rpartition(".")[0]
    return name or path.name
