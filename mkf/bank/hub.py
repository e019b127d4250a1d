"""Create timm's models, and say what is wrong with a name or the network."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from torch import nn

from mkf.bank.schema import UNTRAINED


class Created(NamedTuple):
    """A timm model, what a bank calls it (`...-untrained` if it is), and where its weights come from."""

    model: nn.Module
    name: str
    source: str
    licence: str


class UnknownModelError(ValueError):
    """timm has no model of that name."""


class HubError(OSError):
    """The weights could not be fetched."""


class HubUnreachableError(HubError):
    """No connection to the hub: other weights cannot be fetched either."""


def create(name: str, pretrained: bool) -> Created:
    """Create a timm model.

    Raises:
        ValueError: timm does not know the name, or has no weights for it.
        HubError: The weights could not be fetched or loaded.
    """
    import timm
    from huggingface_hub.errors import LocalEntryNotFoundError

    check_name(name, pretrained)
    if not pretrained:
        architecture = name if ":" in name else name.partition(".")[0]
        return Created(timm.create_model(name), architecture + UNTRAINED, f"timm {timm.__version__}, untrained", "")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the libraries below have no error class in common
        unreachable = isinstance(error, LocalEntryNotFoundError | ConnectionError)
        raise (HubUnreachableError if unreachable else HubError)(
            f"could not fetch the weights of {name} from {_location(name)} "
            f"({str(error).strip() or type(error).__name__}); bring the file from elsewhere and pass its path "
            "instead of the name (in Python: FilterBank.from_checkpoint(path))"
        ) from error
    config = model.pretrained_cfg
    full_name = f"{config['architecture']}.{config['tag']}" if config.get("tag") else name
    source = f"{config.get('hf_hub_id') or config.get('url') or name}, timm {timm.__version__}"
    return Created(model, full_name, source, config.get("license") or "")


def check_name(name: str, pretrained: bool) -> None:
    """Refuse a name that timm does not know, or has no weights for, and suggest near ones."""
    import timm

    if ":" in name:  # hf-hub:owner/model and the like, which timm resolves itself
        return
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        known = [*timm.list_models(), *timm.list_pretrained()]
        raise UnknownModelError(
            f"timm has no model {name!r}" + _suggest(difflib.get_close_matches(name.lower(), known, n=4))
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"timm has no weights {name!r}" + _suggest(tags)) from error
    if pretrained and not (config and config.has_weights):
        raise ValueError(f"timm has no trained weights for {name!r}" + _suggest(tags))


def is_cached(name: str) -> bool:
    """Whether the weights of a timm model lie in the hub's cache."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)


def _location(name: str) -> str:
    import timm

    if ":" in name:
        return name
    config = timm.get_pretrained_cfg(name)
    return f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else str(config.url)


def _suggest(names: list[str]) -> str:
    return f"; did you mean {', '.join(names)}?" if names else ""
