"""Keys that mean nothing, to compare with."""

import torch

from mkf.keys.key_set import KeySet, check_size


def random(k: int = 7, n: int = 8, seed: int = 0) -> KeySet:
    """A control: n keys of k x k Gaussian white noise, centred, of norm 1.

    They are drawn on the CPU in float64 by a generator of their own, so neither the default device nor
    `torch.manual_seed` changes them.

    Raises:
        ValueError: k even or not in 3..11, n not in 1..256.
    """
    check_size(n, k)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(n, k, k, generator=generator, dtype=torch.float64, device="cpu")
    return KeySet(
        noise - noise.mean((1, 2), keepdim=True),
        [f"random {i + 1}" for i in range(n)],
        ["white noise"] * n,
        provenance=f"Gaussian white noise, seed {seed}",
    )
