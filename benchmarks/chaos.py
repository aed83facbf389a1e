"""Processes of a training killed with SIGKILL at random moments, on real Ray: `make chaos`.

One training is killed, resumed, killed again, ... and its last life ends by itself; in another one a rollout worker and
a reward worker are killed. Both must end with the weights and the metrics of a training that nobody disturbed, and
leave no process behind.
"""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.common import ROOT, figure, write
from rl.checkpoint import latest, verify
from rl.ray_fleet import FLEET

SMALL = (
    "cluster=local",
    "cluster.rollout.replicas=1",
    "cluster.reward.replicas=1",
    "train.checkpoint_every=1",
    "rollout.prompts_per_iteration=2",
    "rollout.prompts_per_task=1",
    "rollout.group_size=2",
    "evaluate.prompts=2",
    "evaluate.batch=1",
    "evaluate.strips=1",
    "learner.decay_iterations=100",
)
MARK = "DRAGLINE_CHAOS"
"""Environment variable by which all processes of a life are found, whoever their parent is by now."""


class Life:
    """One process of `jobs.train` with all that it starts. log: where it writes."""

    def __init__(self, run: Path, log: Path, *overrides: str) -> None:
        self.mark, self.log, self.started = uuid.uuid4().hex, log, time.monotonic()
        command = [sys.executable, "-m", "jobs.train", *SMALL, f"run_dir={run}", *overrides]
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)

    def iterations(self) -> list[int]:
        """Those that it has finished so far."""
        return [int(number) for number in re.findall(r"^(\d+)/\d+ ", self.log.read_text(), re.M)]

    def until(self, condition: Callable[[], bool], timeout_s: float = 900) -> float:
        """Waits for it; the time. RuntimeError with the log where the process ends before, or hangs and is killed."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"{self.process.args}\nended or hangs:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return time.monotonic()

    def until_iteration(self, count: int) -> float:
        return self.until(lambda: len(self.iterations()) >= count)

    def end(self) -> None:
        """Waits for its own end; raises RuntimeError if that is a failure."""
        if self.process.wait(1800):
            raise RuntimeError(f"{self.process.args}\nfailed:\n{self.log.read_text()[-3000:]}")

    def processes(self, fleet: str | None = None) -> list[psutil.Process]:
        """All that live, or those of a fleet's workers."""
        wanted, found = {MARK: self.mark} | ({FLEET: fleet} if fleet else {}), []
        for process in psutil.process_iter():
            try:
                if wanted.items() <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def gone_after(self, timeout_s: float = 60) -> float:
        """Seconds until nothing of it lives; inf, and it is ended, where that takes too long."""
        asked = time.monotonic()
        while left := self.processes():
            if time.monotonic() - asked > timeout_s:
                print("left running:", *(f"{p.pid} {' '.join(p.cmdline())[:100]}" for p in left), sep="\n  ")
                for process in left:
                    process.kill()
                return float("inf")
            time.sleep(0.1)
        return time.monotonic() - asked


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The last weights and every iteration's metrics that no clock and no restart decides."""
    weights = load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "policy.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in lines]


def same(a: Path, b: Path) -> bool:
    (w, m), (v, n) = outcome(a), outcome(b)
    return w.keys() == v.keys() and all(torch.equal(w[k], v[k]) for k in w) and m == n


def checkpoints(run: Path) -> tuple[int, bool]:
    """The step that a resume will choose, and whether a save was cut short. Raises CheckpointError where one that has
    its name is not whole."""
    root = run / "checkpoints"
    for folder in root.glob("step_*"):
        verify(folder)
    newest = latest(root)[0]
    return int(newest.name.split("_")[1]) if newest else 0, any(root.glob(".partial_*"))


