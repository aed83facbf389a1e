"""What sharing the prefix of a group saves: `video` with one trunk per prompt, against G videos from the start.

python -m benchmarks.prefix

Both sides make the same groups from the same plans, one prompt for every (block, step) that can be selected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import FrameCounter, alternate, figure, read_config, write
from jobs.build import policy_source
from policy.policy import load_policy
from policy.transition import Kernel
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import make_plan
from rollout.sprites import SpriteWorld


def measure(members: int, repeats: int, *overrides: str) -> list[dict[str, Any]]:
    policy = load_policy(policy_source(read_config(*overrides).policy))
    world = SpriteWorld(policy.settings.size, policy.settings.frames)
    blocks, steps = len(policy.sizes) - 1, len(policy.sigmas) - 1
    pairs = [(block, step) for block in range(1, blocks + 1) for step in range(steps - 1)]
    prompts = [world.prompt("train", i) for i in range(len(pairs))]
    plans = [
        replace(make_plan(0, 0, prompt.id, "video", blocks, steps), selected=(pair,))
        for prompt, pair in zip(prompts, pairs)
    ]
    counter, frames, sides = FrameCounter(policy.net.model), {}, {}
    for name, select in (("shared prefix", "video"), ("own prefix", "frame")):
        # White noise costs no pass of its own: what differs is the prefix alone.
        sampler = GroupSampler(policy, RolloutSettings(select, members, "white", Kernel()))
        sides[name] = lambda sampler=sampler: sampler.rollout(prompts, plans, 0)
        sides[name]()
        frames[name] = counter.taken()
    seconds = alternate(repeats, sides)
    return [{"side": name, "members": members, "rollout_s per group": seconds[name] / len(prompts),
             "frames per group": frames[name] / len(prompts)} for name in sides]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = measure(16, 2)
    ratio = rows[1]["rollout_s per group"] / rows[0]["rollout_s per group"]
    about = (
        "`video`, 12 prompts, one for every (block, step), suffixes to the end: the rollout of a group whose members "
        "share what lies before the branch, and of one whose members each generate it. Median CPU-seconds of 2 runs."
    )
    write("prefix", about, rows, [figure("rollout, own prefix / shared prefix", ratio, ">= 1.3")])


if __name__ == "__main__":
    main()
