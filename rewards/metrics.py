"""How good a point tracker is: the TAP-Vid metrics and the end-point error, as pure functions of tracks.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022, section 3.4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rewards.contract import RewardError

THRESHOLDS = (1, 2, 4, 8, 16)
RASTER = 256
"""The thresholds are pixels of a picture stretched to RASTER x RASTER."""


class TapVid(NamedTuple):
    """float32 [...] each, in 0..1, NaN where there was nothing to count.

    average_jaccard: true positives / (visible points + false positives), mean over the thresholds. A true positive is
    visible, found and within the threshold; a false positive is found although it is hidden or too far away.
    delta_avg: share of the visible points within the threshold, found or not, mean over the thresholds.
    occlusion_accuracy: share of the points whose visibility was predicted rightly.
    """

    average_jaccard: np.ndarray
    delta_avg: np.ndarray
    occlusion_accuracy: np.ndarray


def tap_vid(
    positions: np.ndarray,
    found: np.ndarray,
    tracks: np.ndarray,
    visible: np.ndarray,
    size: tuple[int, int],
    evaluated: np.ndarray | None = None,
) -> TapVid:
    """The metrics over the last two axes (frames and points) of every leading index.

    positions: float [..., T, N, 2], predicted (x, y) px, NaN where there is none. found: bool [..., T, N], predicted
    to be visible. tracks, visible: the truth, of the same shapes. size: (H, W) of the video, px.
    evaluated: bool [..., T, N]; by default every frame but the first, in which the points were given.
    Raises RewardError where shapes disagree.
    """
    away = _distance(positions, tracks, visible, RASTER / np.array(size[::-1], np.float32))
    if evaluated is None:
        evaluated = np.ones(visible.shape, bool)
        evaluated[..., 0, :] = False
    if not found.shape == evaluated.shape == visible.shape:
        raise RewardError(
            f"found {list(found.shape)}, evaluated {list(evaluated.shape)} and visible {list(visible.shape)} "
            "must have one shape, [..., T, N]"
        )
    shown, jaccard, within = _count(visible & evaluated), [], []
    for threshold in THRESHOLDS:
        close = away < threshold
        hit = _count(close & visible & found & evaluated)
        false = _count(found & ~(close & visible) & evaluated)
        jaccard.append(_share(hit, shown + false))
        within.append(_share(_count(close & visible & evaluated), shown))
    right = _share(_count((found == visible) & evaluated), _count(evaluated))
    return TapVid(np.mean(jaccard, 0), np.mean(within, 0), right)


def end_point_error(positions: np.ndarray, tracks: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Mean distance in px over the visible points that have a position; float32 [...], NaN where there is none.

    positions, tracks: float [..., T, N, 2], (x, y) px. visible: bool [..., T, N].
    A lost point (NaN) has no error: read it beside `TapVid.delta_avg`, which counts a lost point as wrong.
    Raises RewardError where shapes disagree.
    """
    away = _distance(positions, tracks, visible, np.float32(1))
    use = visible & np.isfinite(away)
    return _share(np.where(use, away, 0).sum((-2, -1)), _count(use))


def _distance(positions: np.ndarray, tracks: np.ndarray, visible: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if positions.shape != tracks.shape or tracks.shape != (*visible.shape, 2):
        raise RewardError(
            f"positions {list(positions.shape)} and tracks {list(tracks.shape)} must be [..., T, N, 2], "
            f"visible {list(visible.shape)} [..., T, N]"
        )
    return np.linalg.norm((positions - tracks) * scale, axis=-1)


def _count(mask: np.ndarray) -> np.ndarray:
    return mask.sum((-2, -1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan).astype(np.float32)
