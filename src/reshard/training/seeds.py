"""Where random numbers come from: one seed, and the place at which they are drawn."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derived_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for a purpose: the same for the same arguments, on any machine and in any version."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed every generator of this process: Python's, numpy's and torch's."""
    import torch  # who trains with another framework needs none of it

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what libraries draw from
    torch.manual_seed(seed)
