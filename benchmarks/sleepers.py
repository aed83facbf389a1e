"""A rollout worker, a judge and a learner that only sleep and note what they did when: the loop alone is measured.

They import next to nothing, so that many of them fit on one machine. A note is (what, of which iteration or version,
with which weights, begin, end), the times by a clock that all processes of a machine share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rl.fleet import FleetSpec, closing, fetch, make_fleet

Roles = Mapping[str, tuple[float, int]]
"""Seconds per call and number of workers of rollout, reward and learner."""
TERM = "near"


class Sleeper:
    """Every call takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.version, self.seen = seconds, 0, []

    def note(self, *what: Any) -> None:
        begin = time.monotonic()
        time.sleep(self.seconds)
        self.seen.append((*what, begin, time.monotonic()))

    def begin(self, seconds: float) -> None:
        """As a new one."""
        self.__init__(seconds)

    def notes(self) -> list[tuple]:
        return self.seen


class SleepingRollout(Sleeper):
    def load_weights(self, weights: int) -> str:
        self.version = weights
        return str(weights)

    def rollout(self, iteration: int, chunk: Sequence[int], version: int) -> tuple[list[str], int]:
        if version != self.version:
            raise ValueError(f"asked for weights {version}, but this worker holds {self.version}")
        self.note("rollout", iteration, version)
        return [f"{iteration}/{i}" for i in chunk], version


class SleepingJudge(Sleeper):
    def score(self, groups: Sequence[str], step: int) -> list:
        from rl.reward_worker import GroupScores  # not at the top: rollout workers do without torch

        self.note("score", step, None)
        frames = {TERM: np.array([[0, 1], [0, 0]], np.float32)}
        return [GroupScores(name, {1: range(1, 2)}, frames, {}, {}) for name in groups]


class SleepingLearner(Sleeper):
    def weights(self, averaged: bool, version: int) -> int:
        return version

    def update(self, replays: Sequence[Any], given: Any) -> dict[str, float]:
        self.note("update", self.version, tuple(fetch(list(replays))))
        self.version += 1
        return {"loss": 0.0}


@contextmanager
def sleepers(backend: str, roles: Roles, rollout_cpus: float = 0.0) -> Iterator[Callable[..., list[tuple]]]:
    """run(settings, held, log, **seconds): the training loop on them (see `train`), with other seconds than in roles
    for the roles that are named; returns the notes in the order of beginning."""
    from rl.advantage import TermWeight
    from rl.judges import Judges
    from rl.loop import Clock, train
    from rl.pipeline import Fleets

    kinds = {"rollout": SleepingRollout, "reward": SleepingJudge, "learner": SleepingLearner}
    cpus = {"rollout": rollout_cpus, "reward": 0.0, "learner": 0.0}
    made = [make_fleet(backend, kinds[name], FleetSpec(name, count, cpus[name], start_timeout_s=600), (seconds,))
            for name, (seconds, count) in roles.items()]  # fmt: skip
    with closing(*made) as (rollout, reward, learner):
        fleets = Fleets(rollout, Judges({"reward": reward}, {"reward": [TERM]}, 0.0), learner)
        for fleet in made:
            fleet.broadcast("notes")  # until all are there

        def run(settings, held=(0,), log=lambda *_: None, **other: float) -> list[tuple]:
            for fleet, (name, (seconds, _)) in zip(made, roles.items()):
                fleet.broadcast("begin", other.get(name, seconds))
            train(fleets, {TERM: TermWeight(1.0, 0.01)}, settings, held, log, lambda _: None, lambda _: False, Clock())
            notes = [note for fleet in made for part in fetch(fleet.broadcast("notes")) for note in part]
            return sorted(notes, key=lambda note: note[-2])

        yield run
