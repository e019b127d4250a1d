"""The affine fit against one read of the bank and against its peers."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from mkf.benchmarks.measure import Result, take_turns
from mkf.benchmarks.peers import affine_fit as peers
from mkf.kernels import registry
from mkf.ops import affine_fit

READ = "read (x.sum())"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def problem(count: int, keys_count: int, k: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Filters (N, k*k) of white noise and keys (K, k, k), centred and of norm 1."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(keys_count, k * k, generator=generator)
    keys -= keys.mean(1, keepdim=True)
    keys /= keys.norm(dim=1, keepdim=True)
    filters = torch.randn(count, k * k, generator=generator)
    return filters.to(device, dtype), keys.unflatten(1, (k, k)).to(device)


def candidates(filters: Tensor, keys: Tensor, names: Iterable[str] | None = None) -> dict[str, Callable[[], object]]:
    """The read, ours and the peers on one problem; `names` keeps those whose name starts with one of them."""
    found: dict[str, Callable[[], object]] = {READ: lambda: filters.sum()}
    for implementation in registry.implementations("affine_fit"):
        if implementation.why_not(filters.device) is None and implementation.name != "reference":
            found[f"mkf {implementation.name}"] = partial(affine_fit, filters, keys, backend=implementation.name)
    if filters.dtype == torch.float32 and filters.device.type == "cpu":
        for name, make in peers.available().items():
            found[name] = partial(make(keys.flatten(1)), filters)
    if names is not None:
        wanted = tuple(names)
        if not any(name.startswith(wanted) for name in found):
            raise ValueError(f"no candidate's name starts with {' or '.join(wanted)}; there are {', '.join(found)}")
        found = {name: run for name, run in found.items() if name == READ or name.startswith(wanted)}
    return found


def run(
    count: int = 1_000_000,
    keys_count: int = 8,
    k: int = 7,
    dtype: str = "float32",
    rounds: int = 15,
    names: Iterable[str] | None = None,
    patience: float | None = None,
) -> Result:
    """Time all candidates on one problem, in turns, relative to one read of the filters."""
    filters, keys = problem(count, keys_count, k, DTYPES[dtype])
    what = {"operator": "affine_fit", "filters": count, "keys": keys_count, "k": k, "dtype": dtype}
    return take_turns(candidates(filters, keys, names), READ, what, rounds, patience=patience)
