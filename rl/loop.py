"""The training loop: roll out, score, learn, synchronise; and what is written down of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rl.advantage import Advantages, TermWeight, advantages, best_and_worst, permuted
from rl.fleet import fetch
from rl.pipeline import Fleets, Pipeline
from rl.reward_worker import GroupScores
from rl.stall import doing
from rollout.seeds import seed_of

logger = logging.getLogger(__name__)
NOTHING_LEARNT = (
    "iteration %d: in no group do the members differ in any reward, so that nothing is learnt; a policy that does not "
    "feel its drag explores nothing with rollout.explore=tangent (see jobs.teach)"
)

Metrics = dict[str, float]


@dataclass(frozen=True)
class LoopSettings:
    """prompts_per_task: prompts that one rollout call generates together; it decides rounding, so results do not
    depend on how many workers there are. reward_to_go: a block is credited with all frames from it on, not with its
    own alone. advantage_clip: of |A|. advantage_std: of `normalise`. best_and_worst: how many of each learn in a group
    (None: all members). permute: give advantages to the wrong members (the control that must not
    improve). evaluate_every: iterations between evaluations; None: none before the end. max_staleness: of `Pipeline`.
    max_recoveries: how often `rl.run.Training` makes the learner anew.
    """

    seed: int
    iterations: int
    prompts_per_iteration: int
    prompts_per_task: int
    reward_to_go: bool
    advantage_clip: float
    permute: bool
    checkpoint_every: int
    evaluate_every: int | None = None
    advantage_std: str = "group"
    best_and_worst: int | None = None
    max_staleness: int = 0
    max_recoveries: int = 0


@dataclass
class Clock:
    """Seconds per phase. of: what is in its phases, for the message of a stall."""

    of: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        try:
            with doing(f"{self.of}, {phase}" if self.of else phase):
                yield
        finally:
            self._add(phase, time.perf_counter() - start)

    def add(self, other: Clock) -> None:
        for phase, seconds in other.seconds.items():
            self._add(phase, seconds)

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def train(
    fleets: Fleets,
    terms: Mapping[str, TermWeight],
    settings: LoopSettings,
    held: Sequence[int],
    log: Callable[[int, Metrics], None],
    checkpoint: Callable[[int], None],
    evaluate: Callable[[int], bool],
    total: Clock,
) -> None:
    """Runs iterations held[-1]..settings.iterations - 1.

    held: versions of the weights that the learner has, its own last (`Learner.load`). log: called with (step, metrics)
    after every iteration; steps count from 1. evaluate: called with the step every `evaluate_every` steps but the last,
    may leave any weights with the rollout workers; True stops the training. checkpoint: called with the step every
    `checkpoint_every` steps and at the end. total: takes the time of every phase.
    """
    iterations = range(held[-1], settings.iterations)
    pipeline = Pipeline(fleets, iterations, partial(chunks, settings), settings.max_staleness, held)
    for number in iterations:
        clock = Clock(f"iteration {number}")
        with clock("sync"):
            iteration = pipeline.take(number)
        with clock("rollout"):
            replays = iteration.replays()
        with clock("reward"):
            judged = iteration.scores()
        ahead = pipeline.scored_ahead
        with clock("learn"):
            given = credit(judged.scores, terms, settings, number)
            if not any(own.any() for group in given.values() for own in group.values()):
                logger.warning(NOTHING_LEARNT, number)
            ranks = fleets.learner.spec.replicas
            stats = fetch(fleets.learner.scatter("update", [(replays[r::ranks], given) for r in range(ranks)]))
        step = number + 1
        log(
            step,
            {
                **summarise(judged.scores, terms),
                **{f"train/{name}": float(np.mean([s[name] for s in stats])) for name in stats[0]},
                **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
                "async/staleness": float(number - iteration.version),
                "system/scored_ahead": float(ahead),
                "masked/chunks": float(judged.lost),
                "system/restarts": float(sum(f.restarts for f in (fleets.rollout, fleets.judges, fleets.learner))),
                "system/recycled": float(fleets.judges.recycled),
            },
        )
        total.add(clock)
        due = settings.evaluate_every and step % settings.evaluate_every == 0
        stop = step == settings.iterations or (due and evaluate(step))
        if stop or step % settings.checkpoint_every == 0:
            checkpoint(step)
        if stop:
            break


def chunks(settings: LoopSettings, iteration: int) -> list[range]:
    """Indices of the iteration's train prompts, as the rollout calls take them."""
    first = settings.seed * 1_000_000 + iteration * settings.prompts_per_iteration
    indices = range(first, first + settings.prompts_per_iteration)
    return [indices[i : i + settings.prompts_per_task] for i in range(0, len(indices), settings.prompts_per_task)]


def credit(
    scores: Sequence[GroupScores], terms: Mapping[str, TermWeight], settings: LoopSettings, iteration: int
) -> Advantages:
    """Advantages per group and block. A term that failed on a group is NaN there and masked."""
    asked = [(group, block) for group in scores for block in group.blocks]
    by_term = {
        name: np.stack([group.block(name, block, settings.reward_to_go) for group, block in asked]) for name in terms
    }
    found = advantages(by_term, terms, settings.advantage_clip, settings.advantage_std)
    if settings.best_and_worst:
        found = best_and_worst(found, settings.best_and_worst)
    given: dict[str, dict[int, np.ndarray]] = {}
    for (group, block), own in zip(asked, found):
        if settings.permute:
            own = permuted(own, seed_of(settings.seed, iteration, group.group_id, block, "permute"))
        given.setdefault(group.group_id, {})[block] = own
    return given


def summarise(scores: Sequence[GroupScores], terms: Mapping[str, TermWeight]) -> Metrics:
    """Means over everything scored, and how much the members of a group differ."""
    metrics: Metrics = {}
    for name in scores[0].frames:
        values = [g.frames[name] for g in scores]
        metrics[f"reward/{name}"] = float(np.mean([np.nanmean(v) for v in values if np.isfinite(v).any()] or [np.nan]))
        per_member = [g.block(name, b, True) for g in scores for b in g.blocks]
        spread = np.array([np.nanstd(m) for m in per_member if np.isfinite(m).any()])
        metrics[f"group/{name}/std"] = float(spread.mean()) if len(spread) else float("nan")
        if name in terms:
            metrics[f"group/{name}/zero_spread"] = float((spread == 0).mean()) if len(spread) else float("nan")
        failed = [g.faults[name].clips.mean() if name in g.faults else 0.0 for g in scores]
        metrics[f"group/{name}/masked"] = float(np.mean(failed))
    for name in dict.fromkeys(name for g in scores for name in g.metrics):
        values = np.concatenate([g.metrics[name] for g in scores if name in g.metrics])
        metrics[f"metric/{name}"] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        if name.endswith("/error_px"):
            metrics["train/track_error_px"] = metrics[f"metric/{name}"]
    metrics["masked/terms"] = float(sum(len(g.faults) for g in scores))
    metrics["masked/scores"] = float(sum(fault.clips.sum() for g in scores for fault in g.faults.values()))
    return metrics
