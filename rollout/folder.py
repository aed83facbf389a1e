"""Prompts from a user's folder: pictures, texts and drags listed in `prompts.jsonl`, checked before anything runs.

What prompts from a table have in common with them is here too: how rows are split, read, checked and cut.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from rollout.prompts import DragPrompt, PromptError

KEYS = ("image", "video", "tracks", "text", "visible", "split")


@dataclass(frozen=True)
class Splits:
    """The rows of a user's prompts. Rows of `heldout` make up every split but "train" and "pretrain", and these two see
    `train` alone; where none is held out, every split sees every row.
    """

    path: Path
    train: Sequence
    heldout: Sequence

    @property
    def counts(self) -> dict[str, int]:
        return {"train": len(self.train), "heldout": len(self.heldout)}

    def row(self, split: str, index: int) -> Any:
        """Row `index` of a split, modulo its number of rows."""
        rows = self.train if split in ("train", "pretrain") else self.heldout or self.train
        if not rows:
            raise PromptError(f'{self.path}: every row is marked "heldout", so the split {split!r} is empty')
        return rows[index % len(rows)]

    def id(self, kind: str, split: str, index: int) -> str:
        return f"{kind}/{self.path.resolve().name}/{split}/{index}"


class FolderPrompts:
    """A `PromptSource` over `<path>/prompts.jsonl`, one object per line:

        {"image": "cat.png", "text": "a cat", "tracks": [[[x, y], ...T], ...N], "visible": [[true, ...T], ...N],
         "split": "heldout"}

    Coordinates are pixels of the given image, pixel centres lie at integers. The largest centred part of the image
    that has the shape of `size` is cut out and resized to it, its tracks with it; a visible point outside is an error.
    Text defaults to "", visible to all true, split to "train". The resized pictures are kept in memory.

    A row may have `"video": "cat.mp4"` in place of the image: its first T frames are what is true, the first of them is
    the image. The others are read when they are asked for.

    Index i of a split is row i modulo the number of rows of that split; rows are held out (`Splits`) by
    `"split": "heldout"`. If none is, `has_heldout` is False and held-out figures describe the training prompts.

    size: side of a square picture, or (height, width), px. frames: T, the length of a video and of every track.
    Raises PromptError naming file and line at the first thing that is wrong.
    """

    def __init__(self, path: str | Path, size: int | tuple[int, int], frames: int) -> None:
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
        shown = [row[4] is not None for row in (*rows["train"], *rows["heldout"])]
        if any(shown) and not all(shown):
            raise PromptError(f"{listing}: {sum(shown)} of {len(shown)} rows have a video; give all rows one, or none")
        self.splits = Splits(self.path, rows["train"], rows["heldout"])
        self.has_heldout = bool(rows["heldout"])

    def prompt(self, split: str, index: int) -> DragPrompt:
        return DragPrompt(*self.splits.row(split, index)[:4], self.splits.id("folder", split, index))

    def truth(self, prompt: DragPrompt) -> np.ndarray | None:
        _, _, split, index = prompt.id.rsplit("/", 3)
        name = self.splits.row(split, int(index))[4]
        if name is None:
            return None
        return np.stack([cut(frame, self.size)[0] for frame in read_video(self.path, name, self.frames)])

    def _read(self, line: bytes) -> tuple[str, np.ndarray, str, np.ndarray, np.ndarray, str | None]:
        """One line -> split, then first_frame, text, tracks and visible of its DragPrompt, and its video's name."""
        try:
            row = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise PromptError(f"not JSON ({error})") from None
        if not isinstance(row, dict):
            raise PromptError("not a JSON object")
        if unknown := sorted(row.keys() - {*KEYS}):
            raise PromptError(f"unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
        video = row.get("video")
        if "tracks" not in row or ("image" in row) == ("video" in row):
            key = "tracks" if "tracks" not in row else "image"
            raise PromptError(f"the key {key!r} is missing" if key not in row else "give image or video, not both")
        text, split = row.get("text", ""), row.get("split", "train")
        if not isinstance(text, str):
            raise PromptError(f"text must be a string, not {text!r}")
        if split not in ("train", "heldout"):
            raise PromptError(f'split must be "train" or "heldout", not {split!r}')
        tracks = read_tracks(row["tracks"], self.frames)
        visible = read_visible(row.get("visible"), self.frames, tracks.shape[1])
        if video is None:
            picture = read_picture(self.path, row["image"])
        else:
            picture = read_video(self.path, video, self.frames, 1)[0]
        frame, tracks = fit(picture, tracks, visible, self.size)
        return split, frame, text, tracks, visible, video


def fit(
    picture: np.ndarray, tracks: np.ndarray, visible: np.ndarray, size: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`cut`, and the tracks in the part's pixels, float32 [T, N, 2]. PromptError where a visible point is outside."""
    frame, corner, part = cut(picture, size)
    (height, width), (rows, columns) = picture.shape[:2], frame.shape[:2]
    (x0, y0), (x1, y1) = corner, corner + part - 1
    inside = ((tracks >= corner) & (tracks <= (x1, y1))).all(-1)
    if not (inside | ~visible).all():
        t, n = np.argwhere(~inside & visible)[0]
        x, y = tracks[t, n]
        shape = "square" if rows == columns else f"part of the shape {columns}x{rows}"
        raise PromptError(
            f"track {n} is at ({x:g}, {y:g}) in frame {t}, outside the centre {shape} {x0} <= x <= {x1}, "
            f"{y0} <= y <= {y1} of the {width}x{height} image; move it, or mark it invisible there"
        )
    scaled = (tracks - corner + 0.5) * ((columns, rows) / part) - 0.5
    # The centre of a border pixel can fall up to half a pixel outside the centres of the smaller picture.
    scaled = np.where(inside[..., None], scaled.clip(0, (columns - 1, rows - 1)), scaled)
    return frame, scaled.astype(np.float32)


def cut(picture: np.ndarray, size: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest centred part of the picture that has the shape of `size`, resized to it: uint8 [H, W, 3]; and the
    part's corner and size, (x, y) each, in pixels of the picture. size: side of a square, or (H, W), px.
    """
    height, width = picture.shape[:2]
    rows, columns = size if isinstance(size, tuple) else (size, size)
    part = np.array([min(width, round(height * columns / rows)), min(height, round(width * rows / columns))])
    x0, y0 = corner = (np.array([width, height]) - part) // 2
    interpolation = cv2.INTER_AREA if part[0] > columns else cv2.INTER_CUBIC
    inside = picture[y0 : y0 + part[1], x0 : x0 + part[0]]
    return cv2.resize(inside, (columns, rows), interpolation=interpolation), corner, part


def read_video(folder: Path, name: Any, frames: int, count: int | None = None) -> list[np.ndarray]:
    """The first `frames` pictures, uint8 [H, W, 3], RGB, of a file named relative to the folder; or of them `count`."""
    if not isinstance(name, str) or not (folder / name).is_file():
        raise PromptError(f"video {name!r} is not a file in {folder}")
    capture, pictures = cv2.VideoCapture(str(folder / name)), []
    held = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    while held >= frames and len(pictures) < (count or frames) and (read := capture.read())[0]:
        pictures.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    capture.release()
    if len(pictures) < (count or frames):
        raise PromptError(f"video {name!r} cannot be read, or has fewer than {frames} frames")
    return pictures


def read_picture(folder: Path, name: Any) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a file named relative to the folder."""
    if not isinstance(name, str) or not (folder / name).is_file():
        raise PromptError(f"image {name!r} is not a file in {folder}")
    return decode_picture((folder / name).read_bytes(), f"image {name!r}")


def decode_picture(data: bytes, what: str) -> np.ndarray:
    """uint8 [H, W, 3], RGB."""
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # nothing in it, or larger than OpenCV takes
        picture = None
    if picture is None:
        raise PromptError(f"{what} cannot be read as a picture")
    return picture


def read_tracks(tracks: Any, frames: int) -> np.ndarray:
    """float64 [T, N, 2], px of the given image, from a list of N tracks of T points."""
    if not isinstance(tracks, list) or not tracks:
        raise PromptError("tracks must be a list of one or more tracks, each a list of [x, y]")
    for n, track in enumerate(tracks):
        _check_length(f"track {n}", track, frames, "points")
        for t, point in enumerate(track):
            numbers = isinstance(point, list) and len(point) == 2 and all(type(v) in (int, float) for v in point)
            if not numbers or not all(abs(v) < 1e6 for v in point):  # False for NaN too
                raise PromptError(f"track {n}, frame {t}: a point is [x, y] with two finite numbers, not {point!r}")
    return np.array(tracks, float).transpose(1, 0, 2)


def read_visible(visible: Any, frames: int, count: int) -> np.ndarray:
    """bool [T, N], from a list of N lists of T flags; None: all true."""
    if visible is None:
        return np.ones((frames, count), bool)
    if not isinstance(visible, list) or len(visible) != count:
        raise PromptError(f"visible must be a list of {count} lists, one per track")
    for n, flags in enumerate(visible):
        _check_length(f"visible {n}", flags, frames, "flags")
        if not all(type(flag) is bool for flag in flags):
            raise PromptError(f"visible {n}: every flag must be true or false")
    return np.array(visible).T


def _check_length(what: str, values: Any, frames: int, unit: str) -> None:
    if not isinstance(values, list) or len(values) != frames:
        have = f"has {len(values)}" if isinstance(values, list) else f"is {values!r}"
        raise PromptError(f"{what} {have}; it needs {frames} {unit}, one per video frame")
