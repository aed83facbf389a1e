"""`make study`: goes on where it was stopped; study.{jsonl,md,png} in benchmarks/results/."""

from __future__ import annotations

from benchmarks.common import RESULTS
from benchmarks.study.order import Store, study
from benchmarks.study.report import write_report


def main() -> None:
    store = Store(RESULTS / "study.jsonl")
    study(store)
    print(write_report(store.runs, RESULTS))


if __name__ == "__main__":
    main()
