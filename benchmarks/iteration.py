"""What an iteration costs, for every way of selecting the noise and four group sizes.

python -m benchmarks.iteration

CPU-seconds of one thread on the machine at hand, of which only ratios mean anything; the counts of network
frame-evaluations do not depend on a machine. The learner is the mathematics without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import Bare, FrameCounter, cpu_seconds, figure, write

SELECTS = {"trunk": ("tangent", 14.0), "video": ("tangent", 14.0), "frame": ("white", 1.0), "all": ("white", 1.0)}
PHASES = ("rollout_s", "reward_s", "learn_s")


def bare(select: str, members: int, prompts: int, *more: str) -> Bare:
    explore, amplitude = SELECTS[select]
    return Bare(f"rollout.select={select}", f"rollout.explore={explore}", f"rollout.amplitude={amplitude}",
                f"rollout.group_size={members}", f"rollout.prompts_per_iteration={prompts}",
                f"rollout.prompts_per_task={prompts}", *more)  # fmt: skip


def once(parts: Bare, iteration: int) -> dict[str, float]:
    """One iteration. `video` goes through its blocks and steps in turn, so that a few runs are a fair average."""
    blocks, steps = len(parts.policy.sizes) - 1, len(parts.policy.sigmas) - 2
    if parts.sampler.settings.select == "video":
        plan = lambda i, plan: replace(plan, selected=((1 + iteration % blocks, i % steps),))  # noqa: E731
    else:
        plan = lambda i, plan: plan  # noqa: E731
    counter = parts.counter
    (groups, replays), rollout_s = cpu_seconds(lambda: parts.rollout(iteration, plan))
    rollout_frames = counter.taken()
    scores, reward_s = cpu_seconds(lambda: parts.score(groups))
    _, learn_s = cpu_seconds(lambda: parts.learn(replays, scores, iteration))
    return {"groups": sum(len(group.blocks) for group in groups), "rollout_s": rollout_s, "reward_s": reward_s,
            "learn_s": learn_s, "rollout_frames": rollout_frames, "learn_frames": counter.taken()}  # fmt: skip


def measure(prompts: int, sizes: Sequence[int], repeats: dict[str, int], *more: str) -> list[dict[str, Any]]:
    """repeats: by select. Means over the repeats, after a run that is not counted where there are several."""
    rows = []
    for members in sizes:
        parts = {select: bare(select, members, prompts, *more) for select in repeats}
        seen: dict[str, list[dict]] = {select: [] for select in parts}
        for select, made in parts.items():
            made.counter = FrameCounter(made.policy.net.model)
            if repeats[select] > 1:
                once(made, 0)
        for i in range(max(repeats.values())):
            for select, made in parts.items():
                if i < repeats[select]:
                    seen[select].append(once(made, i))
        for select, runs in seen.items():
            mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
            frames = {name: round(mean[name]) for name in ("rollout_frames", "learn_frames")}
            per_group = {f"{phase[:-2]}_s per group": mean[phase] / mean["groups"] for phase in PHASES}
            total = sum(mean[phase] for phase in PHASES)
            row = {"select": select, "members": members, "groups": runs[0]["groups"], "iteration_s": total}
            rows.append(row | {phase: mean[phase] for phase in PHASES} | per_group | frames | {"runs": len(runs)})
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    at = {(row["select"], row["members"]): row for row in rows}
    rollout, learn = "rollout_s per group", "learn_s per group"
    least, most = min(row["members"] for row in rows), max(row["members"] for row in rows)
    found = [figure("rollout per scored group at G = 16, trunk / video",
                    at["trunk", 16][rollout] / at["video", 16][rollout], "<= 0.333")]  # fmt: skip
    for select in ("trunk", "video"):
        ratio = at["all", 16][learn] / at[select, 16][learn]
        growth = at[select, most][learn] / at[select, least][learn]
        found.append(figure(f"learner per scored group at G = 16, all / {select}", ratio, ">= 10"))
        found.append(figure(f"learner per scored group, {select}, G = {most} / G = {least}", growth, "<= 1.2"))
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows = measure(2, (8, 16), {"trunk": 6, "video": 6, "frame": 2, "all": 2})
    rows += measure(2, (32, 64), {"trunk": 6, "video": 6, "frame": 1, "all": 1})
    about = (
        "One iteration of 2 prompts of 6 blocks. A scored group is a group with an advantage of its own: one per block "
        "with trunk, frame and all, one per video with video, whose suffixes run to the end. Means of CPU-seconds over "
        "`runs`; video takes every block in turn. Frames: rows x latent frames that the policy evaluates, in the "
        "rollout and in the learner (where the frozen reference evaluates as many again)."
    )
    write("iteration", about, rows, figures(rows))


if __name__ == "__main__":
    main()
