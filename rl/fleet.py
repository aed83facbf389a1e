"""Plain classes as supervised fleets of workers.

A fleet holds `replicas` objects made by one factory and runs their methods: `submit` gives a call to whichever replica
is free, `broadcast` and `scatter` run it on every replica. Calls go in program order: a call sees the broadcasts issued
before it and none issued after. Results are references (`Result` on Ray, the objects themselves inline) that go
into other fleets' calls as they are, so that pixels and weights never pass through the driver; `fetch` gives values.

    fleet = make_fleet("ray", RolloutWorker, FleetSpec("rollout", replicas=2, timeout_s=60), args=(config,))
    fleet.broadcast("load_weights", weights, version, keep=True)
    for task in as_completed([fleet.submit("sample", prompt) for prompt in prompts]):
        print(task.fault or fetch(task.values))

`make_fleet("inline", ...)` does the same in the calling process, where a debugger works but no deadline and no limit
of memory is enforced and a crash is everybody's.
One thread drives all fleets of a process.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NoReturn

import ray

from rl.stop import check

SEVERITY = ("lost", "crash", "error", "timeout")  # of several ranks' faults the first kind is the cause of the others


class FleetError(RuntimeError):
    """A call failed for good or a worker cannot be brought back; the message names fleet, replica and method."""


class ResultLost(FleetError):
    """A result went with its node, and the call that gave it does not give it again: its worker has moved on."""


class FleetSpecError(ValueError):
    """A fleet that cannot be built as asked: a bad setting, or resources that the cluster does not have."""


@dataclass(frozen=True)
class FleetSpec:
    """How many workers, with what, and what happens when one is lost.

    num_cpus, num_gpus: Ray resources of each replica, fractions allowed.
    timeout_s: seconds from the dispatch of a call until its replica is killed.
    start_timeout_s: the same for finding a place and for construction, each.
    retries: how often a call that lost its replica is run again before it yields a fault. retry_timeouts: also one that
    was late; False where a call may cost its deadline once and no more.
    replace: start a new replica for a lost one; False for ranks in lockstep, where a loss ends the fleet.
    memory_gb: private memory (2^30 bytes, Linux) that a replica may hold after a call; above it, it is replaced.
    env: environment of the worker processes, over the single-threaded default. runtime_env: Ray's, for them.
    """

    name: str
    replicas: int = 1
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    timeout_s: float = 600.0
    start_timeout_s: float = 120.0
    retries: int = 1
    retry_timeouts: bool = True
    replace: bool = True
    memory_gb: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, least in (("replicas", 1), ("retries", 0), ("num_cpus", 0), ("num_gpus", 0)):
            if getattr(self, key) < least:
                raise FleetSpecError(f"fleet {self.name!r}: {key} must be at least {least}, not {getattr(self, key)}")
        for key in ("timeout_s", "start_timeout_s"):
            if not getattr(self, key) > 0:
                raise FleetSpecError(f"fleet {self.name!r}: {key} must be above 0 s, not {getattr(self, key)}")
        if self.memory_gb is not None and not (self.replace and self.memory_gb > 0):
            raise FleetSpecError(f"fleet {self.name!r}: memory_gb={self.memory_gb} must be above 0, and needs replace")


@dataclass(frozen=True)
class Fault:
    """Why a call has no result.

    kind: "timeout" (killed at its deadline), "crash" (the process died), "error" (the worker's code raised: the same
    call would raise again, so it is neither retried nor a reason for a restart) or "lost" (an argument was, for good).
    text: one line that names fleet, replica and method. tail: the end of the worker's traceback.
    exception: what was raised, where it can be had: inline always, from another process only a ValueError.
    """

    kind: Literal["timeout", "crash", "error", "lost"]
    text: str
    tail: str = ""
    exception: Exception | None = None

    def lost(self) -> Fault:
        """Of the call that should have made a lost result again, as a fault of the call that needs it."""
        return Fault("lost", f"what was lost with its node cannot be made again: {self.text}", self.tail)

    @classmethod
    def of(cls, error: Exception) -> Fault:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return cls("error", text, "".join(traceback.format_tb(error.__traceback__)[-3:]), error)

    def throw(self) -> NoReturn:
        """Raises the worker's own ValueError as it was, else FleetError or ResultLost with text and tail."""
        if isinstance(self.exception, ValueError):
            raise self.exception
        kind = ResultLost if self.kind == "lost" else FleetError
        raise kind("\n".join(filter(None, (self.text, self.tail.rstrip())))) from self.exception


