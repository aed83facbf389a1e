"""The embedded world: endless little videos of textured sprites that follow smooth curves over a textured background.

Everything is drawn analytically at sub-pixel positions, so the tracks are exact and every prompt has its true video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from rollout.prompts import DragPrompt
from rollout.seeds import seed_of

SPLITS = ("train", "heldout", "canary", "pretrain")
SHAPES = ("disc", "lobes", "square", "star")


@dataclass(frozen=True)
class Sprite:
    """radius in px; texture float32 [n, n, 3] in 0..1, stretched over the sprite; path float32 [T, 2], px."""

    shape: str
    radius: float
    angle: float
    texture: np.ndarray
    path: np.ndarray


@dataclass(frozen=True)
class Scene:
    """background float32 [H, W, 3] in 0..1; sprites that stand still, then the dragged ones, each in front of those
    before it.
    """

    background: np.ndarray
    still: tuple[Sprite, ...]
    dragged: tuple[Sprite, ...]

    def tracks(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres of the dragged sprites, float32 [T, N, 2], and where they are not covered by another one, bool [T,
        N].
        """
        tracks = np.stack([s.path for s in self.dragged], 1)
        visible = np.ones(tracks.shape[:2], bool)
        for n in range(len(self.dragged)):
            for above in self.dragged[n + 1 :]:
                visible[:, n] &= np.linalg.norm(above.path - tracks[:, n], axis=1) > 0.8 * above.radius
        return tracks, visible


