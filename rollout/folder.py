"""Prompts from a user's folder: pictures, texts and drags listed in `prompts.jsonl`, checked before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from rollout.prompts import DragPrompt, PromptError

REQUIRED, OPTIONAL = ("image", "tracks"), ("text", "visible", "split")


class FolderPrompts:
    """A `PromptSource` over `<path>/prompts.jsonl`, one object per line:

        {"image": "cat.png", "text": "a cat", "tracks": [[[x, y], ...T], ...N], "visible": [[true, ...T], ...N],
         "split": "heldout"}

    Coordinates are pixels of the given image, pixel centres lie at integers. The largest centred square of the image
    is cut out and resized to `size` x `size`, its tracks with it; a visible point outside that square is an error.
    Text defaults to "", visible to all true, split to "train". The resized pictures are kept in memory.

    Index i of a split is row i modulo the number of rows of that split. If rows are marked `"split": "heldout"`, they
    alone make up every split but "train" and "pretrain", and these two see only the others. If none is marked, every
    split sees every row (`has_heldout` is False): held-out figures then describe the training prompts.

    size: side of the square picture, px. frames: T, the length of a video and of every track.
    Raises PromptError naming file and line at the first thing that is wrong.
    """

    def __init__(self, path: str | Path, size: int, frames: int) -> None:
        self.path, self.size, self.frames = Path(path), size, frames
        listing = self.path / "prompts.jsonl"
        if not listing.is_file():
            raise PromptError(f'{listing}: no such file; give one {{"image": ..., "tracks": ...}} per line')
        rows: dict[str, list[tuple]] = {"train": [], "heldout": []}
        for number, line in enumerate(listing.read_bytes().splitlines(), 1):
            if line.strip():
                try:
                    split, *row = self._read(line)
                except PromptError as error:
                    raise PromptError(f"{listing}:{number}: {error}") from None
                rows[split].append(tuple(row))
        if not rows["train"] and not rows["heldout"]:
            raise PromptError(f"{listing}: no prompts; write one JSON object per line")
        self.has_heldout = bool(rows["heldout"])
        self._train = rows["train"]
        self._heldout = rows["heldout"] or rows["train"]

    def prompt(self, split: str, index: int) -> DragPrompt:
        rows = self._train if split in ("train", "pretrain") else self._heldout
        if not rows:
            raise PromptError(f'{self.path}: every row is marked "heldout", so the split {split!r} is empty')
        return DragPrompt(*rows[index % len(rows)], f"folder/{self.path.resolve().name}/{split}/{index}")

    def truth(self, prompt: DragPrompt) -> None:
        return None

    def _read(self, line: bytes) -> tuple[str, np.ndarray, str, np.ndarray, np.ndarray]:
        """One line -> split, then first_frame, text, tracks and visible of its DragPrompt."""
        try:
            row = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise PromptError(f"not JSON ({error})") from None
        if not isinstance(row, dict):
            raise PromptError("not a JSON object")
        if unknown := sorted(row.keys() - {*REQUIRED, *OPTIONAL}):
            raise PromptError(f"unknown key {unknown[0]!r}; the keys are {', '.join(REQUIRED + OPTIONAL)}")
        if missing := [key for key in REQUIRED if key not in row]:
            raise PromptError(f"the key {missing[0]!r} is missing")
        text, split = row.get("text", ""), row.get("split", "train")
        if not isinstance(text, str):
            raise PromptError(f"text must be a string, not {text!r}")
        if split not in ("train", "heldout"):
            raise PromptError(f'split must be "train" or "heldout", not {split!r}')
        tracks = self._tracks(row["tracks"])
        visible = self._visible(row.get("visible"), tracks.shape[1])
        frame, tracks = self._square(self._picture(row["image"]), tracks, visible)
        return split, frame, text, tracks, visible

    def _square(self, picture: np.ndarray, tracks: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The centre square of the picture, uint8 [size, size, 3], and the tracks in its pixels, float32 [T, N, 2]."""
        height, width = picture.shape[:2]
        side = min(height, width)
        x0, y0 = corner = np.array([(width - side) // 2, (height - side) // 2])
        inside = ((tracks >= corner) & (tracks <= corner + side - 1)).all(-1)
        if not (inside | ~visible).all():
            t, n = np.argwhere(~inside & visible)[0]
            x, y = tracks[t, n]
            raise PromptError(
                f"track {n} is at ({x:g}, {y:g}) in frame {t}, outside the centre square {x0} <= x <= {x0 + side - 1}, "
                f"{y0} <= y <= {y0 + side - 1} of the {width}x{height} image; move it, or mark it invisible there"
            )
        square = picture[y0 : y0 + side, x0 : x0 + side]
        interpolation = cv2.INTER_AREA if side > self.size else cv2.INTER_CUBIC
        frame = cv2.resize(square, (self.size, self.size), interpolation=interpolation)
        scaled = (tracks - corner + 0.5) * (self.size / side) - 0.5
        # The centre of a border pixel can fall up to half a pixel outside the centres of the smaller picture.
        scaled = np.where(inside[..., None], scaled.clip(0, self.size - 1), scaled)
        return frame, scaled.astype(np.float32)

    def _picture(self, name: Any) -> np.ndarray:
        if not isinstance(name, str) or not (self.path / name).is_file():
            raise PromptError(f"image {name!r} is not a file in {self.path}")
        picture = cv2.imread(str(self.path / name), cv2.IMREAD_COLOR_RGB)
        if picture is None:
            raise PromptError(f"image {name!r} cannot be read as a picture")
        return picture

    def _tracks(self, tracks: Any) -> np.ndarray:
        """float64 [T, N, 2], px of the given image."""
        if not isinstance(tracks, list) or not tracks:
            raise PromptError("tracks must be a list of one or more tracks, each a list of [x, y]")
        for n, track in enumerate(tracks):
            self._check_length(f"track {n}", track, "points")
            for t, point in enumerate(track):
                numbers = isinstance(point, list) and len(point) == 2 and all(type(v) in (int, float) for v in point)
                if not numbers or not all(abs(v) < 1e6 for v in point):  # False for NaN too
                    raise PromptError(f"track {n}, frame {t}: a point is [x, y] with two finite numbers, not {point!r}")
        return np.array(tracks, float).transpose(1, 0, 2)

    def _visible(self, visible: Any, count: int) -> np.ndarray:
        """bool [T, N]."""
        if visible is None:
            return np.ones((self.frames, count), bool)
        if not isinstance(visible, list) or len(visible) != count:
            raise PromptError(f"visible must be a list of {count} lists, one per track")
        for n, flags in enumerate(visible):
            self._check_length(f"visible {n}", flags, "flags")
            if not all(type(flag) is bool for flag in flags):
                raise PromptError(f"visible {n}: every flag must be true or false")
        return np.array(visible).T

    def _check_length(self, what: str, values: Any, unit: str) -> None:
        if not isinstance(values, list) or len(values) != self.frames:
            have = f"has {len(values)}" if isinstance(values, list) else f"is {values!r}"
            raise PromptError(f"{what} {have}; it needs {self.frames} {unit}, one per video frame")
