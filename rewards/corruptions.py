"""The ways in which a generated frame goes wrong, as pure functions with a level from 0 (untouched) to 1 (ruined).

A corruption maps (frame float32 [H, W, 3] in 0..1, level, generator, scene) to a new frame of the same kind.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

REACH = 0.2
"""Radius of a disc that holds a whole dragged object, as a share of the picture's shorter side."""


class Scene(NamedTuple):
    """points, starts: float32 [N, 2], (x, y) px: where the dragged objects are, and where they started."""

    points: np.ndarray
    starts: np.ndarray


def discs(shape: tuple[int, ...], points: np.ndarray, radius: float) -> np.ndarray:
    """float32 [H, W]: 1 within `radius` px of any of the points [N, 2], 0 outside, with an edge of about 2 px."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    mask = np.zeros(shape[:2], np.float32)
    for px, py in points:
        np.maximum(mask, ((radius - np.hypot(x - px, y - py)) / 2 + 0.5).clip(0, 1), out=mask)
    return mask


def fill(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The frame with the masked part (float32 [H, W], 1 = unknown) continued smoothly from what surrounds it."""
    known, outside = 1 - mask, frame[mask < 0.5]
    mean = outside.mean(0) if len(outside) else frame.mean((0, 1))
    sigma = 0.06 * min(mask.shape)
    near = cv2.GaussianBlur(known, (0, 0), sigma)[..., None] + 1e-4
    around = cv2.GaussianBlur(frame * known[..., None], (0, 0), sigma) + 1e-4 * mean
    return frame + mask[..., None] * (around / near - frame)