class SpriteWorld:
    """Prompts are pure functions of (seed, split, index); splits own disjoint seeds by construction.

    size: side of the square picture, px. frames: length T of a video. speed: mean path length per frame, px.
    distractors: share of videos with one more sprite that stands still; two_drags: share with a second dragged sprite.
    grain: amplitude of the background's fine texture, of 1.
    """

    def __init__(
        self,
        size: int = 64,
        frames: int = 13,
        speed: float = 2.2,
        distractors: float = 0.5,
        two_drags: float = 0.3,
        grain: float = 0.04,
        seed: int = 0,
    ) -> None:
        self.size, self.frames, self.speed, self.seed = size, frames, speed, seed
        self.distractors, self.two_drags, self.grain = distractors, two_drags, grain
        self._grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(np.float32)

    def prompt(self, split: str, index: int) -> DragPrompt:
        scene = self._scene(split, index)
        return DragPrompt(self._draw(scene, 0), "", *scene.tracks(), f"sprites/{self.seed}/{split}/{index}")

    def truth(self, prompt: DragPrompt) -> np.ndarray:
        world, seed, split, index = prompt.id.split("/")
        if world != "sprites" or int(seed) != self.seed:
            raise ValueError(f"prompt {prompt.id!r} is not of this world (seed {self.seed})")
        return self._film(self._scene(split, int(index)))

    def sample(self, split: str, index: int, lag: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A video uint8 [T, H, W, 3] with its drag [T, N, 2] and visibility [T, N]: what pretraining reads.

        lag: by how many frames the sprites in the video are behind the drag (0: the true video of the prompt).
        """
        scene = self._scene(split, index)
        late = replace(scene, dragged=tuple(replace(s, path=_delayed(s.path, lag)) for s in scene.dragged))
        return self._film(late), scene.tracks()[0], late.tracks()[1]

    def render(self, split: str, index: int, edit: Callable[[Scene], Scene] = lambda scene: scene) -> np.ndarray:
        """The video of the scene that `edit` makes of the true one, uint8 [T, H, W, 3]; frame 0 stays the given one."""
        scene = self._scene(split, index)
        video = self._film(edit(scene))
        video[0] = self._draw(scene, 0)
        return video

    def _scene(self, split: str, index: int) -> Scene:
        rng = np.random.default_rng(seed_of("sprites", self.seed, index) * len(SPLITS) + SPLITS.index(split))
        dragged = 1 + (rng.random() < self.two_drags)
        count = dragged + (rng.random() < self.distractors)
        ground = rng.uniform(0.25, 0.75, 3)
        background = ground + self._texture(rng, 4, 0.12) + self._texture(rng, 10, self.grain)
        sprites: list[Sprite] = []
        for i in range(count):
            path = self._path(rng, moving=i < dragged, others=[s.path for s in sprites])
            colour = max((rng.uniform(0.05, 0.95, 3) for _ in range(6)), key=lambda c: np.linalg.norm(c - ground))
            texture = np.clip(colour + rng.uniform(-0.35, 0.35, (4, 4, 3)), 0, 1)
            sprites.append(
                Sprite(
                    SHAPES[rng.integers(len(SHAPES))],
                    self.size * rng.uniform(0.13, 0.18),
                    rng.uniform(0, 2 * np.pi),
                    texture.astype(np.float32),
                    path,
                )
            )
        return Scene(background.clip(0, 1).astype(np.float32), tuple(sprites[dragged:]), tuple(sprites[:dragged]))

    def _texture(self, rng: np.random.Generator, cells: int, amplitude: float) -> np.ndarray:
        noise = rng.uniform(-amplitude, amplitude, (cells, cells, 3)).astype(np.float32)
        return cv2.resize(noise, (self.size, self.size), interpolation=cv2.INTER_CUBIC)

    def _path(self, rng: np.random.Generator, moving: bool, others: list[np.ndarray]) -> np.ndarray:
        """A stretch of a cubic Bezier curve, resampled to constant speed; starts apart from the sprites already
        placed.
        """
        low, high = 0.22 * self.size, 0.78 * self.size
        best, best_gap = None, -1.0
        for _ in range(16):
            control = rng.uniform(low, high, (4, 2))
            u = np.linspace(0, 1, 65)[:, None]
            curve = (
                (1 - u) ** 3 * control[0]
                + 3 * (1 - u) ** 2 * u * control[1]
                + 3 * (1 - u) * u**2 * control[2]
                + u**3 * control[3]
            )
            length = np.concatenate(([0], np.linalg.norm(np.diff(curve, axis=0), axis=1).cumsum()))
            wanted = min(length[-1], rng.uniform(0.6, 1.4) * self.speed * (self.frames - 1)) if moving else 0.0
            at = np.linspace(0, wanted, self.frames)
            path = np.stack([np.interp(at, length, curve[:, axis]) for axis in (0, 1)], -1).astype(np.float32)
            gap = min((float(np.linalg.norm(path - other, axis=1).min()) for other in others), default=self.size)
            if gap > best_gap:
                best, best_gap = path, gap
            if gap > 0.34 * self.size:
                break
        return best

    def _film(self, scene: Scene) -> np.ndarray:
        return np.stack([self._draw(scene, t) for t in range(self.frames)])

    def _draw(self, scene: Scene, t: int) -> np.ndarray:
        picture = scene.background.copy()
        for sprite in (*scene.still, *scene.dragged):
            reach = sprite.radius * 1.3 + 2
            (x0, y0), (x1, y1) = (np.clip(sprite.path[t] + d, 0, self.size).astype(int) for d in (-reach, reach + 1))
            offset = self._grid[y0:y1, x0:x1] - sprite.path[t]
            cells = len(sprite.texture)
            at = (offset / (2.6 * sprite.radius) + 0.5) * cells - 0.5
            colour = cv2.remap(sprite.texture, at[..., 0], at[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
            alpha = 1 / (1 + np.exp(np.clip((_distance(sprite, offset) - sprite.radius) / 0.6, -30, 30)))[..., None]
            window = picture[y0:y1, x0:x1]
            window += alpha * (colour.clip(0, 1) - window)
        return np.rint(picture * 255).astype(np.uint8)


def _delayed(path: np.ndarray, lag: float) -> np.ndarray:
    """A path [T, 2] walked `lag` frames later; until then it waits at its start."""
    frames = np.arange(len(path))
    return np.stack([np.interp(frames - lag, frames, path[:, axis]) for axis in (0, 1)], -1).astype(np.float32)


def _distance(sprite: Sprite, offset: np.ndarray) -> np.ndarray:
    """A radius-like distance from the centre whose level set at `radius` is the outline; px."""
    x, y = offset[..., 0], offset[..., 1]
    if sprite.shape == "square":
        c, s = np.cos(sprite.angle), np.sin(sprite.angle)
        return np.maximum(np.abs(c * x + s * y), np.abs(c * y - s * x)) * 1.12
    radius = np.hypot(x, y)
    if sprite.shape == "disc":
        return radius
    lobes, depth = (3, 0.16) if sprite.shape == "lobes" else (5, 0.2)
    return radius / (1 + depth * np.cos(lobes * (np.arctan2(y, x) - sprite.angle)))
