"""What the study runs, in which order, and what it remembers: one JSON line per finished run.

The learning rate of every arm is searched alike, on dev prompts. What was best trains three seeds, measured on held-out
prompts of their own. Large steps in any direction can undo the base's lag by chance, so that every run has a control
beside it, whose advantages go to random members of their group, and it is the difference that is searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.study.trial import Trial, run

TRACKERS = ("track_error_px", "canary/track_error_px")
STIFFNESS = 4.0
AMPLITUDES = {"tangent": 14.0, "coarse": 4.0, "white": 2.0}


@dataclass(frozen=True)
class Plan:
    """stages: of arms (select, explore); each is finished before the next begins. tuning_s, points: CPU-seconds of a
    run on dev prompts, and of one on held-out prompts. dev, heldout: numbers of prompts.
    """

    stages: tuple[tuple[tuple[str, str], ...], ...]
    tuning_s: float
    points: tuple[float, ...]
    dev: int
    heldout: int
    seeds: tuple[int, ...]


PLAN = Plan(
    stages=(
        (("trunk", "tangent"), ("all", "white")),
        (("all", "tangent"), ("trunk", "white")),
        (("video", "tangent"), ("video", "white")),
        (("frame", "tangent"), ("frame", "white")),
        (("trunk", "coarse"), ("all", "coarse"), ("video", "coarse"), ("frame", "coarse")),
    ),
    tuning_s=10.0,
    points=(5.0, 10.0),
    dev=16,
    heldout=24,
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
    """The learning rate with the highest gain above its control, on dev prompts: up or down from 1e-3 as long as it
    gets better."""

    def value(trial: Trial) -> float:
        return gain(store.run(trial)) - gain(store.run(replace(trial, permute=True)))

    best = Trial(select, explore, 1e-3, STIFFNESS, AMPLITUDES[explore], 1, 8, 1_000, (plan.tuning_s,), "dev", plan.dev)
    first, highest = best, value(best)
    for factor in (10**0.5, 10**-0.5):
        while (found := value(trial := replace(best, lr=float(f"{best.lr * factor:.2g}")))) > highest:
            best, highest = trial, found
        if best is not first:
            break
    return best


def study(store: Store, plan: Plan = PLAN) -> None:
    for arms in plan.stages:
        tuned = [search(store, plan, *arm) for arm in arms]
        for seed in plan.seeds:
            for best in tuned:
                final = replace(best, seed=seed, points=plan.points, split="heldout", measured_on=plan.heldout)
                store.run(final)
                store.run(replace(final, permute=True))
