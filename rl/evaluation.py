"""Held-out measurement: pure ODE sampling from fixed noise, metrics that training sees and canaries that it never
does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rewards.contract import RewardBatch
from rewards.trackers import LucasKanade, TemplateMatch
from rewards.trajectory import track_error

METRICS = {
    "track_error_px": "mean distance from the drag, chained Lucas-Kanade",
    "canary/track_error_px": "the same by template matching against the first frame; never trained on",
    "canary/psnr_db": "peak signal-to-noise ratio against the rendered truth; never trained on",
    "sharpness": "gradient energy relative to the truth's (to the first frame's, without a truth)",
}

LOWER_IS_BETTER = ("track_error_px", "canary/track_error_px")


def measure(batch: RewardBatch) -> dict[str, np.ndarray]:
    """METRICS of whole videos, each float32 [B]; those that need a truth are left out without one. Frame 0 does not
    count.
    """
    found = {}
    for name, tracker in (("track_error_px", LucasKanade(chained=True)), ("canary/track_error_px", TemplateMatch())):
        errors = [track_error(v, p, seen, tracker)
                  for v, p, seen in zip(batch.video, batch.target_tracks, batch.target_visible)]  # fmt: skip
        found[name] = np.nanmean(np.stack(errors)[:, 1:], 1).astype(np.float32)
    like = batch.first_frame[:, None] if batch.truth is None else batch.truth[:, 1:]
    found["sharpness"] = (_gradient_energy(batch.video[:, 1:]) / _gradient_energy(like)).astype(np.float32)
    if batch.truth is not None:
        error = (batch.video[:, 1:].astype(np.float32) - batch.truth[:, 1:]) / 255
        found["canary/psnr_db"] = (-10 * np.log10(np.square(error).mean((1, 2, 3, 4)))).astype(np.float32)
    return found


def _gradient_energy(video: np.ndarray) -> np.ndarray:
    """Mean squared difference of neighbouring pixels, [B]."""
    x = video.astype(np.float32)
    return np.square(np.diff(x, axis=2)).mean((1, 2, 3, 4)) + np.square(np.diff(x, axis=3)).mean((1, 2, 3, 4))


def compare(base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, dict]:
    """Per metric {"base", "tuned", "ci95"}: means over the prompts, and the 95 % interval of (tuned - base).

    The interval is a paired bootstrap over prompts (2,000 resamples). A prompt that either could not score is left
    out of both.
    """
    rng = np.random.default_rng(seed)
    table = {}
    for name, before in base.items():
        after = tuned[name]
        both = np.isfinite(before) & np.isfinite(after)
        difference = (after - before)[both]
        if not len(difference):
            continue
        means = rng.choice(difference, (2000, len(difference))).mean(1)
        table[name] = {"base": float(before[both].mean()), "tuned": float(after[both].mean()),
                       "ci95": [float(q) for q in np.quantile(means, (0.025, 0.975))]}  # fmt: skip
    return table


def stack(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the metrics of several batches of prompts."""
    names = set.intersection(*(set(p) for p in parts))
    return {name: np.concatenate([p[name] for p in parts]) for name in sorted(names)}
