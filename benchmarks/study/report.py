"""The study's table and plot, of the runs that are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import figure, table
from benchmarks.study.order import TRACKERS, gain

LEVEL = 0.5  # of gain, whose price in CPU-seconds is compared
SHOWN = {
    "track error, px": TRACKERS[0],
    "canary, px": TRACKERS[1],
    "PSNR, dB": "canary/psnr_db",
    "sharpness": "sharpness",
}
Runs = Mapping[str, Sequence[dict[str, Any]]]


def by_arm(runs: Sequence[dict[str, Any]]) -> Runs:
    """The held-out runs: "trunk + tangent", and "... permuted" for its control."""
    arms = defaultdict(list)
    for one in runs:
        if (trial := one["trial"])["split"] == "heldout":
            arms[f"{trial['select']} + {trial['explore']}{', permuted' * trial['permute']}"].append(one)
    return dict(sorted(arms.items(), key=lambda item: -_gains(item[1])[1].mean()))


def _gains(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """CPU-seconds and gains [seeds, points]; a curve begins at (0, 0)."""
    seconds = [[at["cpu_s"] for at in one["curve"]] for one in runs]
    return np.array(seconds), np.array([[gain(one, i) for i in range(len(one["curve"]))] for one in runs])


def price(runs: Sequence[dict[str, Any]], level: float = LEVEL) -> float:
    """CPU-seconds after which the mean curve has this gain, linearly between its points; inf where it never has."""
    seconds, gains = (values.mean(0) for values in _gains(runs))
    for i in range(1, len(gains)):
        if gains[i] >= level:
            return float(np.interp(level, gains[i - 1 : i + 1], seconds[i - 1 : i + 1]))
    return float("inf")


def rows(arms: Runs) -> list[dict[str, Any]]:
    found = []
    for name, runs in arms.items():
        trial, (seconds, gains) = runs[0]["trial"], _gains(runs)
        row = {"select + explore": name, "lr": trial["lr"], "prompts": trial["prompts"],
               "stiffness": trial["stiffness"], "amplitude": trial["amplitude"], "seeds": len(runs)}  # fmt: skip
        for i in range(1, gains.shape[1]):
            spread = f" ± {gains[:, i].std(ddof=1):.2f}" if len(runs) > 1 else ""
            row[f"gain, point {i}"] = f"{gains[:, i].mean():+.2f}{spread} in {seconds[:, i].mean():.1f} s"
        row[f"CPU-s to a gain of {LEVEL:g}"] = price(runs)
        row |= {title: f"{_mean(runs, 0, key):.2f} → {_mean(runs, -1, key):.2f}" for title, key in SHOWN.items()}
        found.append(row | {"iterations": round(np.mean([one["curve"][-1]["iterations"] for one in runs]))})
    return found


def _mean(runs: Sequence[dict[str, Any]], point: int, key: str) -> float:
    return float(np.mean([one["curve"][point][key] for one in runs]))


def figures(arms: Runs) -> list[dict[str, Any]]:
    """What the default gives against Flow-GRPO's way, and what the grouping and the subspace give of it: ratios of the
    gain per CPU-second at the first point, and of the CPU-seconds for the same gain."""
    found = []
    for better, worse, bound in (
        ("trunk + tangent", "all + white", ">= 3"),
        ("trunk + tangent", "all + tangent", ">= 1"),
        ("trunk + white", "all + white", ">= 1"),
        ("trunk + tangent", "trunk + white", ">= 1"),
        ("all + tangent", "all + white", ">= 1"),
    ):
        if {better, worse} <= arms.keys():
            sides = [_gains(arms[name]) for name in (better, worse)]
            rates = [float(np.mean(gains[:, 1] / seconds[:, 1])) for seconds, gains in sides]
            found.append(figure(f"gain per CPU-s at the first point, {better} / {worse}", rates[0] / rates[1], bound))
            ratio = price(arms[worse]) / price(arms[better])
            found.append(figure(f"CPU-s to a gain of {LEVEL:g}, {worse} / {better}", ratio, bound))
    return found


def _dev(run: dict[str, Any]) -> bool:
    return run["trial"]["split"] == "dev"


def tried(run: dict[str, Any]) -> dict[str, Any]:
    """A row of the search."""
    trial, end = run["trial"], run["curve"][-1]
    settings = {name: trial[name] for name in ("lr", "prompts", "stiffness", "amplitude")}
    return {"select + explore": f"{trial['select']} + {trial['explore']}", **settings, "gain": gain(run),
            "PSNR, dB": end["canary/psnr_db"], "sharpness": end["sharpness"],
            "iterations": end["iterations"]}  # fmt: skip


def plot(arms: Runs, path: Path) -> None:
    picture = Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for name, runs in arms.items():
        seconds, gains = _gains(runs)
        style = ":" if "permuted" in name else "-"
        (line,) = axes.plot(seconds.mean(0), gains.mean(0), style, marker="o", markersize=3, label=name)
        axes.fill_between(seconds.mean(0), gains.min(0), gains.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set_xlabel("CPU-seconds of training")
    axes.set_ylabel("held-out gain")
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=120)


ABOUT = """Held-out gain per CPU-second: the share by which the two track errors have fallen, on average; the second
tracker rewards nobody. Every `select` + `explore` with its own learning rate, prompts per iteration, stiffness (the
weight of the divergence is stiffness / sqrt(dimensions of an action)) and amplitude, found by the same search on dev
prompts; groups of 8, a constant learning rate, the time embedding trained. Held-out prompts are the seed's own. CPU
time is that of rollout, rewards and learner in one process; mean ± standard deviation over the seeds. "permuted":
advantages go to random members of their group.
"""


def write_report(runs: Sequence[dict[str, Any]], folder: Path) -> str:
    """study.md and study.png; returns the text."""
    arms = by_arm(runs)
    if not arms:
        return "No held-out run is there yet.\n"
    plot(arms, folder / "study.png")
    parts = [ABOUT, "![gain over CPU-seconds](study.png)\n", table(rows(arms))]
    if compared := figures(arms):
        parts.append(table(compared))
    parts += ["The search, one run each on dev prompts:\n", table([tried(one) for one in runs if _dev(one)])]
    text = "\n".join(parts)
    (folder / "study.md").write_text(text)
    return text
