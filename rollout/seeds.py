"""Seeds as pure functions of what they are for, so that no result depends on who computed it or in which order."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_of(*parts: object) -> int:
    """A 62-bit seed from the parts' text: `seed_of(run_seed, iteration, prompt_id, member, "noise")`.

    The same parts give the same seed in every process and on every platform (BLAKE2b, not Python's salted `hash`).
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def torch_generator(*parts: object) -> torch.Generator:
    """A CPU generator, so that the numbers drawn do not depend on the device they are used on."""
    return torch.Generator().manual_seed(seed_of(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(seed_of(*parts))
