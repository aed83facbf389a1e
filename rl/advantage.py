"""Group-relative advantages: each reward term normalised inside its group, then summed with the terms' weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

STDS = ("group", "batch", "none")
Advantages = Mapping[str, Mapping[int, np.ndarray]]
"""Per group id and block: float32 [G]. A group that is missing was not scored: it does not learn."""


@dataclass(frozen=True)
class TermWeight:
    """weight: of the term's normalised score in the sum. floor: least spread that the group is divided by.

    The floor must lie above the term's own noise, or noise gets the weight of a signal (GDPO with floors).
    """

    weight: float
    floor: float


def normalise(scores: np.ndarray, floor: float, std: str = "group") -> np.ndarray:
    """(r - mean) / max(std, floor) over the last axis [..., G]; NaN (not scored) is masked out and gets 0.

    std: "group": of the group's own scores (GRPO, arXiv 2402.03300, sec. 4.1.2). "batch": of all scores given, so that
    a group whose members hardly differ counts for less (Flow-GRPO's code, `global_std`; arXiv 2505.05470). "none": 1,
    for a group with spread (Dr. GRPO, arXiv 2503.20783, sec. 3.2). A group without spread, or with fewer than two
    scores, gets exactly 0.
    """
    scored = np.isfinite(scores)
    count = scored.sum(-1, keepdims=True)
    values = np.where(scored, scores, 0.0)
    mean = values.sum(-1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(scored, values - mean, 0.0)
    unit = {
        "group": lambda: np.sqrt(np.square(centred).sum(-1, keepdims=True) / np.maximum(count, 1)),
        "batch": lambda: values[scored].std() if scored.any() else 0.0,
        "none": lambda: 1.0,
    }[std]()
    spread = (np.where(scored, values, -np.inf).max(-1, keepdims=True)
              > np.where(scored, values, np.inf).min(-1, keepdims=True))  # fmt: skip
    return np.where(scored & spread & (count > 1), centred / np.maximum(unit, floor), 0.0)


def advantages(
    scores: Mapping[str, np.ndarray], terms: Mapping[str, TermWeight], clip: float, std: str = "group"
) -> np.ndarray:
    """A = clip(sum_k w_k A_k, +-clip), float32 [..., G], from each term's scores [..., G]; std: of `normalise`.

    Raises KeyError naming a term that was not scored.
    """
    total = sum(term.weight * normalise(scores[name], term.floor, std) for name, term in terms.items())
    return np.clip(total, -clip, clip).astype(np.float32)


def best_and_worst(advantage: np.ndarray, k: int) -> np.ndarray:
    """The advantages of the k best and the k worst members of each group, times G / 2k; the others' are 0. [..., G].

    The mean over the group is then that over the selected members (DanceGRPO, arXiv 2505.07818: the best and the worst
    of the samples drawn carry the signal). Of equal ones the first counts as worse.
    """
    members = advantage.shape[-1]
    order = np.argsort(advantage, axis=-1, kind="stable")
    ends = np.concatenate((order[..., :k], order[..., members - k :]), -1)
    kept = np.zeros_like(advantage)
    np.put_along_axis(kept, ends, np.take_along_axis(advantage, ends, -1) * (members / (2 * k)), -1)
    return kept


def permuted(advantage: np.ndarray, seed: int) -> np.ndarray:
    """The control: the same advantages, given to the wrong members of their group [..., G]."""
    return np.random.default_rng(seed).permuted(advantage, axis=-1)
