"""The affine fit with numba, for a CPU without the compiled extension (numba_kernel.py)."""

import importlib.util
import os
from functools import cache
from threading import Lock

import torch
from torch import Tensor
from torch.nn.functional import pad

from mkf.kernels.affine_fit import FitKeys, reference

ROWS = 1 << 14  # filters at a time, where they have to be copied into plain rows

_one_at_a_time = Lock()  # where numba finds no OpenMP, it ends a process in which two threads call at once


def why_not(device: torch.device) -> str | None:
    """Needs numba, and one that goes with the numpy that is here."""
    return _missing()


def affine_fit(
    filters: Tensor, keys: FitKeys, positive: bool, index: Tensor, scale: Tensor, shift: Tensor, residual: Tensor
) -> None:
    """See `mkf.kernels.affine_fit`. Uses as many threads as torch does.

    The first call compiles, which takes a few seconds; processes after it find that on disk.
    """
    import numba

    from mkf.kernels.affine_fit import numba_kernel

    if os.getpid() != _process():  # GNU OpenMP would end the process without a word of Python
        raise RuntimeError(
            "numba's threads do not survive a fork: start workers with the method 'spawn', or call "
            "torch.set_num_threads(1) in them and fit with backend='reference'"
        )
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    unit = pad(keys.unit, (0, 0, 0, -len(keys.unit) % numba_kernel.KEYS_AT_ONCE)).numpy()
    inverse_norm, key_mean = keys.inverse_norm.numpy(), keys.mean.numpy()
    dtype = torch.float64 if filters.dtype == torch.float64 else torch.float32  # numba has none of 16 bits
    plain = filters.dtype == dtype and filters.is_contiguous()
    pieces = (x.split(len(x) if plain else ROWS) for x in (filters, index, scale, shift, residual))
    for f, *out in zip(*pieces, strict=True):
        rows = f.flatten(1).to(dtype).contiguous().numpy()
        with _one_at_a_time:
            some_left = numba_kernel.affine_fit(rows, positive, unit, inverse_norm, key_mean, *(x.numpy() for x in out))
        if some_left:
            left = (out[0][:, 0] == numba_kernel.LEFT).nonzero()[:, 0]
            rest = [x[left] for x in out]
            reference.affine_fit(f[left], keys, positive, *rest)
            for x, values in zip(out, rest, strict=True):
                x[left] = values
    if torch.get_num_threads() != threads:  # numba starts its threads through an OpenMP that may be torch's too
        torch.set_num_threads(threads)


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return f"numba does not load: {error}"
    return None


@cache
def _process() -> int:
    """The process in which numba's threads live."""
    return os.getpid()
