"""Peers of `mkf.affine_fit`: functions from filters (N, k*k) to (index, scale, shift, residual).

Keys arrive centred and of norm 1. Filters arrive as they are: taking out their mean and norm is part of the job.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

Peer = Callable[[Tensor], tuple[Any, ...]]


def torch_naive(keys: Tensor) -> Peer:
    """The formulas of the paper as one would first write them: a centred copy, all products, the difference's norm."""

    def run(filters: Tensor) -> tuple[Tensor, ...]:
        mean = filters.mean(1, keepdim=True)
        centred = filters - mean
        index = (centred @ keys.T).abs().argmax(1)
        key = keys[index]
        scale = (centred * key).sum(1)
        return index, scale, mean[:, 0], (centred - scale[:, None] * key).norm(dim=1) / centred.norm(dim=1)

    return run


def torch_gemm(keys: Tensor) -> Peer:
    """One matrix product and no centred copy: centred keys do not see the mean, and norms come from sums of squares."""

    def run(filters: Tensor) -> tuple[Tensor, ...]:
        dot = filters @ keys.T
        index = dot.abs().argmax(1, keepdim=True)
        scale = dot.gather(1, index)[:, 0]
        mean = filters.mean(1)
        squares = filters.square().sum(1) - filters.shape[1] * mean.square()
        return index[:, 0], scale, mean, ((squares - scale.square()).clamp(min=0) / squares).sqrt()

    return run


def torch_compiled(keys: Tensor) -> Peer:
    """`torch_gemm` under torch.compile."""
    compiled: Peer = torch.compile(torch_gemm(keys), dynamic=False)
    return compiled


def faiss_flat(keys: Tensor) -> Peer:
    """The nearest of the keys and their negatives by inner product, then the rest as in `torch_gemm`."""
    import faiss

    both = torch.cat([keys, -keys]).numpy()
    index = faiss.IndexFlatIP(both.shape[1])
    index.add(both)

    def run(filters: Tensor) -> tuple[Any, ...]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        score, found = index.search(filters.numpy(), 1)
        scale = torch.from_numpy(np.where(found < len(keys), score, -score)[:, 0])
        mean = filters.mean(1)
        squares = filters.square().sum(1) - filters.shape[1] * mean.square()
        return found[:, 0] % len(keys), scale, mean, ((squares - scale.square()).clamp(min=0) / squares).sqrt()

    return run


def sklearn_argmin(keys: Tensor) -> Peer:
    """The nearest of the keys and their negatives among normalised filters, by scikit-learn's chunked kernel."""
    from sklearn.metrics import pairwise_distances_argmin_min

    both = torch.cat([keys, -keys]).numpy()

    def run(filters: Tensor) -> tuple[Any, ...]:
        mean = filters.mean(1, keepdim=True)
        centred = filters - mean
        norm = centred.norm(dim=1)
        found, distance = pairwise_distances_argmin_min((centred / norm[:, None]).numpy(), both)
        cosine = torch.from_numpy(1 - distance**2 / 2)
        scale = torch.from_numpy(np.where(found < len(keys), 1, -1)) * cosine * norm
        return found % len(keys), scale, mean[:, 0], (1 - cosine.square()).clamp(min=0).sqrt()

    return run


def available() -> dict[str, Callable[[Tensor], Peer]]:
    """The peers whose libraries are installed."""
    peers: dict[str, Callable[[Tensor], Peer]] = {
        "torch, naive": torch_naive,
        "torch, one GEMM": torch_gemm,
        "torch.compile, one GEMM": torch_compiled,
    }
    if find_spec("faiss"):
        peers["faiss IndexFlatIP"] = faiss_flat
    if find_spec("sklearn"):
        peers["scikit-learn argmin"] = sklearn_argmin
    return peers
