"""The study's table and plot, of the runs that are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import figure, table
from benchmarks.study.order import TRACKERS, gain

LEVEL = 0.3  # whose price in CPU-seconds is compared
SHOWN = {"track error, px": TRACKERS[0], "canary, px": TRACKERS[1], "PSNR, dB": "canary/psnr_db",
         "sharpness": "sharpness"}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """Held-out runs and their controls, seed by seed."""

    runs: Sequence[dict[str, Any]]
    controls: Sequence[dict[str, Any]]

    @property
    def seconds(self) -> np.ndarray:
        """CPU-seconds [seeds, points]; a curve begins with 0."""
        return np.array([[at["cpu_s"] for at in one["curve"]] for one in self.runs])

    @property
    def gains(self) -> np.ndarray:
        return _gains(self.runs)

    @property
    def learnt(self) -> np.ndarray:
        """Gains above what the controls gain by chance; a control that does harm counts as one that does nothing."""
        return self.gains - _gains(self.controls).clip(0)

    def learns(self, point: int = -1) -> bool:
        """Whether the seeds tell what was learnt from nothing, by two standard errors."""
        learnt = self.learnt[:, point]
        return len(learnt) > 1 and learnt.mean() > 2 * _error(learnt)

    def mean(self, key: str, point: int, control: bool = False) -> float:
        return float(np.mean([one["curve"][point][key] for one in (self.controls if control else self.runs)]))


def _gains(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([[gain(one, i) for i in range(len(one["curve"]))] for one in runs])


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def by_arm(runs: Sequence[dict[str, Any]]) -> dict[str, Arm]:
    """Best first. A seed without its control is left out."""
    found: dict[str, dict[int, dict[bool, Any]]] = defaultdict(lambda: defaultdict(dict))
    for one in runs:
        if (trial := one["trial"])["split"] == "heldout":
            found[f"{trial['select']} + {trial['explore']}"][trial["seed"]][trial["permute"]] = one
    pairs = {name: [pair for pair in seeds.values() if len(pair) == 2] for name, seeds in found.items()}
    arms = {name: Arm([p[False] for p in own], [p[True] for p in own]) for name, own in pairs.items() if own}
    return dict(sorted(arms.items(), key=lambda item: -item[1].learnt[:, -1].mean()))


def price(seconds: np.ndarray, values: np.ndarray, level: float = LEVEL) -> float:
    """CPU-seconds after which the values [seeds, points] have reached this level on average, linearly between points;
    inf where they never do."""
    at, mean = seconds.mean(0), values.mean(0)
    for i in range(1, len(mean)):
        if mean[i] >= level:
            return float(np.interp(level, mean[i - 1 : i + 1], at[i - 1 : i + 1]))
    return float("inf")


def rows(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    found = []
    for name, arm in arms.items():
        trial = arm.runs[0]["trial"]
        row = {"select + explore": name, "lr": trial["lr"], "stiffness": trial["stiffness"], "seeds": len(arm.runs)}
        for i, point in enumerate(trial["points"], 1):
            row[f"gain at {point:g} s"] = _spread(arm.gains[:, i])
        row[f"control at {point:g} s"] = _spread(_gains(arm.controls)[:, -1])
        for i, point in enumerate(trial["points"], 1):
            row[f"learnt at {point:g} s"] = _spread(arm.learnt[:, i]) + ("" if arm.learns(i) else " (not shown)")
        row["iterations"] = round(np.mean([one["curve"][-1]["iterations"] for one in arm.runs]))
        row |= {title: f"{arm.mean(key, 0):.2f} → {arm.mean(key, -1):.2f} (control {arm.mean(key, -1, True):.2f})"
                for title, key in SHOWN.items()}  # fmt: skip
        found.append(row)
    return found


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():+.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def figures(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """What the default gives against Flow-GRPO's way, and what the grouping and the subspace give of it: ratios of the
    what is learnt per CPU-second at each point, and of the CPU-seconds for the same. Where the seeds do not tell what
    the worse one has learnt from nothing, its mean and two standard errors stand for it: the ratio is at least that."""
    found = []
    for better, worse, bound in (
        ("trunk + tangent", "all + white", ">= 3"),
        ("trunk + tangent", "all + tangent", ">= 1"),
        ("trunk + white", "all + white", ">= 1"),
        ("trunk + tangent", "trunk + white", ">= 1"),
        ("all + tangent", "all + white", ">= 1"),
    ):
        if not {better, worse} <= arms.keys() or not arms[better].learns():
            continue
        more, less = arms[better], arms[worse]
        for i, point in enumerate(more.runs[0]["trial"]["points"], 1):
            if not more.learns(i):
                continue
            learnt, sure = less.learnt[:, i], less.learns(i)
            most = learnt.mean() if sure else learnt.mean() + 2 * _error(learnt)
            rates = [gain / arm.seconds[:, i].mean() for gain, arm in ((more.learnt[:, i].mean(), more), (most, less))]
            ratio = float(rates[0] / rates[1]) if most > 0 else float("inf")
            name = f"learnt per CPU-s at {point:g} s, {better} / {worse}{'' if sure else ', at least'}"
            found.append(figure(name, ratio, bound))
        for what in ("learnt", "gains"):
            prices = [price(arm.seconds, getattr(arm, what)) for arm in (less, more)]
            if np.isfinite(prices[1]):
                name = f"CPU-s until {LEVEL:g} is {what.replace('gains', 'gained')}, {worse} / {better}"
                found.append(figure(name, prices[0] / prices[1], bound))
    return found


def _dev(run: dict[str, Any]) -> bool:
    return run["trial"]["split"] == "dev"


def tried(run: dict[str, Any]) -> dict[str, Any]:
    """A row of the search."""
    trial, end = run["trial"], run["curve"][-1]
    settings = {name: trial[name] for name in ("lr", "stiffness", "seed")}
    return {"select + explore": f"{trial['select']} + {trial['explore']}", **settings, "gain": gain(run),
            "PSNR, dB": end["canary/psnr_db"], "sharpness": end["sharpness"],
            "iterations": end["iterations"]}  # fmt: skip


def plot(arms: Mapping[str, Arm], path: Path) -> None:
    picture = Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for name, arm in arms.items():
        seconds, gains = arm.seconds.mean(0), arm.gains
        (line,) = axes.plot(seconds, gains.mean(0), marker="o", markersize=3, label=name)
        axes.fill_between(seconds, gains.min(0), gains.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
        axes.plot(seconds, _gains(arm.controls).mean(0), ":", color=line.get_color(), linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set_xlabel("CPU-seconds of training (dotted: advantages permuted)")
    axes.set_ylabel("held-out gain")
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=120)


ABOUT = """Held-out gain per CPU-second: the share by which the two track errors have fallen, on average; the second
tracker rewards nobody. Control: the same run with the advantages given to random members of their group. Learnt: the
gain above that of the control, seed by seed, where a control that does harm counts as one that does nothing; it is not
shown where it is less than two standard errors above 0. Every `select` + `explore` has a learning rate
and a stiffness (the weight of the divergence times sqrt(dimensions of an action)) of its own, found by the same search
for the highest gain on dev prompts, on average over two seeds. Alike for all: two prompts per iteration, groups of 8, a
learning rate that falls to 0 at the end, the time embedding trained. Held-out prompts are the seed's own. CPU time is
that of rollout, rewards and learner in one process; mean ± standard deviation over the seeds.
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
    parts += ["The search, on dev prompts:\n", table([tried(one) for one in runs if _dev(one)])]
    text = "\n".join(parts)
    (folder / "study.md").write_text(text)
    return text
