"""Scenes of the sprite world that are wrong in a known way: edits for `SpriteWorld.render`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rollout.sprites import Scene, Sprite


def shifted(offset: Sequence[float]) -> Callable[[Scene], Scene]:
    """The dragged sprites leave their target gradually, by `offset` (x, y) px in the last frame."""

    def astray(sprite: Sprite) -> Sprite:
        ramp = np.linspace(0, 1, len(sprite.path))[:, None] * np.asarray(offset)
        return replace(sprite, path=(sprite.path + ramp).astype(np.float32))

    return lambda scene: _dragged(scene, astray)


def vanished(scene: Scene) -> Scene:
    return replace(scene, dragged=())


def duplicated(scene: Scene) -> Scene:
    """The sprites move, and also stay where they were."""
    return replace(scene, still=scene.still + _dragged(scene, _frozen).dragged)


def _dragged(scene: Scene, edit: Callable[[Sprite], Sprite]) -> Scene:
    return replace(scene, dragged=tuple(edit(s) for s in scene.dragged))


def _frozen(sprite: Sprite) -> Sprite:
    return replace(sprite, path=np.repeat(sprite.path[:1], len(sprite.path), 0))
