"""Videos of the sprite world, whole and doctored, as reward batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rewards import battery
from rewards.contract import RewardBatch
from rollout.doctored import duplicated, shifted, vanished  # noqa: F401  (for the tests that import them from here)
from rollout.sprites import Scene, SpriteWorld

WORLD = SpriteWorld()


def film(index: int, edit: Callable[[Scene], Scene] = lambda scene: scene) -> np.ndarray:
    """The held-out video `index` with its scene edited, uint8 [T, H, W, 3]; frame 0 stays the given one."""
    return WORLD.render("heldout", index, edit)


def panned(index: int) -> np.ndarray:
    return battery.panned(WORLD.prompt("heldout", index))


def static(index: int) -> np.ndarray:
    return battery.static(WORLD.prompt("heldout", index))


def batch_of(
    videos: Sequence[np.ndarray], indices: Sequence[int], frames: Sequence[int] | None = None, **fields
) -> RewardBatch:
    """Videos of the held-out prompts `indices`, scored on `frames` (default: all but the given one)."""
    return battery.batch_of([WORLD.prompt("heldout", i) for i in indices], videos, frames, **fields)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
