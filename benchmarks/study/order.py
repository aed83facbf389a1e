"""What the study runs, in which order, and what it remembers: one JSON line per finished run.

Large steps in any direction can undo the base's lag by chance. Every run that counts therefore has a control beside it,
whose advantages go to random members of their group: learnt is what is gained above it. The learning rate and the
stiffness of every arm are searched alike, on dev prompts, for what is learnt on average over two seeds. What was best
trains three or more other seeds, measured on held-out prompts of their own.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study.trial import Trial, run

TRACKERS = ("track_error_px", "canary/track_error_px")
LR, STIFFNESS = 1e-3, 4.0  # where the searches begin
STEPS = {"lr": 10**0.5, "stiffness": 4.0}  # and the factors by which they go up and down
AMPLITUDES = {"tangent": 14.0, "coarse": 4.0, "white": 2.0}


@dataclass(frozen=True)
class Plan:
    """arms: (select, explore), and the number of seeds, in the order in which they are begun, `workers` of them side by
    side. points: CPU-seconds after which a run on held-out prompts is measured; one on dev prompts only at the last.
    prompts: of an iteration. dev, heldout: numbers of measured prompts. tuning: seeds of the trainings that search.
    """

    arms: Mapping[tuple[str, str], int]
    points: tuple[float, ...]
    prompts: int
    dev: int
    heldout: int
    tuning: tuple[int, ...] = (1_000, 1_001)
    workers: int = 1


PLAN = Plan(
    arms={
        ("trunk", "tangent"): 6, ("all", "white"): 6, ("all", "tangent"): 3, ("trunk", "white"): 3,
        ("video", "tangent"): 3, ("frame", "tangent"): 3, ("video", "white"): 3, ("frame", "white"): 3,
        ("trunk", "coarse"): 3, ("all", "coarse"): 3, ("video", "coarse"): 3, ("frame", "coarse"): 3,
    },
    points=(10.0, 20.0, 40.0),
    prompts=2,
    dev=24,
    heldout=32,
    workers=2,
)  # fmt: skip


class Missing(LookupError):
    """A run that is not there, asked of a store that does not train."""


class Store:
    """The finished runs of a file, by trial. train: `trial.run`, or None: it only looks up."""

    def __init__(self, path: Path, train: Callable[..., dict[str, Any]] | None = run) -> None:
        self.path, self.train = path, train
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = [json.loads(line) for line in lines]
        self._found = {json.dumps(one["trial"]): one for one in self.runs}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The run, from the file if it is there. What the base measures is taken from runs on the same prompts."""
        if trial.key not in self._found:
            if self.train is None:
                raise Missing(trial.key)
            prompts = [asdict(trial)[name] for name in ("split", "measured_on", "seed")]
            known = [one for one in self.runs if [one["trial"][n] for n in ("split", "measured_on", "seed")] == prompts]
            base = (
                {k: v for k, v in known[0]["curve"][0].items() if k not in ("cpu_s", "iterations")} if known else None
            )
            found = json.loads(json.dumps(self.train(trial, base)))
            with self.path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            self.runs.append(found)
            self._found[trial.key] = found
            print(f"{trial.split} {trial.arm} lr {trial.lr:.1e} stiffness {trial.stiffness:.2g} amplitude "
                  f"{trial.amplitude:.2g} prompts {trial.prompts} seed {trial.seed} permuted {trial.permute}: "
                  f"gain {gain(found):+.3f}, {found['curve'][-1]}", flush=True)  # fmt: skip
        return self._found[trial.key]

    def pair(self, trial: Trial) -> Pair:
        return Pair(self.run(trial), self.run(replace(trial, permute=True)))


class Pair(NamedTuple):
    run: dict[str, Any]
    control: dict[str, Any]

    def learnt(self, point: int = -1) -> float:
        """Gain above what the control gains by chance; one that does harm counts as one that does nothing."""
        return gain(self.run, point) - max(gain(self.control, point), 0.0)


def gain(found: dict[str, Any], point: int = -1) -> float:
    """By which share the two track errors have fallen, on average. The second tracker rewards nobody."""
    base, at = found["curve"][0], found["curve"][point]
    return sum(1 - at[name] / base[name] for name in TRACKERS) / len(TRACKERS)


def search(store: Store, plan: Plan, select: str, explore: str) -> Trial:
    """The settings with which most is learnt on dev prompts: each is moved up, else down, as long as that is better."""
    highest = -math.inf

    def better(trial: Trial) -> bool:
        nonlocal highest
        seeds = [replace(trial, seed=seed) for seed in plan.tuning]
        if statistics.mean(gain(store.run(one)) for one in seeds) <= highest:
            return False  # no more is learnt than gained, so that nobody needs its controls
        learnt = statistics.mean(store.pair(one).learnt() for one in seeds)
        highest, rises = max(learnt, highest), learnt > highest
        return rises

    best = Trial(select, explore, LR, STIFFNESS, AMPLITUDES[explore], plan.prompts, 8, plan.tuning[0], plan.points[-1:],
                 "dev", plan.dev)  # fmt: skip
    better(best)
    for name, step in STEPS.items():
        first = best
        for factor in (step, 1 / step):
            while better(trial := replace(best, **{name: _rounded(getattr(best, name) * factor)})):
                best = trial
            if best is not first:
                break
    return best


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def finals(store: Store, plan: Plan, select: str, explore: str) -> list[Trial]:
    """The held-out runs of an arm, one per seed, with the settings that the search finds."""
    best = replace(search(store, plan, select, explore), points=plan.points, split="heldout", measured_on=plan.heldout)
    return [replace(best, seed=seed) for seed in range(plan.arms[select, explore])]


def study_arm(store: Store, plan: Plan, select: str, explore: str) -> None:
    for trial in finals(store, plan, select, explore):
        store.pair(trial)


def _in_process(path: Path, plan: Plan, arm: tuple[str, str]) -> None:
    study_arm(Store(path), plan, *arm)


def study(path: Path, plan: Plan = PLAN) -> None:
    """All arms; each has its own process and none waits for another."""
    with ProcessPoolExecutor(plan.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in [pool.submit(_in_process, path, plan, arm) for arm in plan.arms]:
            done.result()
