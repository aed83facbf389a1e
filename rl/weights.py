"""Weights on their way from the learner to the rollout workers, with a version and a hash that the receiver checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from policy.policy import DragPolicy


@dataclass(frozen=True)
class Weights:
    """version: counts the learner's updates. digest: of the arrays, by name. arrays: numpy, as the object store
    shares them.
    """

    version: int
    digest: str
    arrays: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        save_file(dict(self.arrays), path, {"version": str(self.version), "digest": self.digest})

    @classmethod
    def load(cls, path: Path) -> Weights:
        with safe_open(path, "numpy") as file:
            about, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(int(about["version"]), about["digest"], arrays)


def pack(state: Mapping[str, Tensor], version: int) -> Weights:
    arrays = {name: tensor.detach().float().cpu().contiguous().numpy().copy() for name, tensor in state.items()}
    return Weights(version, digest(arrays), arrays)


def install(policy: DragPolicy, weights: Weights) -> str:
    """Loads the weights and returns the digest of what the policy then holds; ValueError when it differs."""
    policy.load_state_dict(
        {name: torch.tensor(array) for name, array in weights.arrays.items()}, "the learner's weights"
    )
    held = digest({name: tensor.detach().float().cpu().numpy() for name, tensor in policy.state_dict().items()})
    if held != weights.digest:
        raise ValueError(f"weights of version {weights.version} arrived damaged: {held} instead of {weights.digest}")
    return held


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        h.update(name.encode())
        h.update(np.ascontiguousarray(arrays[name]).data)
    return h.hexdigest()