def _inside(frame: np.ndarray, changed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return frame + mask[..., None] * (changed - frame)


def _vacated(frame: np.ndarray, scene: Scene) -> np.ndarray:
    started = discs(frame.shape, scene.starts, 0.75 * REACH * min(frame.shape[:2]))
    return started * (1 - _objects(frame, scene, 0.75))


def _objects(frame: np.ndarray, scene: Scene, share: float = 1.0) -> np.ndarray:
    return discs(frame.shape, scene.points, share * REACH * min(frame.shape[:2]))


def blur(frame, level, rng, scene):
    return cv2.GaussianBlur(frame, (0, 0), 4 * level**1.3) if level > 0.01 else frame


def lowres(frame, level, rng, scene):
    height, width = frame.shape[:2]
    small = (max(2, round(width / (1 + 7 * level))), max(2, round(height / (1 + 7 * level))))
    return cv2.resize(
        cv2.resize(frame, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_CUBIC
    )


def streak(frame, level, rng, scene):
    return _motion_blur(frame, 14 * level, rng)


def noise(frame, level, rng, scene):
    return frame + rng.normal(0, 0.12 * level, frame.shape).astype(np.float32)


def block(frame, level, rng, scene):
    """Every 8x8 block loses detail and drifts in colour, so that seams show."""
    height, width = frame.shape[:2]
    cells = cv2.resize(frame, (-(-width // 8), -(-height // 8)), interpolation=cv2.INTER_AREA)
    cells = cells + rng.normal(0, 0.1 * level, cells.shape).astype(np.float32)
    seams = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
    return frame + 0.7 * level * (seams - frame)


def ghost(frame, level, rng, scene):
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(3, 9)
    shift = np.float32([[1, 0, distance * np.cos(angle)], [0, 1, distance * np.sin(angle)]])
    other = cv2.warpAffine(frame, shift, frame.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    return frame + 0.5 * level * (other - frame)


def tint(frame, level, rng, scene):
    direction = rng.normal(size=3)
    return frame + (0.3 * level * direction / np.linalg.norm(direction)).astype(np.float32)


def saturation(frame, level, rng, scene):
    grey = frame.mean(-1, keepdims=True)
    return grey + (frame - grey) * (1 - level if rng.random() < 0.5 else 1 + 1.5 * level)


def contrast(frame, level, rng, scene):
    mean = frame.mean((0, 1))
    return mean + (frame - mean) * (1 - 0.8 * level if rng.random() < 0.5 else 1 + 1.2 * level)


def checker(frame, level, rng, scene):
    """A fine grid, as upsampling decoders leave it."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    period = rng.choice((2, 4))
    grid = ((x // (period // 2) + y // (period // 2)) % 2 * 2 - 1).astype(np.float32)
    return frame + 0.12 * level * grid[..., None] * rng.uniform(0.4, 1, 3).astype(np.float32)


def smear(frame, level, rng, scene):
    return _inside(frame, _motion_blur(frame, 14 * level, rng), _objects(frame, scene))


def bloat(frame, level, rng, scene):
    """The object swells or shrinks about its centre."""
    zoom = 1 + 0.5 * level if rng.random() < 0.6 else 1 - 0.4 * level
    for x, y in scene.points:
        matrix = np.float32([[zoom, 0, x * (1 - zoom)], [0, zoom, y * (1 - zoom)]])
        larger = cv2.warpAffine(
            frame, matrix, frame.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        frame = _inside(frame, larger, discs(frame.shape, [(x, y)], REACH * min(frame.shape[:2])))
    return frame


def fade(frame, level, rng, scene):
    return frame + level * (fill(frame, _objects(frame, scene)) - frame)


def hole(frame, level, rng, scene):
    """A flat patch where an object started and no longer is."""
    colour = frame.mean((0, 1)) + rng.uniform(-0.15, 0.15, 3).astype(np.float32)
    return frame + level * (_inside(frame, colour, _vacated(frame, scene)) - frame)


def jpeg(frame, level, rng, scene):
    if level < 0.01:
        return frame
    pixels = np.rint(frame[..., ::-1].clip(0, 1) * 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, round(80 * (1 - level) ** 1.5) + 1))
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255


def posterise(frame, level, rng, scene):
    steps = 2 + 14 * (1 - level) ** 2
    return frame + min(1.0, 4 * level) * (np.round(frame * steps) / steps - frame)


def pixelate(frame, level, rng, scene):
    height, width = frame.shape[:2]
    small = (max(2, round(width / (1 + 5 * level))), max(2, round(height / (1 + 5 * level))))
    cells = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)


def warp(frame, level, rng, scene):
    """Elastic wobble: smooth random displacements of up to about 4 px."""
    height, width = frame.shape[:2]
    flow = cv2.resize(
        rng.normal(0, 2.5 * level, (7, 7, 2)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return cv2.remap(frame, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _motion_blur(frame, length, rng):
    """The mean over a straight stroke of `length` px in a random direction."""
    size = int(np.ceil(length)) | 1
    angle = rng.uniform(0, np.pi)
    kernel = np.zeros((size + 2, size + 2), np.float32)
    middle, steps = (size + 1) / 2, np.linspace(-length / 2, length / 2, 4 * size)
    for step in steps:
        x, y = middle + step * np.cos(angle), middle + step * np.sin(angle)
        x0, y0 = int(x), int(y)
        fx, fy = x - x0, y - y0
        for dx, dy, share in (
            (0, 0, (1 - fx) * (1 - fy)),
            (1, 0, fx * (1 - fy)),
            (0, 1, (1 - fx) * fy),
            (1, 1, fx * fy),
        ):
            kernel[min(y0 + dy, size + 1), min(x0 + dx, size + 1)] += share
    return cv2.filter2D(frame, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


TRAINED = {f.__name__: f for f in (blur, lowres, streak, noise, block, ghost, tint, saturation, contrast, checker,
                                   smear, bloat, fade, hole, warp)}  # fmt: skip
HELD_OUT = {f.__name__: f for f in (jpeg, posterise, pixelate)}
NEED_DEPARTURE = frozenset({"hole"})
"""Kinds that show only once an object has left the place where it started."""
