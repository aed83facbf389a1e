"""Weights on their way from the learner to the rollout workers, with a version and a digest that the receiver checks.

They travel as they are stored: the adapters alone with LoRA, bfloat16 in 16 bits. On the way memory is copied twice,
into the object store and out of it, and read twice, for the digests of what was sent and of what arrived.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.policy import DragPolicy

WORDS = 4096  # of 8 bytes, that are summed for the digest


@dataclass(frozen=True)
class Weights:
    """version: counts the learner's updates. digest: of the arrays, by name. arrays: numpy, as the object store
    shares them; int16 holds the bits of bfloat16.
    """

    version: int
    digest: str
    arrays: Mapping[str, np.ndarray]


def pack(state: Mapping[str, Tensor], version: int, copy: bool = True) -> Weights:
    """copy: False where the weights are sent or installed before the state changes again; otherwise `install` finds
    that they changed."""
    arrays = {name: _array(tensor) for name, tensor in state.items()}
    if copy:
        arrays = {name: array.copy() for name, array in arrays.items()}
    return Weights(version, digest(arrays), arrays)


def install(policy: DragPolicy, weights: Weights) -> str:
    """Loads the weights and returns the digest of what the policy then holds, in the types that were sent; ValueError
    when it differs."""
    sent = {name: _tensor(array) for name, array in weights.arrays.items()}
    policy.load_state_dict(sent, "the learner's weights")
    held = digest({name: _array(own.to(sent[name].dtype)) for name, own in policy.state_dict().items()})
    if held != weights.digest:
        raise ValueError(f"weights of version {weights.version} arrived damaged: {held} instead of {weights.digest}")
    return held


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """BLAKE2b of names, types, shapes and of the sums of every 4096 words of 64 bits: a single flipped bit changes its
    sum, and sums are made as fast as memory is read, which no cryptographic hash is. It finds damage, not malice.
    """
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        h.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        data = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        whole = data.size // 8 * 8
        words = data[:whole].view(np.uint64)
        if words.size:
            h.update(np.add.reduceat(words, np.arange(0, words.size, WORDS)).data)
        h.update(data[whole:].data)
    return h.hexdigest()


def _array(tensor: Tensor) -> np.ndarray:
    """On the tensor's own memory where that is the CPU's."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(array: np.ndarray) -> Tensor:
    """On the array's own memory; only to be read, as the object store's is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor
