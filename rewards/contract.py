"""What a reward receives and returns, and the adapters that let a plain function be a reward."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class RewardError(ValueError):
    """A reward that cannot be found, or that was given or returned something unusable; the message says what to do."""


@dataclass(frozen=True)
class RewardBatch:
    """Clips of one length to be judged; arrays are read-only. RGB; (x, y) in px, pixel centres at integers.

    video: uint8 [B, T, H, W, 3], from the given frame on. first_frame: uint8 [B, H, W, 3], the given frame.
    scored: bool [B, T], the frames that the judged decision could change; a score is about these.
    target_tracks: float32 [B, T, N, 2], where the dragged points should be. target_visible: bool [B, T, N].
    point_mask: bool [B, N], False where N was only padded.
    prompt, group_id, sample_id: one string per clip; clips of one group share prompt and first frame.
    seed: int64 [B]. fps: frames per second. step: training iteration. split: "train", "heldout", ...
    truth: uint8 [B, T, H, W, 3] or None, the true video of a rendered world; for canaries, never for training terms.

    Raises RewardError naming the field whose shape or dtype is wrong.
    """

    video: np.ndarray
    scored: np.ndarray
    first_frame: np.ndarray
    target_tracks: np.ndarray
    target_visible: np.ndarray
    point_mask: np.ndarray
    prompt: tuple[str, ...]
    group_id: tuple[str, ...]
    sample_id: tuple[str, ...]
    seed: np.ndarray
    fps: float = 8.0
    step: int = 0
    split: str = "train"
    truth: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.video.ndim != 5:
            raise RewardError(f"RewardBatch.video must be [B, T, H, W, 3], not {list(self.video.shape)}")
        if self.point_mask.ndim != 2:
            raise RewardError(f"RewardBatch.point_mask must be [B, N], not {list(self.point_mask.shape)}")
        (b, t, h, w, _), n = self.video.shape, self.point_mask.shape[1]
        expected = {
            "video": (np.uint8, (b, t, h, w, 3)),
            "scored": (np.bool_, (b, t)),
            "first_frame": (np.uint8, (b, h, w, 3)),
            "target_tracks": (np.float32, (b, t, n, 2)),
            "target_visible": (np.bool_, (b, t, n)),
            "point_mask": (np.bool_, (b, n)),
            "seed": (np.int64, (b,)),
        }
        if self.truth is not None:
            expected["truth"] = (np.uint8, (b, t, h, w, 3))
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise RewardError(
                    f"RewardBatch.{name} must be {np.dtype(dtype)} {list(shape)}, not {array.dtype} {list(array.shape)}"
                )
        for name in ("prompt", "group_id", "sample_id"):
            if len(getattr(self, name)) != b:
                raise RewardError(
                    f"RewardBatch.{name} must have one entry per clip ({b}), not {len(getattr(self, name))}"
                )

        for name in ARRAYS:  # what one term writes, the next would read
            if getattr(self, name) is not None:
                view = getattr(self, name).view()
                view.flags.writeable = False
                object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return len(self.video)

    def rows(self, rows: Sequence[int]) -> RewardBatch:
        """These clips alone; the arrays are views where the rows are a range."""
        index = slice(rows.start, rows.stop) if isinstance(rows, range) and rows.step == 1 else list(rows)
        changed = {name: getattr(self, name)[index] for name in ARRAYS if getattr(self, name) is not None}
        changed |= {name: tuple(getattr(self, name)[b] for b in rows) for name in ("prompt", "group_id", "sample_id")}
        return replace(self, **changed)

    @property
    def weights(self) -> np.ndarray:
        """float32 [B, T, N]: 1 where a point counts. Visibility is the target's: a tracker's own rewards vanishing.

        A point that is hidden in the first frame has no appearance to look for and never counts.
        """
        seen = self.target_visible & self.target_visible[:, :1] & self.point_mask[:, None]
        return seen.astype(np.float32)


ARRAYS = ("video", "scored", "first_frame", "target_tracks", "target_visible", "point_mask", "seed", "truth")
"""The fields of RewardBatch with one row per clip that are arrays."""


@dataclass(frozen=True)
class RewardOutput:
    """score: float32 [B] in the term's range, over the scored frames; NaN = not scored.

    frame_score: float32 [B, T] or None; NaN where a frame has no score. metrics: float32 [B] each, never trained on.
    """

    score: np.ndarray
    frame_score: np.ndarray | None = None
    metrics: dict[str, np.ndarray] = field(default_factory=dict)


def over_scored(frame_values: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Mean of [B, T] over the scored frames that have a value, float32 [B]; NaN where there is none."""
    use = scored & ~np.isnan(frame_values)
    total = np.where(use, frame_values, 0.0).sum(1)
    return np.where(use.any(1), total / np.maximum(use.sum(1), 1), np.nan).astype(np.float32)


