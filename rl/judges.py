"""The fleets that judge: one for every reward term that asks for its own, one for those that share.

All score the same clips at the same time. A term whose worker died, hung or was killed is masked where it failed,
counted, and above a share of an iteration fatal; the other terms keep their scores.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.fleet import Fault, Fleet, FleetError, Task, as_completed, fetch
from rl.reward_worker import GroupScores
from rollout.prompts import DragPrompt

log = logging.getLogger(__name__)
SHARED = "reward"
"""The fleet of the terms that share; it also measures held-out films, and is there even without a term."""


@dataclass(frozen=True)
class Collected:
    """scores: of every group that any term could score, by group id. lost: calls that came to nothing."""

    scores: list[GroupScores]
    lost: int


class Judges:
    """fleets: of RewardWorkers, by name, among them SHARED. terms: the names of the terms that each of them holds.
    fault_share: of the clips of an iteration that a term may fail on before the run stops."""

    def __init__(self, fleets: Mapping[str, Fleet], terms: Mapping[str, Sequence[str]], fault_share: float) -> None:
        self.fleets, self.terms, self.fault_share = dict(fleets), dict(terms), fault_share

    @property
    def restarts(self) -> int:
        return sum(fleet.restarts for fleet in self.fleets.values())

    @property
    def recycled(self) -> int:
        return sum(fleet.recycled for fleet in self.fleets.values())

    def dry_run(self, prompt: DragPrompt) -> None:
        """Tries every term in every worker; raises RewardError, or FleetError where a worker dies or hangs."""
        rows = {fleet: [(prompt,)] * fleet.spec.replicas for fleet in self.fleets.values()}
        for task in [fleet.submit_all("dry_run", row) for fleet, row in rows.items()]:
            task.result()

    def score(self, groups: Any, step: int) -> dict[str, Task]:
        """Queues a chunk of groups, or a reference to one, in every fleet that holds terms: one task per fleet."""
        return {name: self.fleets[name].submit("score", groups, step) for name in self.fleets if self.terms[name]}

    def collect(self, scoring: Sequence[Mapping[str, Task]]) -> Collected:
        """Waits for the chunks of an iteration.

        Raises FleetError naming the term, as soon as the share of its clips that have no score is above fault_share;
        ResultLost where the groups went with their node for good.
        """
        place = {task: (chunk, name) for chunk, tasks in enumerate(scoring) for name, task in tasks.items()}
        parts: dict[tuple[int, str], list[GroupScores]] = {}
        lost: dict[str, list[tuple[int, Fault]]] = defaultdict(list)
        for task in as_completed(place):
            chunk, name = place[task]
            if task.fault is None:
                parts[chunk, name] = fetch(task.values[0])
                continue
            if task.fault.kind in ("error", "lost"):
                task.fault.throw()
            lost[name].append((chunk, task.fault))
            if len(lost[name]) > self.fault_share * len(scoring):
                raise FleetError(
                    f"{' and '.join(f'rewards.{term}' for term in self.terms[name])} could not be scored on "
                    f"{len(lost[name])} of {len(scoring)} chunks: {task.fault.text}"
                )
        for name, losses in lost.items():
            for chunk, fault in losses:
                like = next((found for (c, _), found in parts.items() if c == chunk), [])
                parts[chunk, name] = [group.without(self.terms[name], fault.text) for group in like]
        groups: dict[str, GroupScores] = {}
        for _, part in sorted(parts.items()):
            for group in part:
                groups[group.group_id] = groups[group.group_id].joined(group) if group.group_id in groups else group
        scores = [groups[name] for name in sorted(groups)]
        self._check(scores)
        return Collected(scores, sum(map(len, lost.values())))

    def _check(self, scores: Sequence[GroupScores]) -> None:
        for term in (term for terms in self.terms.values() for term in terms):
            faults = [group.faults[term] for group in scores if term in group.faults]
            failed = sum(int(fault.clips.sum()) for fault in faults)
            clips = sum(len(group.frames[term]) for group in scores)
            if failed > self.fault_share * clips:
                raise FleetError(f"rewards.{term} failed on {failed} of {clips} clips: {faults[0].text}")

    def measure(self, films: Any, split: str) -> tuple[Task, dict[str, Task]]:
        """Queues the measurement of `Films`, or of a reference to them: the figures, and the terms fleet by fleet."""
        figures = self.fleets[SHARED].submit("measure", films, split)
        holding = [name for name in self.fleets if self.terms[name]]
        return figures, {name: self.fleets[name].submit("score_films", films, split) for name in holding}

    def measured(self, figures: Task, scoring: Mapping[str, Task]) -> dict[str, np.ndarray]:
        """The metrics [P] that `measure` asked for; NaN for the terms of a fleet that failed, which is told."""
        found = fetch(figures.result()[0])
        names, size = {task: name for name, task in scoring.items()}, len(next(iter(found.values())))
        for task in as_completed(names):
            if task.fault is None:
                found |= fetch(task.values[0])
            else:
                log.warning("held-out films without a score: %s", task.fault.text)
                nothing = np.full(size, np.nan, np.float32)
                found |= {f"reward/{term}": nothing for term in self.terms[names[task]]}
        return found

    def close(self) -> None:
        for fleet in self.fleets.values():
            fleet.close()
