"""Supervised examples: endless ones from the sprite world, for pretraining codec and policy, and a user's videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.attention import KVCache
from policy.codec import from_pixels
from policy.control import Drag
from policy.policy import DragPolicy
from policy.pretrain import Example
from rollout.prompts import DragPrompt
from rollout.sampler import Sampler, Stream, collate
from rollout.seeds import numpy_generator, torch_generator
from rollout.sprites import SpriteWorld


def frame_batches(world: SpriteWorld, batch: int, per_video: int, seed: int) -> Iterator[Tensor]:
    """Batches of single frames, float [batch, 3, 1, H, W], `per_video` different ones of each video."""
    if batch % per_video:
        raise ValueError(f"codec.batch={batch} must be a multiple of codec.per_video={per_video}")
    rng, index = numpy_generator(seed, "frames"), 0
    while True:
        frames = []
        for _ in range(batch // per_video):
            video, _, _ = world.sample("pretrain", index)
            frames.extend(video[rng.choice(len(video), per_video, replace=False)])
            index += 1
        yield from_pixels(torch.from_numpy(np.stack(frames)[:, None]))


@dataclass(frozen=True)
class Teaching:
    """batch: examples at a time, drawn from `pool` encoded videos, of which `fresh` are replaced every batch.

    lag: frames by which the sprites are behind the drag. own_history: the policy is shown its own video, as far as it
    has come, in place of the true one before each block.
    """

    batch: int
    pool: int
    fresh: int
    lag: float = 0.0
    own_history: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.pool // 8:
            raise ValueError(f"batch={self.batch} is drawn from pool / 8 videos at first: pool={self.pool} must be at "
                             f"least {8 * self.batch}")  # fmt: skip


def example_batches(
    policy: DragPolicy, world: SpriteWorld, teaching: Teaching, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of (latents [batch, C, F, h, w], control [batch, Cc, F, h, w], history like latents).

    The pool starts with `pool / 8` videos, takes up `fresh` new ones a batch, and drops its oldest beyond `pool`.
    The policy is the one in training: its own histories are made with the weights it has when they are asked for.
    """
    rng, noise, stored, index = numpy_generator(seed, "examples"), torch_generator(seed, "history"), [], 0
    while True:
        for _ in range(teaching.fresh if stored else teaching.pool // 8):
            stored.append(_example(policy, world, index, teaching.lag))
            index += 1
        del stored[: -teaching.pool]
        chosen = rng.choice(len(stored), teaching.batch, replace=False)
        latents, control = (torch.stack([stored[i][part] for i in chosen]).float() for part in (0, 1))
        history = own_history(policy, latents[:, :, :1], control, noise) if teaching.own_history else latents
        yield latents, control, history


@torch.no_grad()
def _example(policy: DragPolicy, world: SpriteWorld, index: int, lag: float) -> tuple[Tensor, Tensor]:
    video, tracks, visible = world.sample("pretrain", index, lag)
    pixels = from_pixels(torch.from_numpy(video))[None]
    drag = Drag(pixels[:, :, 0], torch.from_numpy(tracks)[None], torch.from_numpy(visible)[None])
    return policy.codec.encode(pixels)[0].half(), policy.control.encode(drag)[0].half()


@torch.no_grad()
def true_examples(policy: DragPolicy, prompts: Sequence[DragPrompt], videos: Sequence[np.ndarray]) -> Example:
    """Teacher forcing on true videos, uint8 [T, H, W, 3] each, whose objects move as their prompts' tracks say."""
    drag = policy.control.prepare(collate(prompts, policy.device))
    latents = policy.codec.encode(from_pixels(torch.from_numpy(np.stack(videos))).to(policy.device))
    return Example(latents, policy.control.encode(drag), latents, policy.context([p.text for p in prompts], drag))


@torch.no_grad()
def own_history(policy: DragPolicy, first: Tensor, control: Tensor, noise: torch.Generator) -> Tensor:
    """The video that the policy makes of a first latent [B, C, 1, h, w] and a control [B, Cc, F, h, w], as latents
    [B, C, F, h, w] (Self-Rollout).
    """
    sampler, written = Sampler(policy), [first]
    stream = Stream(None, control, policy.text([""] * len(control)), KVCache(), None, 0)
    for size in policy.sizes[1:]:
        stream = sampler.append(stream, written[-1])
        x = torch.randn(*first.shape[:2], size, *first.shape[3:], generator=noise)
        written.append(sampler.finish(stream, x, ()))
    return torch.cat(written, 2)
