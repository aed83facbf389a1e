"""All benchmarks, one after the other: `make bench`, or some: `python -m benchmarks.run only=prefix,kv_cache`.

Each is a process of its own and writes benchmarks/results/<name>.{json,md}; the figures to reach come together in
benchmarks/results/summary.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.common import RESULTS, ROOT, table

NAMES = (
    "iteration",
    "prefix",
    "one_forward",
    "kv_cache",
    "whole_loop",
    "weight_sync",
    "overlap",
    "many_workers",
)


def choose(arguments: Sequence[str]) -> list[str]:
    """All, or those that are named; raises SystemExit naming one that is not there."""
    if not arguments:
        return list(NAMES)
    key, _, names = arguments[0].partition("=")
    chosen = names.split(",")
    if key != "only" or len(arguments) > 1 or not {*chosen} <= {*NAMES}:
        raise SystemExit(f"{' '.join(arguments)}: give only=<names>, of {', '.join(NAMES)}")
    return chosen


def summary() -> str:
    """The figures of all results that are there."""
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES
             if (RESULTS / f"{name}.json").exists()}  # fmt: skip
    rows = [
        {"benchmark": f"[{name}]({name}.md)", **row} for name, one in found.items() for row in one.get("figures", [])
    ]
    return table(rows) if rows else "No figures yet.\n"


def main() -> None:
    for name in choose(sys.argv[1:]):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
    (RESULTS / "summary.md").write_text(summary())
    print(summary())


if __name__ == "__main__":
    main()
