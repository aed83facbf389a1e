"""What the loop itself costs with 64 rollout workers on a simulated cluster of four nodes, and over 1,000 iterations.

python -m benchmarks.many_workers

The nodes are Ray nodes of one machine, the workers sleep. Scheduling cost of a group: what an iteration takes beyond
the rounds of sleep that it cannot do without, divided by its groups; reward, learner and weight sync included.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.common import ROOT, figure, write
from benchmarks.sleepers import sleepers
from rl.loop import LoopSettings

NODES, WORKERS = 4, 64
LONG = 1000


@contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[None]:
    """A Ray of several nodes on this machine, connected to inside the block."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    made = Cluster()
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=cpus, object_store_memory=100 * 2**20, include_dashboard=False)
        ray.init(made.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def scheduling(workers: int, groups: int, seconds: float, iterations: int) -> dict[str, Any]:
    """Rollouts of so many seconds, one group each; the first iteration does not count."""
    settings = LoopSettings(0, iterations, groups, 1, True, 5.0, False, iterations)
    ends = []
    with sleepers("ray", {"rollout": (seconds, workers), "reward": (0.0, 2), "learner": (0.0, 1)}, 1.0) as run:
        nodes = len({actor["NodeID"] for actor in _actors()})
        began = time.process_time()
        run(settings, log=lambda *_: ends.append(time.perf_counter()))
        cpu_s = time.process_time() - began
    iteration_s = statistics.median(b - a for a, b in pairwise(ends))
    return {
        "workers": workers,
        "nodes": nodes,
        "groups per iteration": groups,
        "s per iteration": iteration_s,
        "of it sleep_s": seconds * groups / workers,
        "ms per group": 1000 * (iteration_s - seconds * groups / workers) / groups,
        "driver CPU ms per group": 1000 * cpu_s / groups / iterations,
    }


def _actors() -> list[dict[str, Any]]:
    return [state["Address"] for state in ray._private.state.actors().values() if state["State"] == "ALIVE"]


def growth(workers: int, groups: int, iterations: int) -> list[dict[str, Any]]:
    """The driver's memory from the tenth iteration on."""
    settings = LoopSettings(0, iterations, groups, 1, True, 5.0, False, iterations, max_staleness=1)
    me, rows = psutil.Process(), []

    def log(step: int, _: dict[str, float]) -> None:
        if step == min(10, iterations) or step % max(1, iterations // 4) == 0:
            rows.append({"iteration": step, "driver MB": me.memory_info().rss / 2**20})

    with sleepers("ray", {"rollout": (0.0, workers), "reward": (0.0, 1), "learner": (0.0, 1)}) as run:
        run(settings, log=log)
    return [row | {"grown by MB": row["driver MB"] - rows[0]["driver MB"]} for row in rows]


def main() -> None:
    with cluster(NODES, WORKERS // NODES):
        row = scheduling(WORKERS, 256, 0.5, 6)
        rows = growth(4, 8, LONG)
    about = (
        f"{WORKERS} rollout workers that sleep 0.5 s per group on {NODES} Ray nodes of one machine, two judges and a "
        f"learner that do nothing: {', '.join(f'{name} {value:.3g}' for name, value in row.items())}. Below, the "
        f"driver's resident memory over {LONG} iterations of 8 groups on 4 rollout workers, max_staleness=1."
    )
    write("many_workers", about, rows, [
        figure("ms of scheduling per group, 64 workers", row["ms per group"], "<= 10"),
        figure(f"MB that the driver grows by over {LONG} iterations", rows[-1]["grown by MB"], "<= 20"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
