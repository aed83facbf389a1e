"""The fixed battery that a reward is checked on: true videos, videos that are wrong by a known error, and the cheats
that policies are known to find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from rewards import corruptions
from rewards.contract import RewardBatch, RewardError

SHIFTS = {"1 px": 1.0, "2 px": 2.0, "4 px": 4.0}
"""Entries whose objects leave their target, by how many px in the last frame."""
DRAWN = ("truth", *SHIFTS, "vanished", "duplicated")
"""The videos that only their world can draw; the rest of the battery is made from them."""
HACKS = {
    "static": "nothing moves",
    "vanishing": "the objects are gone from the middle on",
    "duplicated": "the objects move, and also stay where they were",
    "panning": "the whole picture follows the drag",
    "flicker": "every other frame is brighter",
    "blur": "soft from the second frame on",
    "over-saturation": "colours 2.5 times as strong",
    "noise grid": "a fine grid and noise",
    "NaN frame": "the middle frame is black, which is what non-finite pixels become",
    "reversed": "the true video backwards",
    "frozen tail": "the second half stands still",
}
LEVELS = ((0.0, 0.0), (0.5, 0.25), (1.0, 0.5), (2.0, 1.0))
"""Levels of quality in a group of clips: (how far the objects end from their target, sigma of the blur), px."""
GRAIN = 2.0
"""Standard deviation of the noise on clips of one level, of 255: nobody sees it, and no reward should."""


class Drag(Protocol):
    """What a battery is about; `rollout.prompts.DragPrompt` documents the fields."""

    first_frame: np.ndarray
    text: str
    tracks: np.ndarray
    visible: np.ndarray
    id: str


@dataclass(frozen=True)
class Stage:
    """One drag and what its world draws of it.

    drawn: uint8 [T, H, W, 3] each, by the names in DRAWN. shifted: uint8 [L, R, T, H, W, 3], for each of the L LEVELS
    R clips whose objects end as far off as the level says, each in a direction of its own.
    Raises RewardError naming a video that is missing or of another shape.
    """

    drag: Drag
    drawn: Mapping[str, np.ndarray]
    shifted: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.drag.tracks), *self.drag.first_frame.shape)
        for name in DRAWN:
            if name not in self.drawn or self.drawn[name].shape != shape:
                raise RewardError(f"stage {self.drag.id!r}: drawn[{name!r}] must be a video {list(shape)}")
        if self.shifted.ndim != 6 or self.shifted.shape[0] != len(LEVELS) or self.shifted.shape[2:] != shape:
            raise RewardError(
                f"stage {self.drag.id!r}: shifted must be [{len(LEVELS)}, R, {', '.join(map(str, shape))}], "
                f"not {list(self.shifted.shape)}"
            )

    def battery(self) -> dict[str, np.ndarray]:
        """uint8 [T, H, W, 3] by name: the truth, SHIFTS and HACKS, in this order; frame 0 is always the given one."""
        truth, first, half = self.drawn["truth"], self.drag.first_frame, len(self.drag.tracks) // 2
        scene = corruptions.Scene(self.drag.tracks[0], self.drag.tracks[0])
        rng = np.random.default_rng(0)
        videos = {name: self.drawn[name] for name in ("truth", *SHIFTS)} | {
            "static": static(self.drag),
            "vanishing": np.concatenate([truth[:half], self.drawn["vanished"][half:]]),
            "duplicated": self.drawn["duplicated"],
            "panning": panned(self.drag),
            "flicker": np.stack([_pixels(frame * np.float32(1 + 0.3 * (t % 2))) for t, frame in enumerate(truth)]),
            "blur": _each(truth, lambda frame: corruptions.blur(frame, 0.5, rng, scene)),
            "over-saturation": _each(truth, lambda frame: frame + 1.5 * (frame - frame.mean(-1, keepdims=True))),
            "noise grid": _each(
                truth, lambda frame: corruptions.noise(corruptions.checker(frame, 1, rng, scene), 0.5, rng, scene)
            ),
            "NaN frame": np.where(np.arange(len(truth))[:, None, None, None] == half, np.uint8(0), truth),
            "reversed": truth[::-1].copy(),
            "frozen tail": np.concatenate([truth[:half], np.repeat(truth[half : half + 1], len(truth) - half, 0)]),
        }
        return {name: np.concatenate([first[None], video[1:]]) for name, video in videos.items()}

    def group(self) -> np.ndarray:
        """uint8 [L, R, T, H, W, 3]: what a group of rollouts looks like, R clips at each of the L LEVELS.

        Clips of one level are equally good: they differ in the direction of their error and in the grain alone.
        """
        rng = np.random.default_rng(1)
        clips = np.empty_like(self.shifted)
        for level, (_, sigma) in enumerate(LEVELS):
            for r, video in enumerate(self.shifted[level]):
                soft = [cv2.GaussianBlur(f, (0, 0), sigma) if sigma else f for f in video.astype(np.float32)]
                clips[level, r] = _pixels(np.stack(soft) + rng.normal(0, GRAIN, video.shape))
                clips[level, r, 0] = self.drag.first_frame
        return clips


def static(drag: Drag) -> np.ndarray:
    """The given frame for ever, uint8 [T, H, W, 3]."""
    return np.repeat(drag.first_frame[None], len(drag.tracks), 0)


def panned(drag: Drag) -> np.ndarray:
    """The whole picture moves along the first drag, wrapping around; uint8 [T, H, W, 3]."""
    steps = np.rint(drag.tracks[:, 0] - drag.tracks[0, 0]).astype(int)
    return np.stack([np.roll(drag.first_frame, (dy, dx), (0, 1)) for dx, dy in steps])


def batch_of(
    drags: Sequence[Drag], videos: Sequence[np.ndarray], frames: Sequence[int] | None = None, **fields: Any
) -> RewardBatch:
    """Videos uint8 [T, H, W, 3], one per drag, as rewards see them; drags with fewer points are padded.

    frames: those that are scored (default: all but the given one). fields: of RewardBatch, to be set otherwise.
    """
    size, length, points = len(drags), len(drags[0].tracks), max(d.tracks.shape[1] for d in drags)
    tracks = np.zeros((size, length, points, 2), np.float32)
    visible, mask = np.zeros((size, length, points), bool), np.zeros((size, points), bool)
    for b, drag in enumerate(drags):
        n = drag.tracks.shape[1]
        tracks[b, :, :n], visible[b, :, :n], mask[b, :n] = drag.tracks, drag.visible, True
    scored = np.zeros((size, length), bool)
    scored[:, list(frames or range(1, length))] = True
    values = {
        "video": np.stack(videos),
        "scored": scored,
        "first_frame": np.stack([d.first_frame for d in drags]),
        "target_tracks": tracks,
        "target_visible": visible,
        "point_mask": mask,
        "prompt": tuple(d.text for d in drags),
        "group_id": tuple(d.id for d in drags),
        "sample_id": tuple(f"{d.id}/{b}" for b, d in enumerate(drags)),
        "seed": np.arange(size),
    }
    return RewardBatch(**{**values, **fields})


def _each(video: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`change` maps float32 [H, W, 3] in 0..1 to the same; uint8 [T, H, W, 3] -> the same."""
    return _pixels(np.stack([change(frame.astype(np.float32) / 255) for frame in video]) * 255)


def _pixels(video: np.ndarray) -> np.ndarray:
    return np.rint(video.clip(0, 255)).astype(np.uint8)
