"""Fleets of Ray actors, owned and restarted by the driver (Ray's own restarts are off: they would lose the weights).

A replica's life:

    _spawn --> build --> latest kept calls --> routable <--> busy with one call
                 ^                                            |
                 +---------- replaced (replace=True) <-- died; past the deadline and killed; too much memory

What a replica must run first (`todo`: build, kept calls, its share of a call in lockstep) comes before anything from
the fleet's queue. A call in lockstep starts when all replicas are routable; nothing else starts until it is done.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rl.fleet import Fault, Fleet, FleetError, FleetSpec, FleetSpecError, Result, ResultLost, Task, follow_up
from rl.placement import seat
from rl.ray_calls import Batch, Call, Made, Replica
from rl.ray_host import BUILD, READY, RECEIVE, Host
from rl.stall import WATCHDOG

log = logging.getLogger(__name__)

# In the environment before the process starts, so that they hold before any import. Contended OpenMP threads cost 10x.
SINGLE_THREADED = {name: "1" for name in ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")}
GRACE_S = 5.0  # how long the other ranks of a failed call in lockstep may take to say what they saw
PATIENCE_S = 5.0  # without a place: look why, and say so
POLL_S = 1.0  # without news: let the caller look around, such as whether it is asked to stop
FLEET = "DRAGLINE_FLEET"  # environment variable of a worker process: the name of its fleet
_LIVE: list[RayFleet] = []


@contextmanager
def ray_session(address: str = "local", num_cpus: int | None = None, object_store_gb: float = 1.0) -> Iterator[None]:
    """Connected to Ray inside the block; on leaving it all fleets are closed. An open connection is used and left open.

    address: "local" starts a private Ray on this machine with num_cpus (None: all) and an object store of
    object_store_gb; "auto" connects to the cluster of the Ray Job, of RAY_ADDRESS or of this machine; else "host:port".
    Raises FleetSpecError where no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            store = int(object_store_gb * 2**30)
            ray.init("local", num_cpus=num_cpus, object_store_memory=store, include_dashboard=False,
                     log_to_driver=False, logging_level=logging.ERROR)  # fmt: skip
        else:
            ray.init(address)
    except ConnectionError as error:
        raise FleetSpecError(f"no Ray cluster at {address!r}: run `ray start --head` or use cluster=local") from error
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in the place of the caller's
    try:
        yield
    finally:
        while _LIVE:
            _LIVE[-1].close()
        ray.shutdown()


