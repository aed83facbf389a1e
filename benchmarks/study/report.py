"""The study's table and plot, of the runs that are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import figure, table
from benchmarks.study.order import PLAN, TRACKERS, Missing, Pair, Plan, Store, finals, gain

LEVEL = 0.3  # whose price in CPU-seconds is compared
LOWEST = -0.8  # gain that is drawn
SHOWN = {"track error, px": TRACKERS[0], "canary, px": TRACKERS[1], "PSNR, dB": "canary/psnr_db",
         "sharpness": "sharpness"}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """Held-out runs and their controls, seed by seed."""

    pairs: Sequence[Pair]

    @property
    def trial(self) -> dict[str, Any]:
        return self.pairs[0].run["trial"]

    @property
    def seconds(self) -> np.ndarray:
        """CPU-seconds [seeds, points]; a curve begins with 0."""
        return np.array([[at["cpu_s"] for at in pair.run["curve"]] for pair in self.pairs])

    @property
    def gains(self) -> np.ndarray:
        return self._at_points(lambda pair, i: gain(pair.run, i))

    @property
    def controls(self) -> np.ndarray:
        return self._at_points(lambda pair, i: gain(pair.control, i))

    @property
    def learnt(self) -> np.ndarray:
        return self._at_points(Pair.learnt)

    def _at_points(self, value: Callable[[Pair, int], float]) -> np.ndarray:
        """[seeds, points]"""
        return np.array([[value(pair, i) for i in range(len(pair.run["curve"]))] for pair in self.pairs])

    def mean(self, key: str, point: int, control: bool = False) -> float:
        return float(np.mean([(pair.control if control else pair.run)["curve"][point][key] for pair in self.pairs]))


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def shown(values: np.ndarray) -> bool:
    """Whether the seeds tell their mean from nothing, by two standard errors."""
    return len(values) > 1 and values.mean() > 2 * _error(values)


def by_arm(store: Store, plan: Plan) -> dict[str, Arm]:
    """Best first. What is not finished is left out: an arm that is still searched, a seed without its control."""
    arms = {}
    for arm in plan.arms:
        pairs = []
        with suppress(Missing):
            for trial in finals(store, plan, *arm):
                pairs.append(store.pair(trial))
        if pairs:
            arms[trial.arm] = Arm(pairs)
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
        trial = arm.trial
        row = {"select + explore": name, "lr": trial["lr"], "stiffness": trial["stiffness"], "seeds": len(arm.pairs)}
        for i, point in enumerate(trial["points"], 1):
            row[f"gain at {point:g} s"] = _spread(arm.gains[:, i])
        row[f"control at {point:g} s"] = _spread(arm.controls[:, -1])
        for i, point in enumerate(trial["points"], 1):
            row[f"learnt at {point:g} s"] = _spread(arm.learnt[:, i]) + (
                "" if shown(arm.learnt[:, i]) else " (not shown)"
            )
        row["iterations"] = round(arm.mean("iterations", -1))
        row |= {title: f"{arm.mean(key, 0):.2f} → {arm.mean(key, -1):.2f} (control {arm.mean(key, -1, True):.2f})"
                for title, key in SHOWN.items()}  # fmt: skip
        found.append(row)
    return found


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():+.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def figures(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """What the default gives against Flow-GRPO's way, and what the grouping and the subspace give of it: ratios of
    what is gained, and learnt, per CPU-second at each point, and of the CPU-seconds for the same. Where the seeds do
    not tell the worse one from nothing, its mean and two standard errors stand for it, and where it never gets so far,
    all of its seconds: the ratio is at least that."""
    found = []
    for better, worse, bound in (
        ("trunk + tangent", "all + white", ">= 3"),
        ("trunk + tangent", "all + tangent", ">= 1"),
        ("trunk + white", "all + white", ">= 1"),
        ("trunk + tangent", "trunk + white", ">= 1"),
        ("all + tangent", "all + white", ">= 1"),
    ):
        if not {better, worse} <= arms.keys() or len(arms[worse].pairs) < 2:  # one seed has no error
            continue
        more, less = arms[better], arms[worse]
        for what, (high, low) in {"gained": (more.gains, less.gains), "learnt": (more.learnt, less.learnt)}.items():
            for i, point in enumerate(more.trial["points"], 1):
                if not shown(high[:, i]):
                    continue
                sure = shown(low[:, i])
                most = low[:, i].mean() + (0 if sure else 2 * _error(low[:, i]))
                rates = high[:, i].mean() / more.seconds[:, i].mean(), most / less.seconds[:, i].mean()
                ratio = float(rates[0] / rates[1]) if most > 0 else float("inf")
                name = f"{what} per CPU-s at {point:g} s, {better} / {worse}{'' if sure else ', at least'}"
                found.append(figure(name, ratio, bound))
            cost, other = price(more.seconds, high), price(less.seconds, low)
            if np.isfinite(cost):
                sure, other = np.isfinite(other), min(other, less.seconds[:, -1].mean())
                name = f"CPU-s until {LEVEL:g} is {what}, {worse} / {better}{'' if sure else ', at least'}"
                found.append(figure(name, float(other / cost), bound))
    return found


def tried(store: Store, plan: Plan) -> list[dict[str, Any]]:
    """The search: a row per setting, means over the seeds. Controls are there where the gain alone did not decide."""
    settings: dict[tuple[Any, ...], dict[bool, list[dict[str, Any]]]] = defaultdict(lambda: {False: [], True: []})
    for one in store.runs:
        trial = one["trial"]
        if trial["split"] == "dev" and trial["seed"] in plan.tuning:
            name = f"{trial['select']} + {trial['explore']}"
            settings[name, trial["lr"], trial["stiffness"]][trial["permute"]].append(one)
    found = []
    for (name, lr, stiffness), runs in settings.items():
        pairs = [Pair(*pair) for pair in zip(runs[False], runs[True], strict=False)]
        row = {"select + explore": name, "lr": lr, "stiffness": stiffness}
        row["gain"] = _mean(gain(one) for one in runs[False])
        row["control"] = _mean(gain(pair.control) for pair in pairs)
        row["learnt"] = _mean(pair.learnt() for pair in pairs)
        ends = [one["curve"][-1] for one in runs[False]]
        shown = {"PSNR, dB": "canary/psnr_db", "sharpness": "sharpness", "iterations": "iterations"}
        found.append(row | {title: _mean(end[key] for end in ends) for title, key in shown.items()})
    return found


def _mean(values: Iterable[float]) -> float | str:
    """Blank if there are none."""
    found = list(values)
    return float(np.mean(found)) if found else ""


def plot(arms: Mapping[str, Arm], path: Path) -> None:
    """One panel per `explore`; what is worse than LOWEST leaves it."""
    explores = list(dict.fromkeys(arm.trial["explore"] for arm in arms.values()))
    colours = {select: f"C{i}" for i, select in enumerate(sorted({arm.trial["select"] for arm in arms.values()}))}
    picture = Figure(figsize=(4 * len(explores), 4), layout="constrained")
    for axes, explore in zip(np.ravel(picture.subplots(1, len(explores), sharey=True)), explores, strict=True):
        for arm in arms.values():
            if arm.trial["explore"] == explore:
                seconds, gains, colour = arm.seconds.mean(0), arm.gains, colours[arm.trial["select"]]
                axes.plot(seconds, gains.mean(0), "o-", color=colour, markersize=3, label=arm.trial["select"])
                axes.fill_between(seconds, gains.min(0), gains.max(0), color=colour, alpha=0.12, linewidth=0)
                axes.plot(seconds, arm.controls.mean(0), ":", color=colour, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.6)
        axes.set(title=f"explore={explore}", ylim=(LOWEST, 0.8))
        axes.legend(fontsize=8, loc="lower right")
    picture.supxlabel("CPU-seconds of training (band: all seeds; dotted: advantages permuted)", fontsize=10)
    picture.supylabel("held-out gain", fontsize=10)
    picture.savefig(path, dpi=110)


ABOUT = """Held-out gain per CPU-second: the share by which the two track errors have fallen, on average; the second
tracker rewards nobody. Control: the same run with the advantages given to random members of their group. Learnt: the
gain above that of the control, seed by seed, where a control that does harm counts as one that does nothing; it is not
shown where it is less than two standard errors above 0. Every `select` + `explore` has a learning rate
and a stiffness (the weight of the divergence times sqrt(dimensions of an action)) of its own, found by the same search
for what is learnt on dev prompts, on average over two seeds. Alike for all: two prompts per iteration, groups of 8, a
learning rate that falls to 0 at the end, the time embedding trained. Held-out prompts are the seed's own. CPU time is
that of rollout, rewards and learner in one process; mean ± standard deviation over the seeds.
"""


def write_report(path: Path, plan: Plan = PLAN) -> str:
    """study.md and study.png beside the runs; returns the text."""
    store, folder = Store(path, train=None), path.parent
    arms = by_arm(store, plan)
    if not arms:
        return "No held-out run is there yet.\n"
    plot(arms, folder / "study.png")
    parts = [ABOUT, "![gain over CPU-seconds](study.png)\n", table(rows(arms))]
    if compared := figures(arms):
        parts.append(table(compared))
    parts += ["The search, on dev prompts:\n", table(tried(store, plan))]
    text = "\n".join(parts)
    (folder / "study.md").write_text(text)
    return text
