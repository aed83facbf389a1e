"""What an iteration costs, for every way of selecting the noise: `make bench`.

Seconds are of one thread on the machine at hand and only their ratios mean anything; the counts of network
frame-evaluations do not depend on a machine. Writes benchmarks/results/iteration.{json,md}.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch

from policy.policy import load_policy
from policy.transition import Kernel
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import make_plan
from rollout.replay import ReplayBatch, batches
from rollout.sprites import SpriteWorld

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"trunk": ("tangent", 4.0), "video": ("tangent", 4.0), "frame": ("white", 1.0), "all": ("white", 1.0)}


class FrameCounter:
    """Counts rows x latent frames that the network evaluates, as a forward hook."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.frames = 0
        module.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.frames += inputs[0].shape[0] * inputs[0].shape[2]


def measure(select: str, prompts: int, members: int, repeats: int) -> dict[str, float]:
    explore, amplitude = SETTINGS[select]
    policy, world = load_policy(ROOT / "policy/weights/tiny"), SpriteWorld()
    counter = FrameCounter(policy.net.model)
    sampler = GroupSampler(policy, RolloutSettings(select, members, explore, Kernel("cps", 0.5, amplitude)))
    asked = [world.prompt("train", i) for i in range(prompts)]
    best: dict[str, float] = {}
    for iteration in range(repeats):
        plans = [
            make_plan(0, iteration, p.id, select, members, len(policy.sizes) - 1, len(policy.sigmas) - 1) for p in asked
        ]
        counter.frames, started = 0, time.perf_counter()
        groups, replays = sampler.rollout(asked, plans, 0)
        rolled, rollout_frames = time.perf_counter(), counter.frames
        counter.frames = 0
        for indices in batches(replays, 4):
            batch = ReplayBatch(tuple(replays[i] for i in indices))
            logp = batch.log_probs(sampler.settings.kernel, batch.velocity(policy, policy.net))
            sum(lp.mean() for lp in logp).backward()
        policy.net.zero_grad()
        seen = {"rollout_s": rolled - started, "learn_s": time.perf_counter() - rolled}
        best = {name: min(value, best.get(name, value)) for name, value in seen.items()}
        best |= {"rollout_frames": rollout_frames, "learn_frames": counter.frames}
    blocks = len(policy.sizes) - 1
    scored = len(groups) if select in ("trunk", "video") else len(groups) * blocks
    return {"groups": scored, **best}


def main(prompts: int = 4, sizes: tuple[int, ...] = (8, 16), repeats: int = 2) -> None:
    torch.set_num_threads(1)
    rows = [
        {"select": select, "members": g, **measure(select, prompts, g, repeats)} for g in sizes for select in SETTINGS
    ]
    out = ROOT / "benchmarks/results"
    out.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, one thread"
    (out / "iteration.json").write_text(
        json.dumps({"machine": machine, "prompts": prompts, "rows": rows}, indent=1) + "\n"
    )
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |" for row in rows
    ]
    (out / "iteration.md").write_text(
        f"{prompts} prompts an iteration; {machine}; least of {repeats} runs.\n\n" + "\n".join(lines) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