@dataclass(eq=False)
class Task:
    """A submitted call: what `as_completed` yields. Hashable by identity, so it can key the driver's bookkeeping.

    parts: per replica that runs it (one for `submit`) its references, or a fault, or None while it is under way.
    lockstep: the call runs on every replica.
    """

    fleet: Fleet
    method: str
    parts: list[tuple | Fault | None]
    lockstep: bool = False

    @property
    def done(self) -> bool:
        return None not in self.parts

    @property
    def fault(self) -> Fault | None:
        faults = [part for part in self.parts if isinstance(part, Fault)]
        return min(faults, key=lambda fault: SEVERITY.index(fault.kind), default=None)

    @property
    def values(self) -> tuple:
        """The references in the order the method returned them, replica after replica; empty without a result."""
        return sum(self.parts, ()) if self.done and self.fault is None else ()

    def then(self, follow: Callable[[Task], None]) -> None:
        """Calls follow(task), which may submit but not wait, when it is done: now, or in a wait for whatever task."""
        if self.done:
            follow(self)
        else:
            _FOLLOWED.append((self, follow))

    def result(self) -> tuple:
        """Waits (other fleets go on meanwhile), then gives `values`. Raises as `Fault.throw` does."""
        while not self.done:
            self.fleet.advance()
        if self.fault:
            self.fault.throw()
        return self.values


_FOLLOWED: list[tuple[Task, Callable[[Task], None]]] = []


def follow_up() -> None:
    """Calls what `Task.then` has promised for tasks that are done by now; fleets do so at the end of every wait."""
    ready = [promise for promise in _FOLLOWED if promise[0].done]
    _FOLLOWED[:] = [promise for promise in _FOLLOWED if promise not in ready]
    for task, follow in ready:
        follow(task)


class Fleet(ABC):
    """restarts: how many replicas were lost and replaced so far. recycled: how many held too much memory and were.
    loss: what ended a fleet whose replicas are not replaced, until `renew`.
    """

    def __init__(self, spec: FleetSpec) -> None:
        self.spec = spec
        self.restarts = self.recycled = 0
        self.loss: Fault | None = None

    @abstractmethod
    def submit(self, method: str, *args: Any, returns: int = 1) -> Task:
        """Queues one call for any replica. An argument, or an item of a list argument, may be a fleet's reference.

        returns: n > 1 says that the method returns an n-tuple and asks for one reference per item.
        numpy arrays that reach a worker (or `fetch`) through the object store are READ-ONLY: copy before writing.
        """

    @abstractmethod
    def submit_all(self, method: str, rows: Sequence[tuple], keep: bool = False) -> Task:
        """Queues one call per replica, `rows[i]` the arguments of replica i, all at the same time and with nothing
        beside them. keep: a replacement of replica i runs the latest such call of this method before anything else."""

    @abstractmethod
    def advance(self) -> None:
        """Waits until something happens to any fleet of this process, and deals with it."""

    def renew(self) -> None:
        """New replicas in the place of all, also of a fleet that a loss has ended; they know of no call before."""
        raise FleetError(f"fleet {self.spec.name!r} has no processes to replace")

    @abstractmethod
    def close(self) -> None:
        """Ends the workers; tasks under way get a fault. May be called twice."""

    def scatter(self, method: str, rows: Sequence[tuple], keep: bool = False) -> list:
        """`submit_all` and wait: one reference per replica, in replica order. Raises as `Fault.throw` does."""
        return list(self.submit_all(method, rows, keep).result())

    def broadcast(self, method: str, *args: Any, keep: bool = False) -> list:
        """`scatter` of the same arguments to every replica."""
        return self.scatter(method, [args] * self.spec.replicas, keep)

    def check_rows(self, method: str, rows: Sequence[tuple]) -> None:
        if len(rows) != self.spec.replicas:
            raise FleetSpecError(f"{self.spec.name}.{method}: {len(rows)} rows for {self.spec.replicas} replicas")

    def locate(self, fault: Fault, replica: int, method: str) -> Fault:
        return replace(fault, text=f"{self.spec.name}[{replica}].{method}: {fault.text}")


def run_call(worker: object, method: str, args: Sequence, returns: int) -> tuple | Fault:
    """What every worker process does with a call: `returns` values, or the fault that says what was raised."""
    try:
        value = getattr(worker, method)(*args)
    except Exception as error:
        return Fault.of(error)
    if returns == 1:
        return (value,)
    if not isinstance(value, tuple) or len(value) != returns:
        shape = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
        return Fault("error", f"returned {shape} where returns={returns} asks for a tuple of {returns}")
    return value


