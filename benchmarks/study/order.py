"""What the study runs, in which order, and what it remembers: one JSON line per finished run.

The settings of every arm are searched alike, one after the other, on dev prompts: the learning rate, the prompts of an
iteration, the stiffness of the penalty, the amplitude of the noise. What was best trains three seeds, measured on
held-out prompts of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.study.trial import Trial, run

TRACKERS = ("track_error_px", "canary/track_error_px")
STEP = 10**0.5
AMPLITUDES = {"tangent": 14.0, "coarse": 4.0, "white": 2.0}


@dataclass(frozen=True)
class Plan:
    """stages: of arms (select, explore); each is finished before the next begins. controls: arms that also train with
    permuted advantages. tuning_s, points: CPU-seconds of a run on dev prompts, and of one on held-out prompts. dev,
    heldout: numbers of prompts.
    """

    stages: tuple[tuple[tuple[str, str], ...], ...]
    controls: tuple[tuple[str, str], ...]
    tuning_s: float
    points: tuple[float, ...]
    dev: int
    heldout: int
    seeds: tuple[int, ...]


PLAN = Plan(
    stages=(
        (("trunk", "tangent"), ("all", "white")),
        (("trunk", "white"), ("all", "tangent"), ("video", "tangent")),
        (("frame", "tangent"), ("video", "white"), ("frame", "white")),
        (("trunk", "coarse"), ("all", "coarse"), ("video", "coarse"), ("frame", "coarse")),
    ),
    controls=(("trunk", "tangent"), ("all", "white")),
    tuning_s=8.0,
    points=(4.0, 8.0, 16.0),
    dev=24,
    heldout=32,
    seeds=(0, 1, 2),
)


class Store:
    """The finished runs of a file, by trial. train: `trial.run`."""

    def __init__(self, path: Path, train: Callable[..., dict[str, Any]] = run) -> None:
        self.path, self.train = path, train
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = [json.loads(line) for line in lines]
        self._found = {json.dumps(one["trial"]): one for one in self.runs}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The run, from the file if it is there. What the base measures is taken from runs on the same prompts."""
        if trial.key not in self._found:
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


def gain(found: dict[str, Any], point: int = -1) -> float:
    """By which share the two track errors have fallen, on average. The second tracker rewards nobody."""
    base, at = found["curve"][0], found["curve"][point]
    return sum(1 - at[name] / base[name] for name in TRACKERS) / len(TRACKERS)


def search(store: Store, plan: Plan, select: str, explore: str) -> Trial:
    """The best settings on dev prompts. Beyond the end of a grid the search goes on as long as it gets better."""
    start = Trial(select, explore, 3e-3, 4.0, AMPLITUDES[explore], 1, 8, 1_000, (plan.tuning_s,), "dev", plan.dev)
    best = start
    for name, factor, reach in (("lr", STEP, 2), ("prompts", 2, 2), ("stiffness", 4.0, 2), ("amplitude", 2.0, 1)):
        best = _along(store, best, name, factor, reach)
    return best


def _along(store: Store, start: Trial, name: str, factor: float, reach: int) -> Trial:
    """The best of start and its neighbours on both sides; on the better side the search takes up to `reach` steps."""
    best, highest = start, gain(store.run(start))
    for direction in (factor, 1 / factor):
        for power in range(1, reach + 1):
            value = float(f"{getattr(start, name) * direction**power:.2g}")
            if name == "prompts":
                value = int(value)
                if not value:
                    break
            found = gain(store.run(trial := replace(start, **{name: value})))
            if found <= highest:
                break
            best, highest = trial, found
        if best is not start:
            break
    return best


def finals(plan: Plan, tuned: Trial, seeds: tuple[int, ...], permute: bool = False) -> Iterator[Trial]:
    for seed in seeds:
        yield replace(tuned, seed=seed, points=plan.points, split="heldout", measured_on=plan.heldout, permute=permute)


def study(store: Store, plan: Plan = PLAN) -> None:
    for arms in plan.stages:
        tuned = {arm: search(store, plan, *arm) for arm in arms}
        for seed in plan.seeds:
            for arm, trial in tuned.items():
                for one in finals(plan, trial, (seed,)):
                    store.run(one)
                if arm in plan.controls:
                    for one in finals(plan, trial, (seed,), permute=True):
                        store.run(one)
