"""Group-relative advantages: each reward term normalised inside its group, then summed with the terms' weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Advantages = Mapping[str, Mapping[int, np.ndarray]]
"""Per group id and block: float32 [G]. A group that is missing was not scored: it does not learn."""


@dataclass(frozen=True)
class TermWeight:
    """weight: of the term's normalised score in the sum. floor: least spread that the group is divided by.

    The floor must lie above the term's own noise, or noise gets the weight of a signal (GDPO with floors).
    """

    weight: float
    floor: float


def normalise(scores: np.ndarray, floor: float) -> np.ndarray:
    """(r - mean) / max(std, floor) over the last axis [..., G]; NaN (not scored) is masked out and gets 0.

    A group without spread, or with fewer than two scores, gets exactly 0.
    """
    scored = np.isfinite(scores)
    count = scored.sum(-1, keepdims=True)
    values = np.where(scored, scores, 0.0)
    mean = values.sum(-1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(scored, values - mean, 0.0)
    std = np.sqrt(np.square(centred).sum(-1, keepdims=True) / np.maximum(count, 1))
    spread = (np.where(scored, values, -np.inf).max(-1, keepdims=True)
              > np.where(scored, values, np.inf).min(-1, keepdims=True))  # fmt: skip
    return np.where(scored & spread & (count > 1), centred / np.maximum(std, floor), 0.0)


def advantages(scores: Mapping[str, np.ndarray], terms: Mapping[str, TermWeight], clip: float) -> np.ndarray:
    """A = clip(sum_k w_k A_k, +-clip), float32 [..., G], from each term's scores [..., G].

    Raises KeyError naming a term that was not scored.
    """
    total = sum(term.weight * normalise(scores[name], term.floor) for name, term in terms.items())
    return np.clip(total, -clip, clip).astype(np.float32)


def permuted(advantage: np.ndarray, seed: int) -> np.ndarray:
    """The control: the same advantages, given to the wrong members of their group [..., G]."""
    return np.random.default_rng(seed).permuted(advantage, axis=-1)