def kill_the_driver(
    run: Path, kills: int, iterations: int, start_s: float, iteration_s: float, *overrides: str
) -> list[dict[str, Any]]:
    """A row per life; most die after a few iterations, some while they start."""
    draw, rows = random.Random(0), []
    for number in range(kills + 1):
        before, _ = checkpoints(run) if run.exists() else (0, False)
        life, last = Life(run, run.with_name(f"life_{number}.log"), *overrides), number == kills
        if last:
            life.end()
        elif draw.random() < 0.25 or before + 4 > iterations:  # it shall not end before it is killed
            time.sleep(draw.uniform(0.1, 1) * start_s)
        else:
            life.until_iteration(draw.randint(1, 2))
            time.sleep(draw.uniform(0, 1.5) * iteration_s)
        life.process.kill()
        lived = time.monotonic() - life.started
        life.process.wait()
        left_s, done = life.gone_after(), life.iterations()
        if done and done[0] != before + 1:
            raise RuntimeError(f"life {number} began with iteration {done[0]}, but step {before} was saved")
        saved, cut = checkpoints(run)
        rows.append({"life": number + 1, "resumed from": before, "lived, s": lived, "iterations": len(done),
                     "saved": saved, "save cut short": "yes" if cut else "no", "all gone after, s": left_s,
                     "ended by": "itself" if last else "SIGKILL"})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def kill_workers(run: Path, *overrides: str) -> dict[str, float]:
    """Per fleet: seconds from the end of one of its workers until the iteration after the one that lost it is done."""
    draw, found = random.Random(1), {}
    life = Life(run, run.with_name("workers.log"), *overrides)
    for count, fleet in ((1, "rollout"), (4, "reward")):
        life.until_iteration(count)
        time.sleep(draw.uniform(0, 0.5))
        done, victims = len(life.iterations()), life.processes(fleet)
        draw.choice(victims).kill()
        killed = time.monotonic()
        # One iteration may end with what the worker had delivered already.
        found[fleet] = life.until_iteration(done + 2) - killed
    life.end()
    if not (lost := json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["system/restarts"]) == 2:
        raise RuntimeError(f"two workers were killed, {lost} were replaced")
    return found


def measure(kills: int, iterations: int, *overrides: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and figures. overrides: of the training's configuration."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        calm, hunted, maimed = (home / name for name in ("calm", "hunted", "maimed"))
        more = (f"train.iterations={iterations}", f"tracking.uri=sqlite:///{home}/mlflow.db", *overrides)
        life = Life(calm, home / "calm.log", *more)
        first = life.until_iteration(1)
        life.end()
        times = [json.loads(line) for line in (calm / "metrics.jsonl").read_text().splitlines()]
        iteration_s = statistics.median(sum(v for k, v in line.items() if k.startswith("time/")) for line in times)
        rows = kill_the_driver(hunted, kills, iterations, first - life.started, iteration_s, *more)
        waits = kill_workers(maimed, *more, "cluster.rollout.replicas=2", "cluster.reward.replicas=2")
        with closing(sqlite3.connect(home / "mlflow.db")) as store:
            (runs,) = store.execute("select count(*) from runs").fetchone()
        figures = [
            figure("kills of the driver", kills, ">= 10"),
            figure("weights and metrics equal after them", int(same(calm, hunted)), ">= 1"),
            figure(
                "seconds until nothing of a killed driver is left", max(r["all gone after, s"] for r in rows), "<= 30"
            ),
            *(
                figure(f"seconds from a killed {fleet} worker to the next iteration", s, "<= 30")
                for fleet, s in waits.items()
            ),
            figure("weights and metrics equal after both", int(same(calm, maimed)), ">= 1"),
            figure("MLflow runs of the three trainings", runs, "<= 3"),
        ]
        return rows, figures


def main() -> None:
    started = time.monotonic()
    rows, figures = measure(kills=10, iterations=24)
    minutes = figure("minutes in all", (time.monotonic() - started) / 60, "<= 15")
    about = (
        "A training of 24 iterations on a private Ray (one rollout worker, one reward worker, one DeepSpeed rank): its "
        "driver is killed with SIGKILL at random moments and resumed with the same command. Then one with two rollout "
        "and two reward workers, of each of which one is killed. Equal means bit for bit: the last weights, and the "
        "metrics of every iteration."
    )
    write("chaos", about, rows, [*figures, minutes])


if __name__ == "__main__":
    main()
