"""What is wrong with a reward, found on a fixed battery before anybody spends GPU days on it.

`examine` scores the battery with one term; `diagnose` turns what all terms said into verdicts, about each term alone
and about the weighted mix of the training terms, which is what a policy would learn to please.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rewards.battery import HACKS, SHIFTS, Stage, batch_of
from rewards.contract import RewardBatch, RewardError, RewardOutput, as_output
from rewards.terms import Term, policy_fault

MIX = "mix"
LADDER = ("truth", *SHIFTS)
ENTRIES = (*LADDER, *HACKS)
CHECKS = ("runs", "range", "repeatable", "batch", "monotone", "hacks", "noise", "speed", "overlap")
SAME = 1e-4
"""Largest difference, as a share of the range, between two scores that count as the same."""


@dataclass
class Limits:
    """Where a verdict turns.

    margin: share of the range by which the mix must place every hack below the truth; least: the same for a hack that
    is accepted with a reason. noise: largest share of the spread inside a group that may be noise. slow_ms: per video.
    redundant: rank correlation with another term from which on a term says nothing new. opposed: the one below which
    the two work against each other.
    """

    margin: float
    least: float
    noise: float
    slow_ms: float
    redundant: float
    opposed: float


@dataclass(frozen=True)
class Examination:
    """What one term said of S stages.

    scores: float32 [S, E], of ENTRIES; group: float32 [S, L, R], of `Stage.group`; both as shares of the range, 0 the
    worst, a policy fault at 0 as in a training, NaN = not scored. lowest, highest: of the raw scores, of the frames
    where frames are scored. unscored: share of NaN. repeat: largest difference, as a share of the range, between the
    scores of a clip that is scored twice; company: of one that is scored alone and among others. ms: per video, wall
    clock. fault: what the term raised, "" if nothing; the other fields are then NaN.
    """

    scores: np.ndarray
    group: np.ndarray
    lowest: float = np.nan
    highest: float = np.nan
    unscored: float = np.nan
    repeat: float = np.nan
    company: float = np.nan
    ms: float = np.nan
    fault: str = ""


@dataclass(frozen=True)
class Verdict:
    """subject: name of a term, or MIX. check: one of CHECKS, or the hack that the mix rewards. text: one line.
    status "accepted": it would fail, and the user has given the reason why that is as it should be.
    """

    subject: str
    check: str
    status: Literal["pass", "warn", "fail", "accepted"]
    text: str


def examine(term: Term, stages: Sequence[Stage]) -> Examination:
    """Scores every stage, and the battery of the first one thrice more: as it is, clip by clip, and in company.

    Batches are read-only. A training term sees no true video and a canary does, as in a training.
    Raises RewardError where there are fewer than two stages.
    """
    if len(stages) < 2:
        raise RewardError(f"a reward is examined on at least 2 stages, not {len(stages)}")
    size, replicas = len(ENTRIES), stages[0].shifted.shape[:2]
    scores = np.full((len(stages), size), np.nan, np.float32)
    group = np.full((len(stages), *replicas), np.nan, np.float32)
    low, high = term.range
    outputs, seconds = [], 0.0
    try:
        for s, stage in enumerate(stages):
            clips = [*stage.battery().values(), *np.concatenate(stage.group())]
            batch = _batch(term, [stage] * len(clips), clips)
            started = time.perf_counter()
            outputs.append(_judge(term, batch))
            seconds += time.perf_counter() - started
            share = (np.where(policy_fault(batch), low, outputs[-1].score) - low) / (high - low)
            scores[s], group[s] = share[:size], share[size:].reshape(replicas)
        own, other = (list(stage.battery().values()) for stage in stages[:2])
        once, twice = (_judge(term, _batch(term, stages[:1] * size, own)).score for _ in range(2))
        alone = np.concatenate([_judge(term, _batch(term, stages[:1], [video])).score for video in own])
        both = [video for pair in zip(other, own) for video in pair]
        among = _judge(term, _batch(term, [stages[1], stages[0]] * size, both)).score[1::2]
    except Exception as error:  # a user's reward may raise anything; the verdict says what
        return Examination(scores, group, fault=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    unscored = np.isnan(np.concatenate([o.score for o in outputs]))
    values = np.concatenate([np.ravel(o.score if o.frame_score is None else o.frame_score) for o in outputs])
    return Examination(
        scores,
        group,
        lowest=float(np.nanmin(values, initial=np.inf)),
        highest=float(np.nanmax(values, initial=-np.inf)),
        unscored=float(unscored.mean()),
        repeat=_difference(once, twice) / (high - low),
        company=max(_difference(once, alone), _difference(once, among)) / (high - low),
        ms=1000 * seconds / len(unscored),
    )


def mix_of(terms: Sequence[Term], found: Mapping[str, Examination]) -> Examination | None:
    """The weighted mean of the training terms, a negative weight turning a term around; None where there is none. As in
    a training, a term without a score for a clip is left out there."""
    parts = [(t.weight, found[t.name]) for t in terms if t.role == "train" and t.weight and not found[t.name].fault]
    if not parts:
        return None
    weights = np.array([weight for weight, _ in parts], np.float32)

    def mean(of: str) -> np.ndarray:
        scores = np.stack([getattr(e, of) for _, e in parts], -1)
        total = (np.isfinite(scores) * abs(weights)).sum(-1)
        return np.where(total > 0, np.nansum(scores * weights, -1) / np.maximum(total, 1e-12), np.nan)

    return Examination(mean("scores"), mean("group"))


def diagnose(
    terms: Sequence[Term],
    found: Mapping[str, Examination],
    limits: Limits,
    accept: Mapping[str, Mapping[str, str]],
) -> list[Verdict]:
    """The verdicts on the terms, in their order, and on their mix.

    found: by name, of these terms and of any others that they are to be compared with. accept: by subject and check
    (of the mix also by hack), the reason why a failure is as it should be.
    Raises what `check_accept` raises.
    """
    check_accept(terms, accept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means over clips that no term scored are NaN, as they should
        verdicts = [verdict for term in terms for verdict in _of_term(term, found, limits)]
        if mix := mix_of(terms, found):
            verdicts += _of_mix(mix, limits, accept.get(MIX, {}))
    return [
        replace(v, status="accepted", text=f"{v.text}; accepted: {accept[v.subject][v.check]}")
        if v.status == "fail" and v.check in CHECKS and v.check in accept.get(v.subject, {})
        else v
        for v in verdicts
    ]


def check_accept(terms: Sequence[Term], accept: Mapping[str, Mapping[str, str]]) -> None:
    """Raises RewardError naming a subject or check in `accept` that does not exist."""
    names = (MIX, *(term.name for term in terms))
    for subject, reasons in accept.items():
        for check in reasons:
            if subject not in names or check not in (*CHECKS, *HACKS):
                raise RewardError(
                    f"accept.{subject}.{check}: a subject is one of {', '.join(names)}; "
                    f"a check is one of {', '.join((*CHECKS, *HACKS))}"
                )


def _of_term(term: Term, found: Mapping[str, Examination], limits: Limits) -> Iterator[Verdict]:
    e, (low, high) = found[term.name], term.range

    def verdict(check: str, text: str, fails: bool = False, warns: bool = False) -> Verdict:
        return Verdict(term.name, check, "fail" if fails else "warn" if warns else "pass", text)

    if e.fault:
        yield verdict("runs", e.fault, fails=True)
        return
    if e.unscored == 1:
        yield verdict("runs", "no clip got a score", fails=True)
        return
    partly = f"{e.unscored:.0%} of the clips got no score" if e.unscored else "every clip got a score"
    yield verdict("runs", partly, warns=e.unscored > 0)
    slack = SAME * (high - low)
    outside = e.lowest < low - slack or e.highest > high + slack
    yield verdict("range", f"{e.lowest:.3g}..{e.highest:.3g} of {low:g}..{high:g}", fails=outside)
    yield verdict("repeatable", f"a clip scored twice differs by {e.repeat:.1g} of the range", fails=e.repeat > SAME)
    alone = f"a clip alone and among others differs by {e.company:.1g} of the range"
    yield verdict("batch", alone, fails=e.company > max(SAME, 2 * e.repeat))
    floor = term.floor / (high - low)
    steps, ladder = _ladder(e)
    blind = " (blind to the drag's error)" if abs(steps.sum()) <= floor else ""
    yield verdict("monotone", ladder + blind, fails=not steps.max() <= floor)
    gain = _gain(e)
    better = [f"{name} {value:+.2f}" for name, value in gain.items() if value > floor]
    blind_to = [name for name, value in gain.items() if abs(value) <= floor]
    text = f"above the truth: {', '.join(better) or 'none'}; like the truth: {', '.join(blind_to) or 'none'}"
    yield verdict("hacks", text, warns=bool(better))
    share, sd = noise(e.group)
    text = f"{share:.0%} of the spread in a group, sd {sd * (high - low):.3g}"
    if low_floor := floor < sd:
        text += f"; floor {term.floor:g} lets it count, set floor: {4 * sd * (high - low):.2g}"
    yield verdict("noise", text, fails=share > limits.noise, warns=low_floor)
    yield verdict("speed", f"{e.ms:.3g} ms per video", warns=e.ms > limits.slow_ms)
    close = {name: _correlation(e, o) for name, o in found.items() if name != term.name and not o.fault}
    close = {name: rho for name, rho in close.items() if np.isfinite(rho)}
    odd = any(rho > limits.redundant or rho < limits.opposed for rho in close.values())
    yield verdict("overlap", ", ".join(f"{n} {rho:+.2f}" for n, rho in close.items()) or "no other term", warns=odd)


def _of_mix(e: Examination, limits: Limits, reasons: Mapping[str, str]) -> Iterator[Verdict]:
    steps, ladder = _ladder(e)
    yield Verdict(MIX, "monotone", "pass" if steps.max() < 0 else "fail", ladder)
    gain = dict(sorted(_gain(e).items(), key=lambda item: -item[1]))
    rewarded = {name: value for name, value in gain.items() if not value <= -limits.margin}
    for name, value in rewarded.items():
        accepted = name in reasons and value <= -limits.least
        text = f"{value:+.2f} from the truth ({HACKS[name]})" + (f"; accepted: {reasons[name]}" if accepted else "")
        yield Verdict(MIX, name, "accepted" if accepted else "fail", text)
    rest = [name for name in gain if name not in rewarded]
    text = f"at least {limits.margin:g} below the truth: {', '.join(rest) or 'none'}"
    yield Verdict(MIX, "hacks", "pass" if rest else "fail", text)
    share, sd = noise(e.group)
    text = f"{share:.0%} of the spread in a group, sd {sd:.3g}"
    yield Verdict(MIX, "noise", "pass" if share <= limits.noise else "fail", text)


def noise(group: np.ndarray) -> tuple[float, float]:
    """How much of the spread inside a group [S, L, R] is between clips that are equally good, and its deviation.

    One-way analysis of variance: the mean variance over the R clips of a level against that over all L R clips. A group
    without any spread is all noise: nothing can be learnt from it.
    """
    within = np.nanmean(np.nanvar(group, axis=2, ddof=1))
    total = np.nanmean(np.nanvar(group.reshape(len(group), -1), axis=1, ddof=1))
    return float(min(within / total, 1)) if total > 1e-12 else 1.0, float(np.sqrt(within))


def _batch(term: Term, stages: Sequence[Stage], videos: Sequence[np.ndarray]) -> RewardBatch:
    canary = term.role == "canary"
    truth = np.stack([stage.drawn["truth"] for stage in stages]) if canary else None
    drags = [stage.drag for stage in stages]
    return batch_of(drags, videos, truth=truth, split="heldout" if canary else "train")


def _judge(term: Term, batch: RewardBatch) -> RewardOutput:
    """In any range: what lies outside the declared one is a verdict, not an error."""
    return as_output(term.fn(batch), batch, term.name, (-np.inf, np.inf))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest, infinite where one of them was scored and the other not."""
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return float(np.nan_to_num(np.abs(a[differ] - b[differ]), nan=np.inf).max(initial=0))


