"""The learner as a pupil: it is taught what a drag means by true videos, before reinforcement learning can steer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from policy.policy import PolicySource
from policy.pretrain import Example, flow_loss
from policy.transition import Kernel
from rl.learner import Learner, LearnerSettings
from rollout.prompts import DragPrompt, PromptError, PromptSource
from rollout.seeds import seed_of, torch_generator
from rollout.teaching import true_examples


@dataclass(frozen=True)
class Lessons:
    """batch: videos of a step, all ranks together. heldout: videos that are measured. context_noise, on_schedule: as in
    `policy.pretrain.FlowMatching`.
    """

    batch: int
    heldout: int
    context_noise: float
    on_schedule: float


class Teacher(Learner):
    """A rank that takes its share of every batch. Which videos and which noise is a function of seed and version, so
    that a resume goes on as if nothing had been.
    """

    def __init__(
        self,
        policy: str | PolicySource,
        weights: str | None,
        settings: LearnerSettings,
        ranks: int,
        source: Callable[[], PromptSource],
        lessons: Lessons,
        seed: int,
    ) -> None:
        super().__init__(policy, weights, Kernel(), settings, ranks)
        self.source, self.lessons, self.seed = source(), lessons, seed

    def join(self, rank: int, address: tuple[str, int]) -> None:
        super().join(rank, address)
        self.policy.to(self.policy.device)  # the codec and the encoders, beside the network: pupils see videos

    def teach(self) -> dict[str, float]:
        """One step of flow matching with teacher forcing: each block given the true frames before it."""
        stats, loss_sum = {"lr": self._set_lr()}, 0.0
        mine, size = self._mine(self.lessons.batch), self.settings.micro_batch
        for at in range(0, len(mine), size):
            chosen = mine[at : at + size]
            names = [seed_of(self.seed, "video", self.version, i) for i in chosen]
            example = self._examples([self.source.prompt("train", name) for name in names])
            generator = torch_generator(self.seed, "noise", self.version, chosen[0])
            loss = flow_loss(self.engine, self.policy, example, self.lessons, generator)
            share = len(chosen) / len(mine)
            loss_sum += share * loss.item()
            stats |= self._descend(share * loss, at + size >= len(mine))
        self.version += 1
        return stats | {"loss": loss_sum}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The loss on this rank's held-out videos, with their drags and with drags that stay where they begin. A policy
        that does not feel its drag has one and the same.
        """
        sums = {"loss": 0.0, "loss_still": 0.0}
        mine = self._mine(self.lessons.heldout)
        for i in mine:
            prompt = self.source.prompt("heldout", i)
            for name, asked in (("loss", prompt), ("loss_still", still(prompt))):
                generator = torch_generator(self.seed, "heldout", i)
                example = self._examples([prompt], [asked])
                sums[name] += flow_loss(self.policy.net, self.policy, example, self.lessons, generator).item()
        return {name: value / len(mine) for name, value in sums.items()}

    def _mine(self, count: int) -> range:
        return range(self.rank, count, self.ranks)

    def _examples(self, prompts: Sequence[DragPrompt], asked: Sequence[DragPrompt] | None = None) -> Example:
        """asked: the prompts with other drags."""
        videos = [self.source.truth(prompt) for prompt in prompts]
        for prompt, video in zip(prompts, videos):
            if video is None:
                raise PromptError(f'prompt {prompt.id!r} has no video to learn from; give its row the key "video"')
        return true_examples(self.policy, asked or prompts, videos)


def still(prompt: DragPrompt) -> DragPrompt:
    """The same with every point staying where it is in the first frame."""
    stay = lambda values: values[:1].repeat(len(values), 0)  # noqa: E731
    return replace(prompt, tracks=stay(prompt.tracks), visible=stay(prompt.visible))