class RayFleet(Fleet):
    """See the module docstring. Where a worker cannot be started, whatever waits at that time raises: the worker's own
    ValueError, FleetSpecError if the cluster lacks the resources, else FleetError."""

    def __init__(self, build: Callable[[], Any], spec: FleetSpec) -> None:
        super().__init__(spec)
        self._place = Call(READY, (), 1, spec.start_timeout_s)
        self._build = Call(BUILD, (build,), 1, spec.start_timeout_s)
        self._kept: dict[str, list[Call]] = {}
        self._queue: deque[Batch] = deque()
        self._lockstep: Batch | None = None
        self._needy: list[Call] = []  # whose arguments are made again
        self.replicas = [self._spawn(i) for i in range(spec.replicas)]
        _LIVE.append(self)

    def submit(self, method: str, *args: Any, returns: int = 1) -> Task:
        task = Task(self, method, [None])
        return self.enqueue(Batch(task, [Call(method, args, returns, self.spec.timeout_s, task)]))

    def submit_all(self, method: str, rows: Sequence[tuple], keep: bool = False) -> Task:
        self.check_rows(method, rows)
        task = Task(self, method, [None] * len(rows), lockstep=True)
        calls = [Call(method, row, 1, self.spec.timeout_s, task, i) for i, row in enumerate(rows)]
        return self.enqueue(Batch(task, calls, keep))

    def enqueue(self, batch: Batch, first: bool = False) -> Task:
        if self.loss:
            raise FleetError(f"fleet {self.spec.name!r} has ended: {self.loss.text}")
        if first:
            self._queue.appendleft(batch)
            return batch.task
        self._queue.append(batch)
        self.dispatch()
        return batch.task

    def advance(self) -> None:
        _turn(POLL_S)
        follow_up()

    def renew(self) -> None:
        if self not in _LIVE:
            super().renew()
        self._abandon(self.loss or Fault("crash", "all its workers were replaced"))
        self.loss, self._lockstep = None, None
        self._kept.clear()
        self.restarts += len(self.replicas)
        self.replicas = [self._spawn(i) for i in range(self.spec.replicas)]

    def close(self) -> None:
        if self not in _LIVE:
            return
        _LIVE.remove(self)
        self.loss = self.loss or Fault("crash", "it was closed")
        self._abandon(self.loss)

    def _abandon(self, fault: Fault) -> None:
        """Ends the workers and, with this fault, whatever is not done."""
        for replica in self.replicas:
            ray.kill(replica.actor)
            for call in (replica.call, *replica.todo):
                if call and call.task:
                    call.task.parts[call.index] = fault
            replica.call = None
        for call in self._needy:
            call.task.parts[call.index] = fault
        self._needy.clear()
        self._fail_queue(fault)

    def dispatch(self) -> None:
        """Starts whatever may start now."""
        for call in [call for call in self._needy if self.loss or all(task.done for task in call.needs)]:
            self._needy.remove(call)
            if fault := self.loss or next((task.fault.lost() for task in call.needs if task.fault), None):
                self._settle(call, fault)
            elif call.task.lockstep:
                self.replicas[call.index].todo.append(call)
            else:
                self._queue.appendleft(Batch(call.task, [call]))
        for replica in self.replicas:
            if replica.call is None and replica.todo:
                replica.start(replica.todo.popleft())
        while self._queue and self._lockstep is None:
            batch = self._queue[0]
            routable = [replica for replica in self.replicas if replica.call is None]
            if len(routable) < (len(self.replicas) if batch.task.lockstep else 1):
                return
            if self._receives_first(batch):
                continue
            self._queue.popleft()
            if batch.receiving and batch.receiving.fault:
                batch.task.parts = [batch.receiving.fault] * len(batch.calls)
                continue
            self._lockstep = batch if batch.task.lockstep else None
            if self._lockstep is None:  # in turn, so that none is dead for long before anyone knows
                routable.sort(key=lambda replica: replica.started)
            for replica, call in zip(routable, batch.calls):
                replica.start(call)

    def _receives_first(self, batch: Batch) -> bool:
        """Ranks in lockstep wait for each other inside a call, so none may start while an argument of another can still
        turn out lost: all receive theirs in a call before."""
        if self.spec.replace or batch.receiving or not any(call.results for call in batch.calls):
            return False
        task = batch.receiving = Task(self, RECEIVE, [None] * len(batch.calls), lockstep=True)
        receiving = [replace(call, method=RECEIVE, task=task) for call in batch.calls]
        batch.calls = [replace(call, received=True) for call in batch.calls]
        self._queue.appendleft(Batch(task, receiving, receiving=task))
        return True

    def collect(self, replica: Replica) -> None:
        """Takes what a replica's finished call gave."""
        call, (*values, status) = replica.call, replica.references
        replica.call, replica.references = None, []
        try:
            fault, memory, lost = ray.get(status, timeout=GRACE_S)
        except RayTaskError as error:  # a result that cannot be sent, an argument that cannot be received
            lines = str(error).strip().splitlines()
            fault, memory, lost = Fault("error", lines[-1], "\n".join(lines[-6:-1])), 0, []
        except RayError as error:
            cause = str(error).strip().splitlines()[-1].split(" Some common causes")[0]
            self.lose(replica, call, Fault("crash", f"the worker died: {cause}", str(error)))
            return
        if lost:
            self._make_again(replica, call, lost)
        elif fault is None and call.task:
            made = call.made or Made(self, call)
            made.references, made.making = values, None
            self._settle(call, tuple(Result(made, i) for i in range(len(values))))
        elif fault is None:
            self._settle(call, ())
        else:
            self._settle(call, self.locate(fault, replica.index, call.method))
        if self.spec.memory_gb and memory > self.spec.memory_gb * 2**30:
            self._relieve(replica, call, memory / 2**30)

    def _make_again(self, replica: Replica, call: Call, lost: Sequence[ray.ObjectRef]) -> None:
        """Of a call's arguments what nobody has made again since; then the call gets its next chance."""
        if call.task is None:
            fault = Fault("crash", "what a new worker needs was lost with its node")
            self._settle(call, self.locate(fault, replica.index, call.method))
            return
        try:
            call.needs = [result.made.again() for result in call.results if result.reference in lost]
        except ResultLost as error:
            self._settle(call, self.locate(Fault("lost", str(error)), replica.index, call.method))
        else:
            self._needy.append(call)

    def check(self, replica: Replica, now: float) -> None:
        """Gives up a replica whose call is past its deadline; tells early that one finds no place."""
        call, elapsed = replica.call, now - replica.started
        if call is None:
            return
        late = now >= replica.deadline
        look = call is self._place and (late or (elapsed > PATIENCE_S and not replica.warned))
        if look and (shortage := self._shortage()):
            if late:
                self.close()
                raise FleetSpecError(shortage)
            log.warning("%s; waiting for %.0f s in all", shortage, call.timeout_s)
            replica.warned = True
        if late:
            replica.call = None
            self.lose(replica, call, Fault("timeout", f"no result after {elapsed:.1f} s, the worker was killed"))

    def lose(self, replica: Replica, call: Call, fault: Fault) -> None:
        """Ends a replica that died or hangs; if the spec says so, starts another and gives the call its next chance."""
        fault = self.locate(fault, replica.index, call.method)
        log.warning(fault.text)
        if not self.spec.replace:
            self.loss = self.loss or fault
            self._fail_queue(fault)
        starting = call.task is None
        chances = self.spec.retries - (replica.failed_starts if starting else call.losses)
        if call is self._place:
            chances += 1  # it may have been sent to a node that was just lost
        if fault.kind == "timeout" and not starting and not self.spec.retry_timeouts:
            chances = 0
        if not self.spec.replace or (starting and chances <= 0):
            ray.kill(replica.actor)
            self._settle(call, fault)
            return
        self.restarts += 1
        new = self._renew(replica)
        new.failed_starts = replica.failed_starts + starting
        for idle in self.replicas:  # it may have died with this one: the call's next chance waits until that is known
            if idle.call is None and not idle.todo:
                idle.todo.append(self._place)
        if starting:
            return
        call.losses += 1
        if not chances:
            self._settle(call, fault)
        elif call.task.lockstep:
            new.todo.append(call)
        else:
            self._queue.appendleft(Batch(call.task, [call]))

    def _relieve(self, replica: Replica, call: Call, memory_gb: float) -> None:
        """Replaces a replica that holds too much. What it returned stays: it is in the object store."""
        if call.method == BUILD:
            self.close()
            raise FleetSpecError(
                f"fleet {self.spec.name!r}: a fresh worker holds {memory_gb:.2f} GB already; "
                f"raise memory_gb={self.spec.memory_gb}"
            )
        # Not within a call in lockstep, whose outcome the other replicas already have and a new one would not.
        if call.task and not call.task.lockstep:
            log.warning("%s[%d] holds %.2f GB after %s and is replaced", self.spec.name, replica.index, memory_gb,
                        call.method)  # fmt: skip
            self.recycled += 1
            self._renew(replica)

    def _renew(self, replica: Replica) -> Replica:
        """Kills a replica and starts another, which takes over what it still has to do."""
        ray.kill(replica.actor)
        new = self.replicas[replica.index] = self._spawn(replica.index)
        new.todo.extend(waiting for waiting in replica.todo if waiting.task)
        return new

    def _settle(self, call: Call, outcome: tuple | Fault) -> None:
        if call.task is None:
            if isinstance(outcome, Fault):
                self.close()
                outcome.throw()
            return
        call.task.parts[call.index] = outcome
        if not call.task.lockstep:
            return
        if isinstance(outcome, Fault) and not self.spec.replace:
            for replica in self.replicas:
                replica.deadline = min(replica.deadline, time.monotonic() + GRACE_S)
        if call.task.done:
            if self._lockstep.keep and not call.task.fault:
                self._kept.pop(call.method, None)  # replayed in the order of their latest calls
                self._kept[call.method] = [replace(kept, task=None) for kept in self._lockstep.calls]
            self._lockstep = None

    def _spawn(self, index: int) -> Replica:
        given = dict(self.spec.runtime_env)
        environment = SINGLE_THREADED | {FLEET: self.spec.name} | given.get("env_vars", {}) | dict(self.spec.env)
        try:
            options = Host.options(
                num_cpus=self.spec.num_cpus,
                num_gpus=self.spec.num_gpus,
                max_restarts=0,
                scheduling_strategy=seat(self.spec.name, index),
                runtime_env={**given, "env_vars": environment},
            )
        except (ValueError, TypeError) as error:
            raise FleetSpecError(f"fleet {self.spec.name!r}: runtime_env: {error}") from error
        actor = options.remote()
        kept = [calls[index] for calls in self._kept.values()]
        return Replica(index, actor, deque([self._place, self._build, *kept]))

    @property
    def queued(self) -> int:
        """Calls that wait for a replica."""
        return sum(len(batch.calls) for batch in self._queue)

    def _fail_queue(self, fault: Fault) -> None:
        for batch in self._queue:
            batch.task.parts = [fault] * len(batch.task.parts)
        self._queue.clear()

    def _shortage(self) -> str:
        free, total = ray.available_resources(), ray.cluster_resources()
        lacking = " and ".join(
            f"{need:g} {kind} ({free.get(kind, 0):g} of {total.get(kind, 0):g} free)"
            for kind, need in (("CPU", self.spec.num_cpus), ("GPU", self.spec.num_gpus))
            if need > free.get(kind, 0)
        )
        if not lacking:
            return ""
        count = f"each of {self.spec.replicas} replicas" if self.spec.replicas > 1 else "its replica"
        return f"fleet {self.spec.name!r}: {count} needs {lacking}; lower replicas, num_cpus or num_gpus, or add nodes"


def _turn(wait_s: float) -> None:
    """One turn for all fleets: start what may start, wait up to wait_s for a result, take results, kill the late."""
    for fleet in _LIVE:
        fleet.dispatch()
    busy = {replica.references[-1]: (fleet, replica) for fleet in _LIVE for replica in fleet.replicas if replica.call}
    if busy:
        first_deadline = min(replica.deadline for _, replica in busy.values())
        wait_s = min(wait_s, max(0.0, first_deadline - time.monotonic()))
        ray.wait(list(busy), timeout=wait_s, fetch_local=False)
        # The driver may have been away for long: everything that finished counts before anything is called late.
        finished, _ = ray.wait(list(busy), num_returns=len(busy), timeout=0, fetch_local=False)
        if finished:
            WATCHDOG.ended()
        for reference in finished:
            fleet, replica = busy[reference]
            fleet.collect(replica)
        for fleet, replica in busy.values():
            fleet.check(replica, time.monotonic())
        WATCHDOG.look(_LIVE)
        for fleet in _LIVE:
            fleet.dispatch()