def _ladder(e: Examination) -> tuple[np.ndarray, str]:
    """The steps of the mean score from the truth to the largest shift, and a text that shows them."""
    rungs = e.scores[:, : len(LADDER)]
    means, ordered = np.nanmean(rungs, 0), np.mean(np.diff(rungs) < 0)
    return np.diff(means), f"{' > '.join(f'{m:.3f}' for m in means)}, falling in {ordered:.0%} of the steps"


def _gain(e: Examination) -> dict[str, float]:
    """By hack, how far its mean score lies above that of the truth."""
    above = np.nanmean(e.scores - e.scores[:, :1], 0)
    return dict(zip(HACKS, map(float, above[len(LADDER) :])))


def _correlation(a: Examination, b: Examination) -> float:
    """Spearman's over the clips of a stage, mean over the stages; NaN where either does not tell them apart."""
    found = []
    for rows in zip(a.scores, a.group, b.scores, b.group):
        x, y = np.append(rows[0], rows[1]), np.append(rows[2], rows[3])
        both = np.isfinite(x) & np.isfinite(y)
        if both.any() and np.ptp(x[both]) > SAME and np.ptp(y[both]) > SAME:
            found.append(np.corrcoef(_ranks(x[both]), _ranks(y[both]))[0, 1])
    return float(np.mean(found)) if found else np.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
