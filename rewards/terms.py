"""The reward as a list of named terms, and what happens when a clip or a term is broken.

Two kinds of failure are never mixed. A policy fault (a black or constant frame, which is also what non-finite pixels
become) is a valid sample that earns the worst score there is. A system fault (the term raised) says nothing about the
sample: its score is NaN, which the advantage masks, and the fault is handed to the caller, who counts it.
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
            raise RewardError(f"rewards.{self.name}.role must be 'train' or 'canary', not {self.role!r}")
        if self.role == "canary" and self.weight != 0:
            raise RewardError(
                f"rewards.{self.name}: a canary is never trained on, set weight: 0 (it is {self.weight:g})"
            )
        if self.floor <= 0:
            raise RewardError(f"rewards.{self.name}.floor must be above 0, not {self.floor:g}")
        if not self.range[0] < self.range[1]:
            raise RewardError(f"rewards.{self.name}.range must be (worst, best), not {self.range}")


class SystemFault(NamedTuple):
    """clips: bool [B], those that have no score because the term failed on them. text: what the first one raised."""

    clips: np.ndarray
    text: str


class Scores(NamedTuple):
    """outputs: one per term, by name. system_faults: by name of the term, where it failed on a clip."""

    outputs: dict[str, RewardOutput]
    system_faults: dict[str, SystemFault]


def score(terms: Sequence[Term], batch: RewardBatch, batch_size: int | None = None) -> Scores:
    """Runs every term on the batch; a broken clip or a broken term spoils nothing but itself.

    A clip with a policy fault has the worst score in every term, also in one that fails on it, and policy_fault = 1
    among the metrics.
    batch_size: most clips that a term is given at once; None = all. A training term never sees the true video.
    """
    fault = policy_fault(batch)
    outputs, system_faults = {}, {}
    for term in terms:
        seen = batch if term.role == "canary" else replace(batch, truth=None)
        output, failed = _judge(term, seen, batch_size or len(batch))
        if (failed.clips & ~fault).any():
            system_faults[term.name] = failed._replace(clips=failed.clips & ~fault)
        outputs[term.name] = _worst_where(fault, output, batch.scored, term.range[0])
    return Scores(outputs, system_faults)


def _judge(term: Term, batch: RewardBatch, size: int) -> tuple[RewardOutput, SystemFault]:
    """One term's scores. A batch that it fails on is halved until the clips that are to blame stand alone: the others
    keep the score that they have in any company, and one that does not fit into memory may fit in halves."""
    waiting = [range(first, min(first + size, len(batch))) for first in range(0, len(batch), size)]
    parts, failed, text = [], np.zeros(len(batch), bool), ""
    while waiting:
        rows = waiting.pop(0)
        part = batch.rows(rows)
        try:
            parts.append(as_output(term.fn(part), part, term.name, term.range))
        except Exception as error:  # whatever a user's reward raises must not end the step
            if len(rows) > 1:
                half = len(rows) // 2
                waiting[:0] = [rows[:half], rows[half:]]
            else:
                failed[rows], text = True, text or f"{type(error).__name__}: {error}"
                parts.append(RewardOutput(np.full(1, np.nan, np.float32)))
    return _joined(parts, batch.scored), SystemFault(failed, text)


def _joined(parts: Sequence[RewardOutput], scored: np.ndarray) -> RewardOutput:
    """The parts one after the other; a metric that a part lacks is NaN there."""
    if len(parts) == 1:
        return parts[0]
    score, frame_score = np.concatenate([part.score for part in parts]), None
    if any(part.frame_score is not None for part in parts):
        frames = scored.shape[1]
        rows = [p.score[:, None].repeat(frames, 1) if p.frame_score is None else p.frame_score for p in parts]
        frame_score = np.where(scored, np.concatenate(rows), np.float32(np.nan))
    metrics = {
        name: np.concatenate([part.metrics.get(name, np.full_like(part.score, np.nan)) for part in parts])
        for name in dict.fromkeys(name for part in parts for name in part.metrics)
    }
    return RewardOutput(score, frame_score, metrics)


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
