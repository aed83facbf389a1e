"""What kinds of operators a rollout and an update spend their time in, by torch.profiler.

python -m benchmarks.operators
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import cpu_seconds, write
from benchmarks.iteration import bare

KINDS = {
    "convolutions": "conv",
    "attention": "scaled_dot_product",
    "matrix products": r"\b(add|b|badd)?mm\b|linear",
    "copies": r"copy|cat\b|index|gather|clone|contiguous|pad|stack|repeat",
}
REST, OUTSIDE = "elementwise, norms, other", "Python, profiler"


def kind(operator: str) -> str:
    """Of KINDS, or REST."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, operator)), REST)


def shares(work: Callable[[], Any]) -> dict[str, Any]:
    """CPU-seconds of the work as it is; operator calls, and the share of each kind's own time, under the profiler.
    The work runs three times."""
    work()
    _, plain_s = cpu_seconds(work)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()  # the profiler's clock too: the machine should be otherwise idle
        work()
        profiled_s = time.perf_counter() - started
    operators, own = profiler.key_averages(), Counter()
    for one in operators:
        own[kind(one.key)] += one.self_cpu_time_total / 1e6
    own[OUTSIDE] = profiled_s - own.total()
    calls = sum(one.count for one in operators)
    return {"cpu_s": plain_s, "operators": calls} | {name: own[name] / profiled_s for name in (*KINDS, REST, OUTSIDE)}


def measure(select: str, members: int, prompts: int, *more: str) -> list[dict[str, Any]]:
    parts = bare(select, members, prompts, "learner.decay_iterations=null", "learner.lr=0", *more)
    groups, replays = parts.rollout(0)
    scores = parts.score(groups)

    phases = {"rollout": lambda: parts.rollout(0), "learner": lambda: parts.learn_again(replays, scores)}
    return [{"select": select, "phase": phase} | shares(work) for phase, work in phases.items()]


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for select in ("trunk", "video", "all") for row in measure(select, 16, 2)]
    about = (
        "One rollout and one update of 2 prompts and groups of 16: CPU-seconds, operator calls, and the share of each "
        "kind of operator in the time under torch.profiler, which makes short operators longer than they are."
    )
    write("operators", about, rows)


if __name__ == "__main__":
    main()
