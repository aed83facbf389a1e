"""How closely the dragged points follow their target tracks."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rewards.contract import RewardBatch, RewardError, RewardOutput, over_scored
from rewards.trackers import LucasKanade, Tracker


class Trajectory:
    """1 - min(d, cap) / cap averaged over the points, per frame; d is the distance between found and target position.

    cap: alpha * min(H, W) px. mode "squared": 1 - min(d, cap)^2 / cap^2, AR-Drag's form scaled to 0..1.
    A lost point costs the cap, and weights come from the target's visibility: a vanished object must not outscore a
    misplaced one. Frames without weight are NaN.

    Metrics: error_px, the mean distance with every distance capped and a lost point at the cap (where a lost point was
    searched is no estimate of where it is), so that it falls exactly when the linear score rises; lost, the share of
    lost points.
    """

    def __init__(
        self, alpha: float = 0.15, mode: Literal["linear", "squared"] = "linear", tracker: Tracker | None = None
    ) -> None:
        if alpha <= 0 or mode not in ("linear", "squared"):
            raise RewardError(f"Trajectory needs alpha > 0 and mode 'linear' or 'squared', not {alpha} and {mode!r}")
        self.alpha, self.mode, self.tracker = alpha, mode, tracker or LucasKanade()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        cap = self.alpha * min(batch.video.shape[2:4])
        weights = batch.weights
        distance = np.full(weights.shape, cap, np.float32)
        lost = np.ones_like(weights)
        for b, video in enumerate(batch.video):
            frames = np.flatnonzero(batch.scored[b] & weights[b].any(1)).tolist()
            points = np.flatnonzero(batch.point_mask[b])
            target = batch.target_tracks[b][:, points]
            positions, found = self.tracker.track(video, target[0], frames, target)
            for i, t in enumerate(frames):
                away = np.linalg.norm(positions[i] - target[t], axis=-1)
                distance[b, t, points] = np.where(found[i] & np.isfinite(away), np.minimum(away, cap), cap)
                lost[b, t, points] = ~found[i]
        share = distance / cap
        score = _mean_over_points(1 - (share if self.mode == "linear" else share**2), weights)
        score[~batch.scored] = np.nan
        metrics = {"error_px": distance, "lost": lost}
        return RewardOutput(
            over_scored(score, batch.scored),
            score,
            {name: over_scored(_mean_over_points(value, weights), batch.scored) for name, value in metrics.items()},
        )


def track_error(video: np.ndarray, tracks: np.ndarray, visible: np.ndarray, tracker: Tracker) -> np.ndarray:
    """Mean distance in px between found and target positions per frame, for evaluation; float32 [T], NaN where
    nothing is visible.

    video: uint8 [T, H, W, 3]. tracks: float32 [T, N, 2] px. visible: bool [T, N].
    Not capped. A lost point counts as where it was last found, as if the object had stopped there.
    """
    positions, found = tracker.track(video, tracks[0], list(range(len(video))), tracks)
    positions[0] = np.where(found[0][:, None], positions[0], tracks[0])
    for t in range(1, len(video)):
        positions[t] = np.where(found[t][:, None], positions[t], positions[t - 1])
    distance = np.linalg.norm(positions - tracks, axis=-1)
    return _mean_over_points(distance, (visible & visible[0]).astype(np.float32))


def _mean_over_points(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[..., N] -> float32 [...], NaN where no point has weight."""
    total = weights.sum(-1)
    mean = (values * weights).sum(-1) / np.maximum(total, 1e-9)
    return np.where(total > 0, mean, np.nan).astype(np.float32)
