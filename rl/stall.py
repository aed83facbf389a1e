"""The watchdog: says what a run waits for when nothing comes to an end for long, well before a deadline ends it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

log = logging.getLogger(__name__)
SHOWN = 8  # calls under way, those that wait longest
_DOING: ContextVar[str] = ContextVar("doing", default="")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Inside the block a stall is reported as one of `what`."""
    before = _DOING.set(what)
    try:
        yield
    finally:
        _DOING.reset(before)


class Watchdog:
    """after_s: seconds without the end of any call after which it speaks, and again after as many more."""

    def __init__(self, after_s: float) -> None:
        self.after_s, self.last_s = after_s, 0.0

    def ended(self) -> None:
        """A call has come to an end."""
        self.last_s = time.monotonic()

    def look(self, fleets: Iterable[Any]) -> None:
        """fleets: `RayFleet`s. A driver that was away is no stall: the time counts from the start of a call."""
        busy = [(fleet, replica) for fleet in fleets for replica in fleet.replicas if replica.call]
        since = max(self.last_s, min((replica.started for _, replica in busy), default=time.monotonic()))
        if (now := time.monotonic()) - since >= self.after_s:
            self.last_s = now
            longest = sorted(busy, key=lambda pair: pair[1].started)[:SHOWN]
            under_way = "; ".join(
                f"{fleet.spec.name}[{replica.index}].{replica.call.method}({plain(replica.call.args)}) for "
                f"{now - replica.started:.0f} of {replica.call.timeout_s:.0f} s"
                for fleet, replica in longest
            ) + (f"; and {more} more" if (more := len(busy) - len(longest)) else "")
            queued = ", ".join(f"{n} for {fleet.spec.name}" for fleet in fleets if (n := fleet.queued))
            log.warning("%s: nothing has come to an end for %.0f s; under way: %s; queued: %s", _DOING.get() or "stall",
                        now - since, under_way, queued or "nothing")  # fmt: skip


WATCHDOG = Watchdog(60.0)


def plain(arguments: Sequence[Any]) -> str:
    """Numbers, words and short lists of them as they are, such as an iteration and its prompts; the rest as dots."""

    def one(value: Any) -> str:
        if isinstance(value, int | float | str) and len(str(value)) <= 80:
            return str(value)
        if isinstance(value, list | tuple) and len(value) <= 16 and all(isinstance(item, int) for item in value):
            return str(list(value))
        return "..."

    return ", ".join(map(one, arguments))
