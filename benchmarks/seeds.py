"""The learning result: three seeds and as many permuted controls, each on held-out prompts of its own: `make results`.

A run that is there already is not repeated. Writes benchmarks/results/seeds.{json,md}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Any

from benchmarks.common import RESULTS, ROOT, table

SEEDS = {f"seed {s}": [f"seed={s}", f"evaluate.seed={100 + s}"] for s in range(3)}
RUNS = SEEDS | {f"permuted, {name}": [*overrides, "experiment=control_permuted"] for name, overrides in SEEDS.items()}
FIGURES = {
    "track error, px": ("track_error_px",),
    "canary track error, px": ("canary", "track_error_px"),
    "canary PSNR, dB": ("canary", "quality", "psnr_db"),
    "sharpness": ("sharpness",),
}


def main() -> None:
    found = {}
    for name, overrides in RUNS.items():
        run = ROOT / "outputs/seeds" / name.replace(", ", "_").replace(" ", "_")
        if not (run / "summary.json").exists():
            subprocess.run([sys.executable, "-m", "jobs.train", f"run_dir={run}", *overrides], cwd=ROOT, check=True)
        found[name] = {"overrides": overrides, **json.loads((run / "summary.json").read_text())}
    (RESULTS / "seeds.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table([row(name, summary) for name, summary in found.items()])
    (RESULTS / "seeds.md").write_text(text)
    print(text)


def row(run: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    cells = {}
    for title, path in FIGURES.items():
        value = reduce(getitem, path, summary["heldout"])
        low, high = value["ci95"]
        change = f"{100 * (value['tuned'] / value['base'] - 1):+.0f} %; {low:+.2f}..{high:+.2f}"
        cells[title] = f"{value['base']:.2f} → {value['tuned']:.2f} ({change})"
    return {"run": run, **cells, "iterations": summary["iterations"]}


if __name__ == "__main__":
    main()
