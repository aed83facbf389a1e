"""A node of a Ray cluster is killed for real; every test in a process of its own, as a process has one connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from rl.fleet import Fleet

HERE = Path(__file__).parent
STORE = 150 * 2**20


def alone(case: str, *words: object, module: str = "test_node_loss") -> str:
    """Runs a function of a test file in a fresh process and gives what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", f"import sys, {module} as t; t.{case}(*sys.argv[1:])", *map(str, words)]
    done = subprocess.run(command, env=env, cwd=HERE.parent, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@contextmanager
def head(**resources: float) -> Iterator[Cluster]:
    """A cluster of one node, connected."""
    from ray.cluster_utils import Cluster

    from rl.ray_fleet import ray_session

    cluster = Cluster()
    try:
        cluster.add_node(object_store_memory=STORE, **resources)
        with ray_session(cluster.address):
            yield cluster
    finally:
        cluster.shutdown()


class Worker:
    version = 0

    def where(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    def film(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Too big to travel with the answer: both stay in the store of the worker's node."""
        noise = np.random.default_rng(seed)
        return noise.normal(size=10**5), noise.normal(size=10**5)

    def load(self, version: int) -> None:
        self.version = version

    def versioned(self, version: int) -> tuple[np.ndarray, np.ndarray]:
        if version != self.version:
            raise ValueError(f"asked for weights {version}, but this worker holds {self.version}")
        return self.film(version)

    def judge(self, film: np.ndarray, others: list[np.ndarray]) -> float:
        return film.sum() + 2 * sum(other.sum() for other in others)

    def update(self, films: list[np.ndarray]) -> float:
        """All ranks wait for each other inside, as in a collective."""
        import ray

        self.meet = getattr(self, "meet", None) or ray.get_actor("meeting")
        ray.get(self.meet.arrive.remote(), timeout=60)
        return float(sum(film.sum() for film in films))


class Meeting:
    def __init__(self, ranks: int) -> None:
        import asyncio

        self.ranks, self.here, self.all = ranks, 0, asyncio.Event()

    def where(self) -> str:
        return Worker().where()

    async def arrive(self) -> None:
        self.here += 1
        if self.here == self.ranks:
            self.all.set()
        await self.all.wait()


def lost_results() -> None:
    import ray

    from rl.fleet import FleetSpec, ResultLost, as_completed, fetch, make_fleet

    films = [Worker().film(seed) for seed in range(6)]
    with head(num_cpus=4) as cluster, ExitStack() as fleets:

        def fleet(name: str, **spec: Any) -> Fleet:
            made = make_fleet("ray", Worker, FleetSpec(name, replicas=2, num_cpus=1, timeout_s=200, **spec))
            fleets.callback(made.close)
            return made

        # They fill the first node: all films are made on the second, and nobody has read them when that is lost.
        judges, learner = fleet("judges"), fleet("learner", replace=False)
        (home,) = set(fetch(judges.broadcast("where") + learner.broadcast("where")))
        meeting = ray.remote(Meeting).options(name="meeting", num_cpus=0).remote(2)
        assert ray.get(meeting.where.remote(), timeout=120) == home
        second = cluster.add_node(num_cpus=2, object_store_memory=STORE)
        rollout = fleet("rollout")
        assert home not in fetch(rollout.broadcast("where"))
        made = [rollout.submit("film", seed, returns=2).result() for seed in range(6)]
        together = rollout.broadcast("film", 7)
        old = rollout.submit("versioned", 0, returns=2).result()
        rollout.broadcast("load", 1, keep=True)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=2, object_store_memory=STORE)

        judging = [judges.submit("judge", a, [b, a]) for a, b in made[:2]]
        learning = learner.submit_all("update", [([a for a, _ in made[r:4:2]],) for r in range(2)])
        assert fetch([task.result()[0] for task in judging]) == [Worker().judge(a, [b, a]) for a, b in films[:2]]
        assert fetch(list(learning.result())) == [sum(float(a.sum()) for a, _ in films[r:4:2]) for r in range(2)]
        assert all((fetch(x) == y).all() for x, y in zip(made[5], films[5]))  # the driver reads it itself
        assert [a.made.remakes for a, _ in made] == [1, 1, 1, 1, 0, 1]  # each that was asked for, once
        assert rollout.restarts == 2 and learner.restarts == judges.restarts == 0
        # What all replicas made together cannot be made again by one of them.
        with pytest.raises(ResultLost, match="lost with its node and cannot be made again"):
            fetch(together[0])
        fault = next(as_completed([judges.submit("judge", together[0], [])])).fault
        assert fault.kind == "lost" and "judges[" in fault.text and "cannot be made again" in fault.text
        # Nor what its worker no longer gives.
        fault = next(as_completed([judges.submit("judge", old[0], [])])).fault
        assert fault.kind == "lost" and "asked for weights 0, but this worker holds 1" in fault.text
        with pytest.raises(ResultLost, match="asked for weights 0"):
            fetch(old[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_results_lost_with_their_node_are_made_again_for_whoever_reads_them():
    alone("lost_results")


def train(run: str, *overrides: str) -> None:
    """Trains on three nodes. The second is killed after the first iteration; the others have room for its workers."""
    with head(num_cpus=2, num_gpus=1) as cluster:
        second, _ = (cluster.add_node(num_cpus=4, object_store_memory=STORE) for _ in range(2))

        def kill() -> None:
            while not (Path(run) / "metrics.jsonl").exists():
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        # The learner is where the GPU is: its loss is another matter.
        more = ("cluster=ray", "cluster.learner.num_cpus=0", "cluster.learner.num_gpus=1", f"run_dir={run}")
        more += ("cluster.placement=apart",)  # so that some are on the second
        assert run_job("train", *overrides, *more) == 0
        killer.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_loses_a_node_ends_with_the_weights_of_an_undisturbed_one(staleness, small_run, tmp_path):  # noqa: F811
    lost, calm = tmp_path / "lost", tmp_path / "calm"
    job = [*small_run, "tracking.uri=null", "train.iterations=4", f"async.max_staleness={staleness}"]
    alone("train", lost, *job)
    history = [json.loads(line) for line in (lost / "metrics.jsonl").read_text().splitlines()]
    assert history[0]["system/restarts"] == 0 < history[-1]["system/restarts"]
    assert run_job("train", *job, f"run_dir={calm}") == 0
    weights = [load_file(run / "checkpoints/step_000004/policy.safetensors") for run in (lost, calm)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[1])
    before = load_file(calm / "checkpoints/step_000003/policy.safetensors")
    assert not all((before[name] == weights[1][name]).all() for name in before)
