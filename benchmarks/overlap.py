"""How much of an iteration `async.max_staleness=1` hides: the real loop on workers that only sleep.

python -m benchmarks.overlap

The shorter of (rollout + reward) and learn is what can be hidden; the seconds of both are measured in the loop that
overlaps nothing. Sleeping workers take no CPU, so what is measured is the loop and not this machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import RESULTS, figure, write
from benchmarks.sleepers import sleepers
from rl.loop import LoopSettings
from rl.ray_fleet import ray_session

WORKERS, JUDGES = 16, 4
CHUNKS = 32
CASES = {"learn is short": 1.0, "both alike": 2.4, "learn is long": 4.0}
"""Seconds of an update, beside two rounds of rollouts of 1 s and eight of rewards of 0.1 s."""


def measure(
    run: Callable, case: str, learn_s: float, chunks: int, iterations: int
) -> tuple[list[dict[str, Any]], list[list[tuple]]]:
    """run: of `sleepers`. A row for max_staleness 0 and 1, and what happened when. The first iteration, in which
    nothing can overlap yet, and the last, beside which nothing is left to generate, do not count."""
    rows, courses = [], []
    for staleness in (0, 1):
        settings = LoopSettings(0, iterations, chunks, 1, True, 5.0, False, iterations, max_staleness=staleness)
        ends, phases = [], []

        def log(step: int, metrics: dict[str, float]) -> None:
            ends.append(time.perf_counter())  # noqa: B023
            phases.append({name: metrics[f"time/{name}"] for name in ("sync", "rollout", "reward", "learn")})  # noqa: B023

        courses.append(run(settings, log=log, learner=learn_s))
        rows.append({
            "case": case,
            "max_staleness": staleness,
            "s per iteration": statistics.median(b - a for a, b in pairwise(ends[:-1])),
            **{f"{name}_s": statistics.median(p[name] for p in phases[1:-1]) for name in phases[0]},
        })  # fmt: skip
    apart, together = rows
    generate = sum(apart[f"{name}_s"] for name in ("sync", "rollout", "reward"))
    saved = apart["s per iteration"] - together["s per iteration"]
    apart["hidden"], together["hidden"] = 0.0, saved / min(generate, apart["learn_s"])
    return rows, courses


def draw(courses: Sequence[Sequence[tuple]], iterations: Sequence[int]) -> Figure:
    """Who worked on which iteration when, without overlap above, with it below."""
    fig = Figure((10, 4.6), layout="constrained")
    names = {"update": "learner", "score": "judges", "rollout": "rollout workers"}
    for axes, notes, staleness in zip(fig.subplots(len(courses), 1, sharex=True), courses, (0, 1)):
        shown = [note for note in notes if note[1] in iterations]
        start = min(note[-2] for note in shown)
        for row, what in enumerate(names):
            for _, number, _, begin, end in (note for note in shown if note[0] == what):
                axes.barh(row, end - begin, left=begin - start, color=f"C{number}", alpha=0.35, height=0.7)
        axes.set_yticks(range(len(names)), names.values())
        axes.set_title(f"async.max_staleness={staleness}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds; one colour for each iteration")
    return fig


def main() -> None:
    rows, courses = [], {}
    roles = {"rollout": (1.0, WORKERS), "reward": (0.1, JUDGES), "learner": (0.0, 1)}
    with ray_session("local", num_cpus=2, object_store_gb=0.3), sleepers("ray", roles) as run:
        for case, learn_s in CASES.items():
            found, courses[case] = measure(run, case, learn_s, CHUNKS, 8)
            rows += found
    draw(courses["both alike"], range(2, 6)).savefig(RESULTS / "overlap.png", dpi=120)
    about = (
        f"The training loop on {WORKERS} rollout workers, {JUDGES} judges and a learner that only sleep: {CHUNKS} "
        "rollout calls of 1 s, as many rewards of 0.1 s, one update of 1, 2.4 or 4 s. Medians of the "
        "iterations but the first and the last. Hidden: of the shorter of (sync + rollout + reward) and learn. "
        "Picture: overlap.png."
    )
    write("overlap", about, rows, [figure(f"hidden, {row['case']}", row["hidden"], ">= 0.8") for row in rows[1::2]])


if __name__ == "__main__":
    main()
