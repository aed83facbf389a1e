"""The learning result: three seeds and as many permuted controls, each on held-out prompts of its own: `make results`.

A run that is there already is not repeated. Writes benchmarks/results/seeds.{json,md}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
    out = ROOT / "benchmarks/results"
    out.mkdir(exist_ok=True)
    (out / "seeds.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "seeds.md").write_text(table(found))
    print(table(found))


def table(found: dict[str, dict]) -> str:
    lines = ["| run | " + " | ".join(FIGURES) + " | iterations |", "|---" * (len(FIGURES) + 2) + "|"]
    for name, summary in found.items():
        cells = []
        for path in FIGURES.values():
            row = summary["heldout"]
            for key in path:
                row = row[key]
            low, high = row["ci95"]
            cells.append(f"{row['base']:.2f} → {row['tuned']:.2f} ({100 * (row['tuned'] / row['base'] - 1):+.0f} %; "
                         f"{low:+.2f}..{high:+.2f})")  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {summary['iterations']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
