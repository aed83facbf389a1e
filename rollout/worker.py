"""What a rollout worker does, as a plain class: it holds a policy and rolls out the prompts that it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from policy.policy import PolicySource, load_policy
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import NoisePlan
from rollout.prompts import PromptSource
from rollout.records import Films, GroupRollout, Replay, on_cpu


class RolloutWorker:
    """policy, weights: of `load_policy`. source: makes the prompt source in the worker's own process. compile: the
    transformer's blocks, by torch.compile, for any number of rows and frames: minutes once, and a compiler is needed.
    """

    def __init__(
        self,
        policy: str | PolicySource,
        weights: str | None,
        settings: RolloutSettings,
        source: Callable[[], PromptSource],
        seed: int,
        compile: bool = False,
    ) -> None:
        self.policy = load_policy(policy, weights).to("cuda" if torch.cuda.is_available() else "cpu")
        self.policy.net.requires_grad_(False)
        if compile:
            self.policy.net.model.compile_repeated_blocks(dynamic=True)
        self.groups = GroupSampler(self.policy, settings)
        self.source, self.seed = source(), seed
        self.version = 0

    def rollout(self, iteration: int, indices: Sequence[int], version: int) -> tuple[list[GroupRollout], list[Replay]]:
        """Groups and replays of the train prompts `indices`. Raises ValueError unless it holds weights `version`."""
        if version != self.version:
            raise ValueError(f"asked for weights {version}, but this rollout worker holds {self.version}")
        prompts = [self.source.prompt("train", i) for i in indices]
        plans = [self.groups.plan(self.seed, iteration, p.id) for p in prompts]
        groups, replays = self.groups.rollout(prompts, plans, version)
        return groups, [on_cpu(replay) for replay in replays]

    def generate(self, split: str, indices: Sequence[int], noise_seed: int) -> Films:
        """Videos of the prompts without exploration, a function of (noise_seed, prompt) alone."""
        prompts = [self.source.prompt(split, i) for i in indices]
        plans = [NoisePlan((noise_seed, "generate", p.id), ()) for p in prompts]
        videos = self.groups.sampler.generate(prompts, plans)
        truths = [self.source.truth(p) for p in prompts]
        return Films(tuple(prompts), videos, None if truths[0] is None else np.stack(truths))
