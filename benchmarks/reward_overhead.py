"""What the reward fleets cost beside the rewards: the time to score clips with a reward that does nothing.

python -m benchmarks.reward_overhead

A chunk is what a rollout worker hands over: 4 prompts, 6 blocks, groups of 8, 192 clips of 3 to 13 frames of
64 x 64. It lies in the object store; the time is that from submitting it to holding its scores. Writes
benchmarks/results/reward_overhead.{json,md}.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import numpy as np
import ray

from benchmarks.common import figure, write
from rewards.contract import RewardBatch
from rewards.terms import Term
from rl.fleet import FleetSpec, closing, make_fleet
from rl.judges import SHARED, Judges
from rl.ray_fleet import ray_session
from rl.reward_worker import RewardWorker
from rollout.records import GroupRollout
from rollout.sprites import SpriteWorld

CHUNKS = 4


def nothing(batch: RewardBatch) -> np.ndarray:
    return np.zeros(len(batch))


def chunk(first: int, prompts: int = 4, blocks: int = 6, members: int = 8) -> list[GroupRollout]:
    world, groups = SpriteWorld(), []
    for index in range(first, first + prompts):
        prompt = world.prompt("train", index)
        film = world.truth(prompt)
        for block in range(blocks):
            start = 1 + 2 * block
            own = np.repeat(film[None, start : start + 2], members, 0)
            groups.append(
                GroupRollout(
                    f"{index}/{block}", prompt, film[:start], own, {block + 1: range(start, start + 2)}, index, 0
                )
            )
    return groups


def measure(backend: str, fleets: int, repeats: int = 5) -> float:
    """Least milliseconds per clip, of all chunks together, over the repeats after a first one."""
    names = [SHARED, *(f"rewards.{i}" for i in range(1, fleets))]
    made = {
        name: make_fleet(backend, RewardWorker, FleetSpec(name), (lambda name=name: [Term(name, nothing)], 8.0))
        for name in names
    }
    work = [chunk(4 * i) for i in range(CHUNKS)]
    clips = sum(len(group.members) for groups in work for group in groups)
    with closing(Judges(made, {name: [name] for name in names}, 0.0)) as (judges,):
        judges.dry_run(work[0][0].prompt)
        chunks = [ray.put(groups) for groups in work] if backend == "ray" else work
        seconds = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            judges.collect([judges.score(groups, 0) for groups in chunks])
            seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds[1:]) / clips


def main() -> None:
    rows = []
    for backend, fleets in (("inline", 1), ("ray", 1), ("ray", 3)):
        with ray_session("local", num_cpus=2, object_store_gb=0.5) if backend == "ray" else nullcontext():
            rows.append({"where": backend, "fleets": fleets, "ms per video": measure(backend, fleets)})
    about = f"A reward that does nothing; {CHUNKS} chunks of 192 clips, least of 5 runs."
    most = max(row["ms per video"] for row in rows)
    write("reward_overhead", about, rows, [figure("ms per video of fleets beside nothing", most, "<= 5")])


if __name__ == "__main__":
    main()
