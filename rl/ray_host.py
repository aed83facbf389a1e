"""The actor that holds a worker in its own process. It reports what goes wrong instead of raising it, because Ray
replaces exceptions by its own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from rl.fleet import Fault, is_lost, run_call

READY, BUILD, RECEIVE = "__ready__", "__build__", "__receive__"


@ray.remote
class Host:
    """Holds one plain object. received: arguments that lie here for the next call."""

    received: Sequence | None = None

    def call(self, method: str, returns: int, args: Sequence | None) -> tuple:
        """(value 1, ..., value `returns`, (fault or None, private memory in bytes, lost)): what is told of the call
        last, because where a value cannot be sent Ray has already stored what comes before it.

        args: with references among them, and in lists; None: those that RECEIVE brought. lost: the references whose
        objects went with their node; then nothing was called.
        """
        # No limit of its own: the driver kills this process at the deadline of the call.
        args, lost = receive(args) if args is not None else (self.received, [])
        self.received = None
        if lost:
            return (*[None] * returns, (None, 0, lost))
        outcome = run_call(self if method in (READY, BUILD, RECEIVE) else self.worker, method, args, returns)
        if isinstance(outcome, Fault):
            outcome = replace(outcome, exception=_portable(outcome.exception))
            return (*[None] * returns, (outcome, _private_bytes(), []))
        return (*outcome, (None, _private_bytes(), []))

    def __ready__(self) -> None:
        """Answers as soon as the process is up, which tells a slow factory from a cluster without room."""

    def __build__(self, build: Callable[[], Any]) -> None:
        self.worker = build()

    def __receive__(self, *args: Any) -> None:
        self.received = args


def flat(args: Sequence) -> list:
    """The arguments, and the items of those that are lists."""
    return [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]


def mapped(of: Callable[[Any], Any], args: Sequence) -> list:
    """The arguments with of(item) for each of `flat`."""
    return [[of(item) for item in arg] if isinstance(arg, list) else of(arg) for arg in args]


def receive(args: Sequence) -> tuple[list, list[ray.ObjectRef]]:
    """The arguments with values in the place of references, and the references that no node holds any more."""
    references = [item for item in flat(args) if isinstance(item, ray.ObjectRef)]
    try:
        values = dict(zip(references, ray.get(references)))
    except ObjectLostError:
        return [], [reference for reference in references if is_lost(reference)]
    return mapped(lambda item: values[item] if isinstance(item, ray.ObjectRef) else item, args), []


def _private_bytes() -> int:
    """Resident memory of this process that it shares with nobody: neither libraries nor the object store. 0 where the
    system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    resident, shared = map(int, statm.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _portable(error: Exception | None) -> Exception | None:
    """The exception if it is a user error (ValueError) that survives the way to another process, else None."""
    try:
        return pickle.loads(ray.cloudpickle.dumps(error)) if isinstance(error, ValueError) else None
    except Exception:  # a class of its own may refuse in any way; the fault's text is enough then
        return None
