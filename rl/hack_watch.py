"""The hack watch: tells when the training reward rises on held-out prompts while a canary that no training sees falls.

Both are read off the same held-out prompts with the same noise, so that two evaluations differ by the policy alone and
their difference is paired over the prompts. What moved by less than its standard error did not move.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rl.advantage import TermWeight
from rl.evaluation import LOWER_IS_BETTER
from rl.report import draw_drag, filmstrip, side_by_side, write_mp4
from rl.run_folder import write_atomically
from rl.tracking import Tracking
from rollout.prompts import DragPrompt

log = logging.getLogger(__name__)
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Evaluation:
    """Of held-out prompts [P], NaN = not scored: the weighted training reward, and per canary a number that is larger
    the better."""

    step: int
    reward: np.ndarray
    canaries: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, step: int, metrics: Mapping[str, np.ndarray], terms: Mapping[str, TermWeight]) -> Evaluation:
        """From what `rl.heldout.measure` found. terms: those that are trained on; all other terms are canaries."""
        reward = sum(term.weight * metrics[f"reward/{name}"] for name, term in terms.items())
        watched = [n for n in metrics if n.startswith("canary/")]
        watched += [n for n in metrics if n.startswith("reward/") and n.removeprefix("reward/") not in terms]
        return cls(step, reward, {n: -metrics[n] if n in LOWER_IS_BETTER else metrics[n] for n in watched})


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """How many standard errors the mean of [P] moved, paired over the prompts that both scored; 0 with fewer than 2,
    and where a resumed run has other prompts than before."""
    if len(before) != len(after):
        return 0.0
    difference = (after - before).astype(np.float64)
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2 or not difference.any():
        return 0.0
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean() / max(error, 1e-12))


def alarm(evaluations: Sequence[Evaluation], patience: int) -> str | None:
    """What there is to say when the last `patience` times in a row the reward rose and one and the same canary fell."""
    if len(evaluations) <= patience:
        return None
    recent = evaluations[-patience - 1 :]
    steps, first, last = list(pairwise(recent)), recent[0], recent[-1]
    if not all(moved(a.reward, b.reward) > 1 for a, b in steps):
        return None
    worse = [
        f"{name} from {abs(_mean(first.canaries[name])):.3f} to {abs(_mean(last.canaries[name])):.3f}"
        for name in last.canaries
        if all(name in a.canaries and moved(a.canaries[name], b.canaries[name]) < -1 for a, b in steps)
    ]
    if not worse:
        return None
    return (
        f"step {last.step}: since step {first.step} the training reward rose from {_mean(first.reward):.3f} to "
        f"{_mean(last.reward):.3f} on held-out prompts while these got worse: {', '.join(worse)}"
    )


class HackWatch:
    """path: folder for what it remembers and draws. terms: those that are trained on. patience: evaluations in a row
    that make an alarm. stop: whether an alarm ends the training."""

    def __init__(self, path: Path, terms: Mapping[str, TermWeight], patience: int, stop: bool) -> None:
        self.path, self.terms, self.patience, self.stop = path, terms, patience, stop
        self._seen: dict[int, Evaluation] = {}

    @property
    def alarms(self) -> list[str]:
        seen = [self._seen[step] for step in sorted(self._seen)]
        return [text for n in range(len(seen)) if (text := alarm(seen[: n + 1], self.patience))]

    def resume(self, step: int) -> None:
        """Reads back what was seen up to this step."""
        self._seen = {}
        if self._memory.exists():
            for line in self._memory.read_text().splitlines():
                record = json.loads(line)
                if record["step"] <= step:
                    canaries = {name: np.array(values, np.float32) for name, values in record["canaries"].items()}
                    seen = Evaluation(record["step"], np.array(record["reward"], np.float32), canaries)
                    self._seen[seen.step] = seen

    def knows(self, step: int) -> bool:
        return step in self._seen

    def stops(self, step: int) -> bool:
        """Whether the training was to end after this step."""
        seen = [self._seen[s] for s in sorted(self._seen) if s <= step]
        return self.stop and bool(seen) and seen[-1].step == step and alarm(seen, self.patience) is not None

    def reward(self, step: int) -> float:
        """Mean weighted training reward of the held-out prompts at a step that was looked at; NaN: nothing scored."""
        return _mean(self._seen[step].reward)

    def look(self, step: int, metrics: Mapping[str, np.ndarray], tracking: Tracking) -> bool:
        """Takes in an evaluation, writes it down, warns; True where the training should stop."""
        known = step in self._seen
        seen = self._seen[step] = Evaluation.of(step, metrics, self.terms)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._memory, "".join(_line(self._seen[s]) for s in sorted(self._seen)))
        means = {f"heldout/{name}": _mean(values) for name, values in metrics.items()}
        tracking.log({**means, "heldout/weighted_reward": _mean(seen.reward)}, step)
        text = alarm([self._seen[s] for s in sorted(self._seen) if s <= step], self.patience)
        if text and not known:
            log.warning("hack watch: %s", text)
            tracking.tag("hack_alarm", text)
        return bool(text) and self.stop

    def draw(self, step: int, metrics: Mapping[str, np.ndarray], film: Callable[[int], tuple[DragPrompt, np.ndarray]],
             tracking: Tracking, fps: float) -> None:  # fmt: skip
        """A histogram per term, and the videos at QUANTILES of the reward. film: prompt and video [T, H, W, 3] of the
        i-th prompt."""
        name = f"step_{step:06d}"
        path = self.path / f"{name}_histograms.png"
        scores = {n.removeprefix("reward/"): values for n, values in metrics.items() if n.startswith("reward/")}
        histograms({n: values[np.isfinite(values)] for n, values in scores.items()}).savefig(path, dpi=120)
        tracking.artifact(path, "histograms")
        reward = self._seen[step].reward
        order = [int(i) for i in np.argsort(reward) if np.isfinite(reward[i])]
        if not order:
            return
        rows = []
        for q in QUANTILES:
            i = order[round(q * (len(order) - 1))]
            prompt, video = film(i)
            rows.append((f"{100 * q:.0f} %: {reward[i]:.2f}", draw_drag(video, prompt.tracks, 192)))
        path = write_mp4(self.path / f"{name}_quantiles.mp4", side_by_side([video for _, video in rows]), fps)
        tracking.log_video("reward_quantiles", path, step)
        tracking.log_strip("reward_quantiles", filmstrip(rows), step)

    def summary(self) -> dict[str, Any]:
        return {"evaluations": len(self._seen), "alarms": self.alarms}

    @property
    def _memory(self) -> Path:
        return self.path / "evaluations.jsonl"


def histograms(scores: Mapping[str, np.ndarray]) -> Figure:
    """One panel per term, of its scores over the prompts."""
    figure = Figure((3.2 * max(1, len(scores)), 2.6), layout="constrained")
    for axes, (name, values) in zip(np.ravel(figure.subplots(1, max(1, len(scores)))), scores.items()):
        axes.hist(values, bins=20, color="#4c78a8")
        axes.set_title(f"{name}: {_mean(values):.3f}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _line(seen: Evaluation) -> str:
    def plain(values: np.ndarray) -> list[float | None]:
        return [float(v) if np.isfinite(v) else None for v in values]

    canaries = {name: plain(values) for name, values in seen.canaries.items()}
    return json.dumps({"step": seen.step, "reward": plain(seen.reward), "canaries": canaries}) + "\n"


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
