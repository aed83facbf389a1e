"""What a fleet of Ray actors keeps account of: its calls, what they gave, its replicas, its queue."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import ray

from rl.fleet import Result, ResultLost, Task
from rl.ray_host import flat, mapped

if TYPE_CHECKING:
    from rl.ray_fleet import RayFleet

log = logging.getLogger(__name__)

REMAKES = 3  # how often a result that was lost with its node is made again


@dataclass(eq=False)
class Call:
    """One method call on one replica.

    task None: part of a replica's start. index: its place in the task's parts. received: the replica has its arguments.
    made: what it makes again. needs: what is made again for it.
    """

    method: str
    args: Sequence
    returns: int
    timeout_s: float
    task: Task | None = None
    index: int = 0
    losses: int = 0
    received: bool = False
    made: Made | None = None
    needs: Sequence[Task] = ()

    @property
    def results(self) -> list[Result]:
        """Those among its arguments."""
        return [item for item in flat(self.args) if isinstance(item, Result)]


class Made:
    """What a call gave, and the call itself, so that what is lost with a node can be made again, the same.

    Not where its arguments are results, which would be held in the object store for it, nor where all replicas made it
    together. references: one per value; whoever holds a Result finds the latest.
    """

    def __init__(self, fleet: RayFleet, call: Call) -> None:
        self.fleet, self.call = fleet, None if call.results or call.task.lockstep else call
        self.references: list[ray.ObjectRef] = []
        self.making: Task | None = None
        self.remakes = 0

    def again(self) -> Task:
        """The task that makes it again, one for all who ask. Raises ResultLost where that is not possible."""
        if self.making is None:
            if self.call is None or self.remakes == REMAKES:
                raise ResultLost(
                    f"fleet {self.fleet.spec.name!r}: a result was lost with its node and cannot be made again"
                )
            log.warning(
                "a result of %s.%s was lost with its node and is made again", self.fleet.spec.name, self.call.method
            )
            self.remakes += 1
            self.making = Task(self.fleet, self.call.method, [None])
            call = replace(self.call, task=self.making, made=self, losses=0)
            self.fleet.enqueue(Batch(self.making, [call]), first=True)
        return self.making


@dataclass(eq=False)
class Replica:
    index: int
    actor: ray.actor.ActorHandle
    todo: deque[Call]
    failed_starts: int = 0
    call: Call | None = None
    references: list[ray.ObjectRef] = field(default_factory=list)
    started: float = 0.0
    deadline: float = 0.0
    warned: bool = False

    def start(self, call: Call) -> None:
        method = self.actor.call.options(num_returns=call.returns + 1)
        self.references = method.remote(call.method, call.returns, None if call.received else sent(call.args))
        self.call, self.started = call, time.monotonic()
        self.deadline = self.started + call.timeout_s


@dataclass(eq=False)
class Batch:
    """What the queue holds: a task with one call, or with one per replica. keep: see `Fleet.submit_all`. receiving: the
    task that brings its arguments."""

    task: Task
    calls: list[Call]
    keep: bool = False
    receiving: Task | None = None


def sent(args: Sequence) -> list:
    """Arguments as Ray takes them. In a list, so that the worker fetches them itself and can tell which one is lost."""
    return mapped(lambda item: item.reference if isinstance(item, Result) else item, args)
