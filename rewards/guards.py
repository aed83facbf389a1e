"""Terms that close the ways around the others: moving the camera instead of the object, copying the object, not
moving."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rewards.contract import RewardBatch, RewardError, RewardOutput, over_scored
from rewards.corruptions import REACH, discs, fill


class Background:
    """1 - min(rmse / scale, 1) between a frame and the background plate, outside the discs where objects should be now.

    The plate is the first frame with the discs where the objects started filled in from around them. One number thus
    falls when the whole picture pans, when the background drifts, when an object leaves a hole, and when it is copied
    instead of moved.

    scale: rmse, in 0..1 of full scale, that costs everything. reach: radius of a disc as a share of min(H, W).
    uncovered: how many times a pixel of a start disc counts. These are few, and the only ones that tell a moved object
    from a copied one; but the plate is smooth there, and with much more weight blurred videos would gain.

    Metrics: background_rmse, and vacated_rmse, the same inside the start discs alone (NaN until an object has left).
    """

    def __init__(self, scale: float = 0.15, reach: float = 1.1 * REACH, uncovered: float = 2.0) -> None:
        self.scale, self.reach, self.uncovered = scale, reach, uncovered

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        rmse = np.full(batch.scored.shape, np.nan, np.float32)
        vacated = rmse.copy()
        radius = self.reach * min(batch.video.shape[2:4])
        plates: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for b, group in enumerate(batch.group_id):
            tracks = batch.target_tracks[b][:, batch.point_mask[b]]
            if group not in plates:
                first = batch.first_frame[b].astype(np.float32) / 255
                started = discs(first.shape, tracks[0], radius)
                plates[group] = fill(first, started), started
            plate, started = plates[group]
            for t in np.flatnonzero(batch.scored[b]):
                away = 1 - discs(plate.shape, tracks[t], radius)
                square = np.square(batch.video[b, t] / np.float32(255) - plate).mean(-1)
                rmse[b, t] = _weighted_root(square, away * (1 + (self.uncovered - 1) * started))
                vacated[b, t] = _weighted_root(square, away * started)
        score = 1 - np.minimum(rmse / self.scale, 1)
        metrics = {
            "background_rmse": over_scored(rmse, batch.scored),
            "vacated_rmse": over_scored(vacated, batch.scored),
        }
        return RewardOutput(over_scored(score, batch.scored), score, metrics)


def _weighted_root(square: np.ndarray, weight: np.ndarray) -> float:
    total = weight.sum()
    return float(np.sqrt((square * weight).sum() / total)) if total >= 0.01 * weight.size else np.nan


class Gated:
    """The score of `fn`, counted only where the objects are about where they should be.

    Quality terms are highest for a video in which nothing happens. The frame score of `fn` is multiplied by
    min(gate / open_at, 1), where gate is the frame score of the term `gate` (a Trajectory): from `open_at` on the gate
    is fully open, and then its noise does not enter. Frames for which the gate has no score are open.
    Metrics: those of `fn`, gate (the mean factor) and ungated (the score without it).
    """

    def __init__(
        self,
        fn: Callable[[RewardBatch], RewardOutput],
        gate: Callable[[RewardBatch], RewardOutput],
        open_at: float = 0.5,
    ) -> None:
        self.fn, self.gate, self.open_at = fn, gate, open_at

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        inner, gate = self.fn(batch), getattr(self.gate(batch), "frame_score", None)
        if gate is None or getattr(inner, "frame_score", None) is None:
            raise RewardError("Gated: fn and gate must return a RewardOutput with a frame_score")
        factor = np.minimum(np.nan_to_num(gate, nan=1.0) / self.open_at, 1).astype(np.float32)
        score = inner.frame_score * factor
        metrics = {**inner.metrics, "gate": over_scored(factor, batch.scored), "ungated": inner.score}
        return RewardOutput(over_scored(score, batch.scored), score, metrics)
