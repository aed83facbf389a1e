"""One run of the study: a training of so many CPU-seconds in one process, measured on the way."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import Bare
from rl.evaluation import measure
from rl.reward_worker import reward_batch
from rollout.plan import NoisePlan

EVALUATED_TOGETHER = 16
DEV_SEED, HELDOUT_SEED = 7_000, 8_000  # of prompts and noise that no other measurement uses; seeds add to the second


@dataclass(frozen=True)
class Trial:
    """lr: at the beginning; it falls to 0 at the last point. stiffness: weight of the divergence from the reference,
    relative to the length that the log-prob's gradient has in a subspace of this many dimensions. points: CPU-seconds
    of training after which it is measured, the last one being the end. split: "dev" prompts, which the search sees, or
    "heldout" ones, the seed's own.
    """

    select: str
    explore: str
    lr: float
    stiffness: float
    amplitude: float
    prompts: int
    members: int
    seed: int
    points: tuple[float, ...]
    split: str
    measured_on: int
    permute: bool = False

    @property
    def arm(self) -> str:
        return f"{self.select} + {self.explore}"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))

    def overrides(self) -> list[str]:
        """Of the training's configuration."""
        return [
            f"rollout.select={self.select}", f"rollout.explore={self.explore}", f"rollout.amplitude={self.amplitude}",
            f"rollout.group_size={self.members}", f"rollout.prompts_per_iteration={self.prompts}",
            f"rollout.prompts_per_task={self.prompts}", f"learner.lr={self.lr}", "learner.decay_iterations=null",
            f"learner.permute_advantages={self.permute}", f"seed={self.seed}",
        ]  # fmt: skip


class Training:
    """more: overrides of the training's configuration."""

    def __init__(self, trial: Trial, *more: str) -> None:
        self.trial, self.bare = trial, Bare(*trial.overrides(), *more)
        self.cpu_s, self.done = 0.0, 0
        # The log-prob is a mean over the coordinates, so that its gradient is as long as 1 / sqrt(dimensions).
        beta, learner = trial.stiffness / math.sqrt(self._dimensions()), self.bare.learner
        learner.settings, learner.beta = replace(learner.settings, beta=beta), beta

    def _dimensions(self) -> int:
        """Coordinates of an action."""
        (channels, height, width), frames = self.bare.policy.latent_shape, self.bare.policy.sizes[1]
        if self.trial.explore == "tangent":
            return 2 * frames
        cell = self.bare.sampler.settings.cell if self.trial.explore == "coarse" else 1
        return channels * frames * (height // cell) * (width // cell)

    def train(self, until: float) -> None:
        """Iterations until this many CPU-seconds of training are used."""
        while self.cpu_s < until:
            lr = self.trial.lr * (1 - self.cpu_s / self.trial.points[-1])
            self.bare.learner.settings = replace(self.bare.learner.settings, lr=lr)
            started = time.process_time()
            self.stats = self.bare.iteration(self.done)
            self.cpu_s += time.process_time() - started
            self.done += 1

    def films(self, indices: range, noise: int) -> tuple[list, np.ndarray]:
        prompts = [self.bare.world.prompt("heldout", i) for i in indices]
        plans = [NoisePlan((noise, "generate", p.id), ()) for p in prompts]
        return prompts, self.bare.sampler.sampler.generate(prompts, plans)

    def measured(self) -> dict[str, float]:
        """Means over the trial's prompts of what `rl.evaluation` measures, NaN being left out."""
        trial, parts = self.trial, []
        noise = DEV_SEED if trial.split == "dev" else HELDOUT_SEED + trial.seed
        for start in range(0, trial.measured_on, EVALUATED_TOGETHER):
            size = min(EVALUATED_TOGETHER, trial.measured_on - start)
            prompts, videos = self.films(range(first := noise * 1_000_000 + start, first + size), noise)
            for i, prompt in enumerate(prompts):  # one by one: the number of points differs
                scored = np.ones((1, videos.shape[1]), bool)
                truth = self.bare.world.truth(prompt)[None]
                batch = reward_batch([prompt], videos[i : i + 1], scored, [prompt.id], [prompt.id], [0],
                                     self.bare.config.fps, 0, "heldout", truth)  # fmt: skip
                parts.append(measure(batch))
        return {name: float(np.nanmean([part[name] for part in parts])) for name in parts[0]}


def run(trial: Trial, base: dict[str, float] | None = None, *more: str) -> dict[str, Any]:
    """Trains and measures: {"trial", "curve": [{"cpu_s", "iterations", metric: mean}, ...], "kl"}.

    base: what the untrained policy measures on the same prompts, where that is known.
    """
    torch.set_num_threads(1)
    training = Training(trial, *more)
    curve = [{"cpu_s": 0.0, "iterations": 0, **(base or training.measured())}]
    for point in trial.points:
        training.train(point)
        curve.append({"cpu_s": training.cpu_s, "iterations": training.done, **training.measured()})
    return {"trial": asdict(trial), "curve": curve, "kl": training.stats["kl"]}
