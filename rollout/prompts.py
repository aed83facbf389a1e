"""What a policy is asked to do: a first frame, a text, and the lines that somebody drags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class PromptError(ValueError):
    """A prompt that cannot be used; the message names the file and row and says what to do."""


@dataclass(frozen=True)
class DragPrompt:
    """One conditioning of a video.

    first_frame: uint8 [H, W, 3], RGB; frame 0 of every video of this prompt.
    text: the text prompt, "" where the policy has none.
    tracks: float32 [T, N, 2], (x, y) in pixels of first_frame, one row per video frame; row 0 lies on first_frame.
    visible: bool [T, N], False where the dragged point is hidden (behind another object, outside the picture).
    id: names the prompt for good: the same id is the same prompt in every process.
    """

    first_frame: np.ndarray
    text: str
    tracks: np.ndarray
    visible: np.ndarray
    id: str

    def __post_init__(self) -> None:
        height, width = self.first_frame.shape[:2]
        where = f"prompt {self.id!r}"
        if self.first_frame.dtype != np.uint8 or self.first_frame.shape != (height, width, 3):
            raise PromptError(
                f"{where}: first_frame must be uint8 [H, W, 3], not {self.first_frame.dtype} "
                f"{list(self.first_frame.shape)}"
            )
        if self.tracks.ndim != 3 or self.tracks.shape[2] != 2 or not len(self.tracks) or not self.tracks.shape[1]:
            raise PromptError(f"{where}: tracks must be [T, N, 2] with T, N >= 1, not {list(self.tracks.shape)}")
        if self.visible.shape != self.tracks.shape[:2]:
            raise PromptError(f"{where}: visible must be {list(self.tracks.shape[:2])}, not {list(self.visible.shape)}")
        if not np.isfinite(self.tracks).all():
            t, n = np.argwhere(~np.isfinite(self.tracks).all(-1))[0]
            raise PromptError(f"{where}: track {n} is not finite at frame {t}; remove the point or mark it invisible")
        inside = (self.tracks >= 0).all(-1) & (self.tracks <= (width - 1, height - 1)).all(-1)
        if not (inside | ~self.visible).all():
            t, n = np.argwhere(~inside & self.visible)[0]
            x, y = self.tracks[t, n]
            raise PromptError(
                f"{where}: track {n} leaves the {width}x{height} picture at frame {t} ({x:.1f}, {y:.1f}); "
                f"keep 0 <= x <= {width - 1} and 0 <= y <= {height - 1}, or mark it invisible there"
            )


class PromptSource(Protocol):
    """An indexed supply of prompts. Index i of a split is always the same prompt."""

    def prompt(self, split: str, index: int) -> DragPrompt: ...

    def truth(self, prompt: DragPrompt) -> np.ndarray | None:
        """uint8 [T, H, W, 3]: the true video where it is known (a rendered world), else None."""
        ...