class InlineFleet(Fleet):
    """The same in the calling process: a call runs when it is submitted, replicas take turns."""

    def __init__(self, build: Callable[[], Any], spec: FleetSpec) -> None:
        super().__init__(spec)
        self.workers = [build() for _ in range(spec.replicas)]
        self.calls = 0

    def submit(self, method: str, *args: Any, returns: int = 1) -> Task:
        replica = self.calls % self.spec.replicas
        self.calls += 1
        return Task(self, method, [self._run(replica, method, args, returns)])

    def submit_all(self, method: str, rows: Sequence[tuple], keep: bool = False) -> Task:
        self.check_rows(method, rows)
        return Task(self, method, [self._run(i, method, row, 1) for i, row in enumerate(rows)], lockstep=True)

    def _run(self, replica: int, method: str, args: Sequence, returns: int) -> tuple | Fault:
        if not self.workers:
            raise FleetError(f"fleet {self.spec.name!r} is closed")
        outcome = run_call(self.workers[replica], method, args, returns)
        return self.locate(outcome, replica, method) if isinstance(outcome, Fault) else outcome

    def advance(self) -> None:
        """Nothing is ever under way here."""

    def close(self) -> None:
        self.workers = []


def make_fleet(
    backend: str,
    factory: Callable[..., Any],
    spec: FleetSpec,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Fleet:
    """A fleet of `factory(*args, **kwargs)` objects.

    backend: "inline", or "ray" inside a `ray_session`. Ray workers start in the background: an exception of the factory
    is raised by the first wait (by make_fleet itself inline).
    """
    build = partial(factory, *args, **(kwargs or {}))
    if backend == "inline":
        return InlineFleet(build, spec)
    if backend == "ray":
        from rl.ray_fleet import RayFleet  # it imports this module

        return RayFleet(build, spec)
    raise FleetSpecError(f"fleet {spec.name!r}: backend must be 'inline' or 'ray', not {backend!r}")


@contextmanager
def closing(*fleets: Fleet) -> Iterator[tuple[Fleet, ...]]:
    """The fleets, closed on leaving the block whatever happens in it."""
    try:
        yield fleets
    finally:
        for fleet in fleets:
            fleet.close()


def as_completed(tasks: Iterable[Task]) -> Iterator[Task]:
    """Yields the tasks, of one or several fleets, as they are done, with `.values` or a `.fault`; every wait inside is
    bounded by the calls' deadlines. Raises Stopped where the run was asked to stop meanwhile."""
    waiting = list(tasks)
    while waiting:
        check()
        done = [task for task in waiting if task.done]
        waiting = [task for task in waiting if not task.done]
        yield from done
        if not done:
            waiting[0].fleet.advance()


@dataclass(frozen=True, eq=False)
class Result:
    """A value that a call on Ray gave, in the object store; made: `rl.ray_fleet`'s account of the call."""

    made: Any
    index: int

    @property
    def reference(self) -> ray.ObjectRef:
        return self.made.references[self.index]


def is_lost(reference: ray.ObjectRef, timeout_s: float | None = None) -> bool:
    """Whether no node holds the object any more."""
    try:
        ray.get(reference, timeout=timeout_s)
    except ray.exceptions.ObjectLostError:
        return True
    return False


def fetch(reference: Any, timeout_s: float | None = 60.0) -> Any:
    """The value behind a reference; of a list or tuple the list of values, where plain values stay as they are.

    What was lost with its node is made again. Raises ResultLost where that is not possible, FleetError where a value
    does not arrive in time. Arrays come READ-ONLY from the object store.
    """
    if not isinstance(reference, list | tuple):
        return fetch([reference], timeout_s)[0]
    results = [item for item in reference if isinstance(item, Result)]
    values: list = []
    while results and not values:
        try:
            values = ray.get([result.reference for result in results], timeout=timeout_s)
        except ray.exceptions.ObjectLostError:
            for making in [result.made.again() for result in results if is_lost(result.reference, timeout_s)]:
                next(as_completed([making]))
                if making.fault:
                    making.fault.lost().throw()
        except ray.exceptions.RayError as error:
            cause = str(error).splitlines()[0]
            raise FleetError(f"a result could not be fetched within {timeout_s} s: {cause}") from error
    return [values.pop(0) if isinstance(item, Result) else item for item in reference]