def as_output(value: Any, batch: RewardBatch, name: str, bounds: tuple[float, float] = (0.0, 1.0)) -> RewardOutput:
    """Accepts what a reward function may return and checks it.

    value: a RewardOutput; a list (None = not scored), array or tensor [B]; one [B, T], averaged over the scored frames;
    a mapping with "score" as one of the latter two, whose other entries [B] are metrics.
    Raises RewardError naming the term, what was expected and what came.
    """
    if isinstance(value, RewardOutput):
        score, frame_score, metrics = value.score, value.frame_score, value.metrics
    elif isinstance(value, Mapping):
        if "score" not in value:
            raise RewardError(f"reward {name!r} returned a mapping without 'score'; it has {sorted(map(str, value))}")
        score, frame_score, metrics = value["score"], None, {k: v for k, v in value.items() if k != "score"}
    else:
        score, frame_score, metrics = value, None, {}
    size, frames = batch.scored.shape
    score = _floats(score, name, "score")
    if frame_score is None and score.shape == (size, frames):
        frame_score, score = score, over_scored(score, batch.scored)
    if score.shape != (size,):
        got = "None; is a `return` missing?" if value is None else str(list(score.shape))
        raise RewardError(
            f"reward {name!r} must return one score per clip, [{size}], or per frame, [{size}, {frames}], not {got}"
        )
    if frame_score is not None:
        frame_score = _floats(frame_score, name, "frame_score")
        if frame_score.shape != (size, frames):
            raise RewardError(f"reward {name!r}: frame_score must be [{size}, {frames}], not {list(frame_score.shape)}")
        frame_score = _within(np.where(batch.scored, frame_score, np.float32(np.nan)), bounds, name)
    metrics = {key: _floats(metric, name, f"metric {key!r}") for key, metric in metrics.items()}
    for key, metric in metrics.items():
        if metric.shape != (size,):
            raise RewardError(f"reward {name!r}: metric {key!r} must be [{size}], not {list(metric.shape)}")
    return RewardOutput(_within(score, bounds, name), frame_score, metrics)


def _floats(value: Any, name: str, what: str) -> np.ndarray:
    try:
        if hasattr(value, "detach"):
            value = value.detach().float().cpu()  # numpy knows no bfloat16
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise RewardError(
            f"reward {name!r}: {what} must be numbers, not {type(value).__name__} {str(value)[:60]!r}"
        ) from None


def _within(score: np.ndarray, bounds: tuple[float, float], name: str) -> np.ndarray:
    low, high = bounds
    slack = 1e-4 * (high - low)
    wrong = score[(score < low - slack) | (score > high + slack)]
    if wrong.size:
        raise RewardError(
            f"reward {name!r} returned {wrong[0]:g}, outside its range {low:g}..{high:g}; "
            "scale it, or declare its range"
        )
    return score.clip(low, high)


def resolve(spec: str, source: str | None = None) -> Callable[..., Any]:
    """The callable named by "package.module:function" or "path/to/file.py:function".

    source: the text of the file, for a process that cannot read it. Raises RewardError saying whether the form, the
    module or file, or the function is wrong.
    """
    origin, colon, attribute = spec.rpartition(":")
    if not colon or not origin or not attribute:
        raise RewardError(f"reward {spec!r} must be 'package.module:function' or 'path/to/file.py:function'")
    if origin.endswith(".py"):
        module = _run_file(origin, read_source(spec) if source is None else source, spec)
    else:
        module = _load_module(origin, spec)
    found = getattr(module, attribute, None)
    if found is None:
        names = [n for n in vars(module) if not n.startswith("_")]
        close = difflib.get_close_matches(attribute, names, 1)
        raise RewardError(
            f"reward {spec!r}: {origin} has no {attribute!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if not callable(found):
        raise RewardError(f"reward {spec!r}: {attribute!r} is a {type(found).__name__}, not a function or class")
    return found


def read_source(spec: str) -> str | None:
    """The text of the file in "path/to/file.py:function", None for a module. Raises RewardError where there is none."""
    file = spec.rpartition(":")[0]
    if not file.endswith(".py"):
        return None
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"reward {spec!r}: no such file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"reward {spec!r}: {path} cannot be read: {error}") from error


def _load_module(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # user code runs on import and may raise anything
        raise RewardError(f"reward {spec!r}: importing {name} failed: {type(error).__name__}: {error}") from error


def _run_file(file: str, source: str, spec: str) -> ModuleType:
    """The module that the text makes; the file itself need not exist in this process's world."""
    path = str(Path(file).expanduser().resolve())
    # A name of its own per path and text, and registered, so that what the file defines can be pickled to a worker
    # that loaded it, and a file that was edited is loaded again.
    name = f"reward_{Path(path).stem}_{hashlib.blake2b(f'{path}:{source}'.encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = path
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)  # tracebacks show the lines
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"reward {spec!r}: running {path} failed: {type(error).__name__}: {error}") from error
    return module
