"""Devices by name."""

import torch


def find_device(name: str) -> torch.device:
    """Return the device of a name after trying it; of `auto` CUDA if there is one, else the CPU.

    Raises:
        ValueError: It cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
