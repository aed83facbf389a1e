"""`make study`: goes on where it was stopped, then writes benchmarks/results/study.{md,png} of the runs that are there."""

from __future__ import annotations

from benchmarks.common import RESULTS
from benchmarks.study.order import Store, study


def main() -> None:
    study(Store(RESULTS / "study.jsonl"))


if __name__ == "__main__":
    main()
