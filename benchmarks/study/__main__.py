"""`make study`: goes on where it was stopped; study.{jsonl,md,png} in benchmarks/results/."""

from __future__ import annotations

from benchmarks.common import RESULTS
from benchmarks.study.order import study
from benchmarks.study.report import write_report


def main() -> None:
    path = RESULTS / "study.jsonl"
    study(path)
    print(write_report(path))


if __name__ == "__main__":
    main()
