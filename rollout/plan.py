"""Which randomness a prompt gets in an iteration: a pure function of (run seed, iteration, prompt), known before any
worker is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.seeds import numpy_generator, torch_generator

SELECTS = ("trunk", "video", "frame", "all")


@dataclass(frozen=True)
class NoisePlan:
    """The noise of one prompt's group(s).

    key: what every seed is derived from. selected: the stochastic (block, step) pairs; blocks count from
    1, the given first frame being block 0. Members of a group share everything here except `exploration`.
    """

    key: tuple[object, ...]
    selected: tuple[tuple[int, int], ...]

    def steps(self, block: int) -> tuple[int, ...]:
        return tuple(k for b, k in self.selected if b == block)

    def initial(self, block: int, shape: tuple[int, ...]) -> Tensor:
        """Initial noise of a block, shared by the group."""
        return torch.randn(shape, generator=torch_generator(*self.key, "initial", block))

    def renoise(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Noise of an unselected step of a renoising sampler, shared by the group."""
        return torch.randn(shape, generator=torch_generator(*self.key, "renoise", block, step))

    def exploration(self, block: int, step: int, member: int) -> torch.Generator:
        """What one member draws at a selected step: its own, and no other member's of any group."""
        return torch_generator(*self.key, "exploration", block, step, member)


def make_plan(seed: int, iteration: int, prompt_id: str, select: str, blocks: int, steps: int) -> NoisePlan:
    """Draws what is stochastic, once per group. The last step (s' = 0) is never selected.

    trunk, frame: one step in every block. video: one (block, step) in the video. all: every step but the last
    (Flow-GRPO). blocks: generated blocks; steps: denoising steps per block. Raises ValueError for fewer than two
    steps.
    """
    if steps < 2:
        raise ValueError("selective stochasticity needs at least two denoising steps: the last one is deterministic")
    rng = numpy_generator(seed, iteration, prompt_id, "selected")
    drawn = [int(k) for k in rng.integers(steps - 1, size=blocks)]
    if select == "video":
        block = 1 + int(rng.integers(blocks))
        selected = ((block, drawn[0]),)
    elif select in ("trunk", "frame"):
        selected = tuple((b + 1, k) for b, k in enumerate(drawn))
    elif select == "all":
        selected = tuple((b + 1, k) for b in range(blocks) for k in range(steps - 1))
    else:
        raise ValueError(f"rollout.select={select!r} is none of {', '.join(SELECTS)}")
    return NoisePlan((seed, iteration, prompt_id), selected)
