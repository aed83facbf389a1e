"""The whole loop on Ray (fleets, object store, DeepSpeed, weight sync, MLflow) against its bare mathematics.

python -m benchmarks.whole_loop

The same iterations of the default configuration in turn, on Ray with one rollout and one reward worker and as
functions of this process. CPU time on Ray is that of all processes of this one's tree, Ray's own included.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import Bare, figure, write
from jobs.build import loop_settings, make_judges, make_learner, make_rollout_fleet, policy_source, term_weights
from rl.fleet import closing
from rl.loop import Clock, train
from rl.pipeline import Fleets
from rl.ray_fleet import ray_session
from rl.tracking import Tracking


def tree_cpu_seconds() -> float:
    """CPU time of this process and of all that it started and that live."""
    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def timed(work: Callable[[], Any], cpu: Callable[[], float]) -> tuple[float, float]:
    """CPU- and wall-seconds."""
    before, started = cpu(), time.perf_counter()
    work()
    return cpu() - before, time.perf_counter() - started


def measure(repeats: int, *overrides: str) -> list[dict[str, Any]]:
    bare = Bare("cluster.rollout.replicas=1", "cluster.reward.replicas=1", *overrides)
    c, seen = bare.config, {"bare": [], "Ray": []}
    with (
        tempfile.TemporaryDirectory() as home,
        Tracking.open(f"sqlite:///{home}/mlflow.db", "bench", None, params={}, tags={}, required=True,
                      spool=Path(home) / "spool") as tracking,
        ray_session("local"),
        closing(make_rollout_fleet(c, policy_source(c.policy).settings()), make_judges(c), make_learner(c)) as parts,
    ):  # fmt: skip
        fleets = Fleets(*parts)
        log = lambda step, metrics: tracking.log(metrics, step)  # noqa: E731
        for i in range(repeats + 1):
            settings = replace(loop_settings(c), iterations=i + 1)
            seen["Ray"].append(
                timed(lambda: train(fleets, term_weights(c), settings, [i], log, lambda step: None, lambda step: False,  # noqa: B023
                                    Clock()),
                      tree_cpu_seconds)
            )  # fmt: skip
            seen["bare"].append(timed(lambda: bare.iteration(i), time.process_time))  # noqa: B023
    return [{"side": name, "cpu_s": statistics.median(cpu for cpu, _ in runs[1:]),
             "wall_s": statistics.median(wall for _, wall in runs[1:])} for name, runs in seen.items()]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would lose against other work on the machine
    rows = measure(5)
    about = (
        "One iteration of the default configuration (12 prompts in tasks of 3, groups of 8): as functions of one "
        "process, and on Ray with one rollout worker, one reward worker, one DeepSpeed rank and MLflow. Medians of 5 "
        "iterations, taken in turn."
    )
    bare, on_ray = rows
    write("whole_loop", about, rows, [figure(f"{clock}, Ray / bare", on_ray[clock] / bare[clock], "<= 1.15")
                                      for clock in ("wall_s", "cpu_s")])  # fmt: skip


if __name__ == "__main__":
    main()
