"""Filters that are known linear shifts of known keys, plus noise."""

import torch

SHARES = (0.40, 0.22, 0.15, 0.10, 0.07, 0.03, 0.02, 0.01)


def plant(keys, count=20_000, noise=0.3, seed=0, shares=SHARES):
    """`count` filters a * key + b + noise, in random order; the noise has `noise` times the norm of a * key.

    Returns the filters, (count, k, k) float32, and the key of each.
    """
    rng = torch.Generator().manual_seed(seed)
    q = keys.centred().double()
    index = torch.multinomial(torch.tensor(shares, dtype=torch.float64), count, replacement=True, generator=rng)
    a = torch.randn(count, generator=rng).double()
    a = a.sign() * (a.abs() + 0.05)
    b = torch.randn(count, generator=rng).double()
    e = torch.randn(count, *q.shape[1:], generator=rng).double()
    e = e / e.flatten(1).norm(dim=1)[:, None, None] * noise * a.abs()[:, None, None]
    return (a[:, None, None] * q[index] + b[:, None, None] + e).float(), index


def matching(found, truth):
    """|cos| of each true key with the found key that is matched to it, one to one."""
    from scipy.optimize import linear_sum_assignment

    cosines = (truth.centred().flatten(1).double() @ found.centred().flatten(1).double().T).abs().numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return cosines[rows, columns]
