"""Streaming with a KV cache against re-running the whole history at every step.

python -m benchmarks.kv_cache
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import FrameCounter, alternate, read_config, write
from jobs.build import policy_source
from policy.policy import DragPolicy, load_policy
from rollout.plan import NoisePlan
from rollout.sampler import Sampler
from rollout.sprites import SpriteWorld


@torch.no_grad()
def cached(policy: DragPolicy, prompts: list, plans: list[NoisePlan]) -> Tensor:
    """All latents [B, C, F, h, w]."""
    sampler = Sampler(policy)
    stream, first = sampler.begin(prompts)
    latents = [first]
    while stream.block < len(sampler.frames):
        latents.append(sampler.finish(stream, sampler.initial(plans, stream.block), plans))
        stream = sampler.append(stream, latents[-1])
    return torch.cat(latents, 2)


@torch.no_grad()
def rerun(policy: DragPolicy, prompts: list, plans: list[NoisePlan]) -> Tensor:
    """The same latents, each step a pass over [the clean frames so far | the block]."""
    sampler = Sampler(policy)
    stream, clean = sampler.begin(prompts)
    for block in range(1, len(sampler.frames)):
        x, frames = sampler.initial(plans, block), sampler.frames[block]
        known = torch.cat((clean, stream.control[:, :, : frames.start]), 1)
        for k, (s, _) in enumerate(sampler.levels):
            t = torch.full((len(x), x.shape[2]), s * 1000)
            noisy = torch.cat((x, stream.control[:, :, frames]), 1)
            v = policy.net.packed(known, noisy, t, stream.text, policy.sizes, [block])
            x = sampler.advance(x, v, k, plans, block)
        clean = torch.cat((clean, x), 2)
    return clean


def measure(prompts: int, repeats: int, *overrides: str) -> list[dict[str, Any]]:
    policy = load_policy(policy_source(read_config(*overrides).policy))
    world = SpriteWorld(policy.settings.size, policy.settings.frames)
    some = [world.prompt("heldout", i) for i in range(prompts)]
    plans = [NoisePlan((0, "generate", p.id), ()) for p in some]
    counter, sides, frames, latents = FrameCounter(policy.net.model), {}, {}, []
    for name, way in (("KV cache", cached), ("whole history", rerun)):
        sides[name] = lambda way=way: way(policy, some, plans)
        latents.append(sides[name]())
        frames[name] = counter.taken()
    differ = (latents[0] - latents[1]).abs().max().item()
    seconds = alternate(repeats, sides)
    return [{"side": name, "s per video": seconds[name] / prompts, "frames per video": frames[name] / prompts,
             "latents differ by": differ} for name in sides]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    about = "16 videos of 13 frames in 6 blocks of 3 steps, without the codec; median CPU-seconds of 5 runs."
    write("kv_cache", about, measure(16, 5))


if __name__ == "__main__":
    main()
