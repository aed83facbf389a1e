"""The learner with one forward per group against one per member, on the same rollout.

python -m benchmarks.one_forward
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import alternate, write
from benchmarks.iteration import bare
from rollout.records import Replay


def per_member(replay: Replay) -> list[Replay]:
    """The same actions as they would be recorded if the members did not share their state."""
    return [
        replace(
            replay,
            actions=tuple(
                replace(a, members=(m,), coordinates=a.coordinates[:, i : i + 1], logp=a.logp[:, i : i + 1])
                for a in replay.actions
                for i, m in enumerate(a.members)
                if i == member
            ),
        )
        for member in range(len(replay.actions[0].members))
    ]


def measure(select: str, members: int, prompts: int, repeats: int, *more: str) -> dict[str, Any]:
    parts = bare(select, members, prompts, "learner.freeze=[]", "learner.decay_iterations=null", "learner.lr=0", *more)
    groups, replays = parts.rollout(0)
    scores = parts.score(groups)
    split = [[one for replay in chunk for one in per_member(replay)] for chunk in replays]

    def learn(chunks: list[list[Replay]]) -> torch.Tensor:
        parts.learn_again(chunks, scores)
        return parts.learner.engine.gradient

    once, many = learn(replays), learn(split)
    seconds = alternate(repeats, {"one": lambda: learn(replays), "many": lambda: learn(split)})
    return {"select": select, "members": members, "one forward_s": seconds["one"],
            "G forwards_s": seconds["many"], "ratio": seconds["many"] / seconds["one"],
            "gradients differ by": float((once - many).norm() / once.norm())}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(select, 16, 2, 3) for select in ("trunk", "video")]
    about = (
        "The learner's update on 2 prompts and groups of 16: each group's shared state evaluated once, or once for "
        "every member. Median CPU-seconds of 3 runs; relative difference of the two gradients in float32, where those "
        "of the members, rounded one by one, nearly cancel. At a small size a test holds it to 1e-6."
    )
    write("one_forward", about, rows)


if __name__ == "__main__":
    main()
