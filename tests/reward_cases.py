"""Videos of the sprite world, whole and doctored, as reward batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rewards.contract import RewardBatch
from rollout.sprites import Scene, Sprite, SpriteWorld

WORLD = SpriteWorld()


def film(index: int, edit: Callable[[Scene], Scene] = lambda scene: scene) -> np.ndarray:
    """The held-out video `index` with its scene edited, uint8 [T, H, W, 3]; frame 0 stays the given one."""
    scene = WORLD._scene("heldout", index)
    video = WORLD._film(edit(scene))
    video[0] = WORLD._film(scene)[0]
    return video


def shifted(offset: Sequence[float]) -> Callable[[Scene], Scene]:
    """The dragged sprites leave their target by `offset` px, gradually over the video."""
    ramp = np.linspace(0, 1, WORLD.frames)[:, None] * np.asarray(offset)
    return lambda scene: _dragged(scene, lambda s: replace(s, path=(s.path + ramp).astype(np.float32)))


def vanished(scene: Scene) -> Scene:
    return replace(scene, dragged=())


def duplicated(scene: Scene) -> Scene:
    """The sprites move, and also stay where they were."""
    return replace(scene, still=scene.still + _dragged(scene, _frozen).dragged)


def panned(index: int) -> np.ndarray:
    """The whole picture moves along the first drag, wrapping around."""
    prompt = WORLD.prompt("heldout", index)
    steps = np.rint(prompt.tracks[:, 0] - prompt.tracks[0, 0]).astype(int)
    return np.stack([np.roll(prompt.first_frame, (dy, dx), (0, 1)) for dx, dy in steps])


def static(index: int) -> np.ndarray:
    return np.repeat(WORLD.prompt("heldout", index).first_frame[None], WORLD.frames, 0)


def batch_of(
    videos: Sequence[np.ndarray], indices: Sequence[int], frames: Sequence[int] | None = None, **fields
) -> RewardBatch:
    """Videos of the held-out prompts `indices`, scored on `frames` (default: all but the given one)."""
    prompts = [WORLD.prompt("heldout", i) for i in indices]
    size, length, points = len(prompts), WORLD.frames, max(p.tracks.shape[1] for p in prompts)
    tracks = np.zeros((size, length, points, 2), np.float32)
    visible, mask = np.zeros((size, length, points), bool), np.zeros((size, points), bool)
    for b, prompt in enumerate(prompts):
        n = prompt.tracks.shape[1]
        tracks[b, :, :n], visible[b, :, :n], mask[b, :n] = prompt.tracks, prompt.visible, True
    scored = np.zeros((size, length), bool)
    scored[:, list(frames or range(1, length))] = True
    values = {
        "video": np.stack(videos),
        "scored": scored,
        "first_frame": np.stack([p.first_frame for p in prompts]),
        "target_tracks": tracks,
        "target_visible": visible,
        "point_mask": mask,
        "prompt": tuple(p.text for p in prompts),
        "group_id": tuple(p.id for p in prompts),
        "sample_id": tuple(f"{p.id}/{b}" for b, p in enumerate(prompts)),
        "seed": np.arange(size),
    }
    return RewardBatch(**{**values, **fields})


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def _dragged(scene: Scene, edit: Callable[[Sprite], Sprite]) -> Scene:
    return replace(scene, dragged=tuple(edit(s) for s in scene.dragged))


def _frozen(sprite: Sprite) -> Sprite:
    return replace(sprite, path=np.repeat(sprite.path[:1], len(sprite.path), 0))
