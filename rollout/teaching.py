"""Endless supervised examples from the sprite world, for pretraining the codec and the policy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from policy.codec import from_pixels
from policy.control import Drag
from policy.policy import DragPolicy
from rollout.seeds import numpy_generator
from rollout.sprites import SpriteWorld


def frame_batches(world: SpriteWorld, batch: int, per_video: int, seed: int) -> Iterator[Tensor]:
    """Batches of single frames, float [batch, 3, 1, H, W], `per_video` different ones of each video."""
    rng, index = numpy_generator(seed, "frames"), 0
    while True:
        frames = []
        for _ in range(batch // per_video):
            video, _, _ = world.sample("pretrain", index)
            frames.extend(video[rng.choice(len(video), per_video, replace=False)])
            index += 1
        yield from_pixels(torch.from_numpy(np.stack(frames)[:, None]))


def example_batches(
    policy: DragPolicy, world: SpriteWorld, batch: int, pool: int, fresh: int, follow: tuple[float, float], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (latents [batch, C, F, h, w], control [batch, Cc, F, h, w]) drawn from a pool of encoded videos.

    The pool starts with `pool / 8` videos, takes up `fresh` new ones a batch, and drops its oldest beyond `pool`.
    follow: the range of the share of the drag's displacement that sprites cover; drawn per video.
    """
    rng, stored, index = numpy_generator(seed, "examples"), [], 0
    while True:
        for _ in range(fresh if stored else pool // 8):
            stored.append(_example(policy, world, index, rng.uniform(*follow)))
            index += 1
        del stored[:-pool]
        chosen = rng.choice(len(stored), batch, replace=False)
        latents, control = (torch.stack([stored[i][part] for i in chosen]).float() for part in (0, 1))
        yield latents, control


@torch.no_grad()
def _example(policy: DragPolicy, world: SpriteWorld, index: int, follow: float) -> tuple[Tensor, Tensor]:
    video, tracks, visible = world.sample("pretrain", index, follow)
    pixels = from_pixels(torch.from_numpy(video))[None]
    drag = Drag(pixels[:, :, 0], torch.from_numpy(tracks)[None], torch.from_numpy(visible)[None])
    return policy.codec.encode(pixels)[0].half(), policy.control.encode(drag)[0].half()
