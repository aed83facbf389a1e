"""The reward as a list of named terms, and what happens when a clip or a term is broken.

Two kinds of failure are never mixed. A policy fault (a black or constant frame, which is also what non-finite pixels
become) is a valid sample that earns the worst score there is. A system fault (the term raised) says nothing about the
sample: its scores are NaN, which the advantage masks, and its text is handed to the caller, who counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from rewards.contract import RewardBatch, RewardError, RewardOutput, as_output


@dataclass(frozen=True)
class Term:
    """One reward.

    fn: RewardBatch -> anything that `as_output` accepts. weight: its share in the advantage; a canary is watched, never
    trained on, so its weight is 0. floor: smallest spread inside a group that counts as signal, a few times the noise
    of the term. range: its scores, worst and best.
    """

    name: str
    fn: Callable[[RewardBatch], Any]
    weight: float = 1.0
    role: Literal["train", "canary"] = "train"
    floor: float = 0.05
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.role not in ("train", "canary"):
            raise RewardError(f"reward {self.name!r}: role must be 'train' or 'canary', not {self.role!r}")
        if self.role == "canary" and self.weight != 0:
            raise RewardError(
                f"reward {self.name!r}: a canary is never trained on, set weight: 0 (it is {self.weight:g})"
            )
        if self.floor <= 0:
            raise RewardError(f"reward {self.name!r}: floor must be above 0, not {self.floor:g}")
        if not self.range[0] < self.range[1]:
            raise RewardError(f"reward {self.name!r}: range must be (worst, best), not {self.range}")


class Scores(NamedTuple):
    """outputs: one per term, by name. system_faults: by name of the term, what it raised."""

    outputs: dict[str, RewardOutput]
    system_faults: dict[str, str]


def score(terms: Sequence[Term], batch: RewardBatch) -> Scores:
    """Runs every term on the batch; a broken clip or a broken term spoils nothing but itself.

    A clip with a policy fault has the worst score in every term and policy_fault = 1 among the metrics.
    """
    fault = policy_fault(batch)
    outputs, system_faults = {}, {}
    for term in terms:
        try:
            output = as_output(term.fn(batch), batch, term.name, term.range)
        except Exception as error:  # whatever a user's reward raises must not end the step
            system_faults[term.name] = f"{type(error).__name__}: {error}"
            output = RewardOutput(np.full(len(batch), np.nan, np.float32))
        else:
            output = _worst_where(fault, output, batch.scored, term.range[0])
        outputs[term.name] = output
    return Scores(outputs, system_faults)


def policy_fault(batch: RewardBatch) -> np.ndarray:
    """bool [B]: a scored frame of the clip is one flat colour, though its first frame is not."""
    flat = _flat(batch.video) & ~_flat(batch.first_frame)[:, None]
    return (flat & batch.scored).any(1)


def _flat(pictures: np.ndarray) -> np.ndarray:
    return (np.ptp(pictures, axis=(-3, -2)) <= 2).all(-1)


def _worst_where(fault: np.ndarray, output: RewardOutput, scored: np.ndarray, worst: float) -> RewardOutput:
    frame_score = output.frame_score
    if frame_score is not None:
        frame_score = np.where(fault[:, None] & scored, np.float32(worst), frame_score)
    return replace(
        output,
        score=np.where(fault, np.float32(worst), output.score),
        frame_score=frame_score,
        metrics={**output.metrics, "policy_fault": fault.astype(np.float32)},
    )
