"""SIGTERM (`ray job stop`, Kubernetes) and SIGINT (Ctrl-C) end a run so that nothing it trained is lost.

The handler only takes note. `check` raises Stopped where a wait may be given up (`rl.fleet.as_completed`: rollouts,
rewards, evaluations); an update, a weight sync and a checkpoint are finished. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked = threading.Event()


class Stopped(SystemExit):
    """The run was asked to stop; exit status 0 where nobody catches it."""


def check() -> None:
    """Raises Stopped if a signal came inside `stopping`."""
    if _asked.is_set():
        raise Stopped


@contextmanager
def stopping(grace_s: float, how_to_resume: str) -> Iterator[None]:
    """Takes the signals inside the block (of the main thread) and tells how to go on. What is not over grace_s seconds
    after the first signal ends with status 1."""
    timer = threading.Timer(grace_s, _give_up, [grace_s, how_to_resume])
    timer.daemon = True

    def handle(number: int, _: object) -> None:
        if _asked.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _asked.set()
        timer.start()
        _tell("stopping: a checkpoint first; a second signal ends at once")

    _asked.clear()
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    except Stopped:
        _tell(f"stopped; {how_to_resume}")
        raise
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def _give_up(grace_s: float, how_to_resume: str) -> None:
    _tell(f"not stopped within train.grace_s={grace_s:g} s, the last checkpoint stands; {how_to_resume}")
    os._exit(1)


def _tell(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print may be what the signal interrupted
