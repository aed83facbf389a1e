"""The held-out prompts of a run: pure ODE sampling by the present policy, and what every judge says of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl.evaluation import stack
from rl.fleet import Fleet, as_completed, fetch
from rl.judges import Judges
from rollout.prompts import DragPrompt
from rollout.records import Films


@dataclass(frozen=True)
class HeldOut:
    """prompts: how many. seed: chooses them and their noise. batch: prompts generated together. strips: how many are
    shown.
    """

    prompts: int
    seed: int
    batch: int
    strips: int
    split: str = "heldout"


@dataclass(frozen=True)
class Measured:
    """metrics: float32 [prompts] each. chunks: references to the Films, `batch` prompts in each but the last."""

    metrics: dict[str, np.ndarray]
    chunks: list
    batch: int

    def films(self, count: int) -> Films:
        """Of the first so many prompts."""
        parts = [fetch(chunk) for chunk in self.chunks[: max(1, -(-count // self.batch))]]
        prompts = tuple(prompt for part in parts for prompt in part.prompts)
        known = parts[0].truths is not None
        truths = np.concatenate([part.truths for part in parts])[:count] if known else None
        return Films(prompts[:count], np.concatenate([part.videos for part in parts])[:count], truths)

    def film(self, i: int) -> tuple[DragPrompt, np.ndarray]:
        """Prompt and video of the i-th prompt."""
        films = fetch(self.chunks[i // self.batch])
        return films.prompts[i % self.batch], films.videos[i % self.batch]


def measure(rollout: Fleet, judges: Judges, heldout: HeldOut) -> Measured:
    """The rollout workers' present policy on the held-out prompts."""
    first = heldout.seed * 1_000_000
    chunks = [
        range(first + i, first + min(i + heldout.batch, heldout.prompts))
        for i in range(0, heldout.prompts, heldout.batch)
    ]
    generating = {rollout.submit("generate", heldout.split, list(c), heldout.seed): i for i, c in enumerate(chunks)}
    measuring, films = {}, {}
    for task in as_completed(generating):
        i = generating[task]
        films[i] = task.result()[0]
        measuring[i] = judges.measure(films[i], heldout.split)
    found = [judges.measured(*measuring[i]) for i in range(len(chunks))]
    return Measured(stack(found), [films[i] for i in range(len(chunks))], heldout.batch)
