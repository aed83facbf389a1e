"""The study and the signal table, at a tiny size; and their arithmetic on runs made up here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from jobs_cases import small_run  # noqa: F401  (a fixture)

from benchmarks import signal
from benchmarks.study import order, report, trial

ARMS = (("trunk", "tangent"), ("all", "white"))
PLAN = order.Plan({ARMS[0]: 2, ARMS[1]: 3}, (1.0, 2.0), prompts=1, dev=2, heldout=2, tuning=(10, 11), workers=2)
BASE = {"track_error_px": 2.0, "canary/track_error_px": 4.0, "canary/psnr_db": 25.0, "sharpness": 0.5}


def pretended(one: trial.Trial, base: dict | None) -> dict:
    """A run whose gain is highest at lr 3.2e-3 and stiffness 1; seed 10 by itself likes 1e-2. White noise gains what
    its control does, but for chance; the controls of tangent do harm."""
    gain = 0.8 / (1 + abs(math.log(one.lr / 3.2e-3)) + abs(math.log(one.stiffness)))
    if one.seed == 10 and one.lr == 1e-2:
        gain += 0.2
    if one.explore == "white":
        gain += (-0.01, 0.01, 0.0)[one.seed % 3] * (not one.permute)
    elif one.permute:
        gain = -3.0
    curve = [{"cpu_s": 0.0, "iterations": 0, **(base or BASE)}]
    for at in one.points:
        errors = {name: BASE[name] * (1 - gain * at / one.points[-1]) for name in order.TRACKERS}
        curve.append({"cpu_s": at, "iterations": 3, **BASE, **errors})
    return {"trial": asdict(one), "curve": curve, "kl": 0.1}


def test_the_search_finds_the_settings_that_are_best_over_the_seeds(tmp_path):
    found = order.search(store := order.Store(tmp_path / "study.jsonl", pretended), PLAN, "trunk", "tangent")
    assert (found.lr, found.stiffness) == (3.2e-3, 1.0)
    tried = [one["trial"] for one in store.runs if one["trial"]["seed"] == 10]
    runs, controls = (
        [(t["lr"], t["stiffness"]) for t in tried if t["permute"] is permuted] for permuted in (False, True)
    )
    assert runs == [(1e-3, 4.0), (3.2e-3, 4.0), (1e-2, 4.0), (3.2e-3, 16.0), (3.2e-3, 1.0), (3.2e-3, 0.25)]
    assert controls == [(1e-3, 4.0), (3.2e-3, 4.0), (3.2e-3, 1.0)]  # where the gain alone does not rule it out


def test_the_search_does_not_take_for_learning_what_any_large_step_gains(tmp_path):
    def confounded(one, base):
        gain = 0.3 + 0.1 * math.log10(min(one.lr, 3.2e-3) / 1e-3)
        found = pretended(one, base)
        if one.permute:
            gain = 0.0 if one.lr <= 1e-3 else gain - 0.05
        found["curve"][-1] |= {name: BASE[name] * (1 - gain) for name in order.TRACKERS}
        return found

    def harmless(one, base):
        return confounded(replace(one, lr=1e-3) if one.permute else one, base) | {"trial": asdict(one)}

    found = {run: order.search(order.Store(tmp_path / run.__name__, run), PLAN, "trunk", "tangent").lr
             for run in (confounded, harmless)}  # fmt: skip
    assert found[confounded] == 1e-3 < found[harmless]


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path):
    path, asked = tmp_path / "study.jsonl", []

    def counted(one, base):
        if len(asked) == 12:
            raise KeyboardInterrupt
        asked.append(one.key)
        return pretended(one, base)

    with pytest.raises(KeyboardInterrupt):
        order.study_arm(order.Store(path, counted), PLAN, *ARMS[0])
    assert len(path.read_text().splitlines()) == 12
    order.study_arm(again := order.Store(path, pretended), PLAN, *ARMS[0])
    keys = [json.dumps(one["trial"]) for one in again.runs]
    assert len({*keys}) == len(keys) and keys[:12] == asked
    order.study_arm(order.Store(path, lambda *_: pytest.fail("a run that is there was repeated")), PLAN, *ARMS[0])


@pytest.fixture
def studied(tmp_path):
    """The store of all arms' runs."""
    for arm in ARMS:
        order.study_arm(store := order.Store(tmp_path / "study.jsonl", pretended), PLAN, *arm)
    return store


def test_every_arm_is_searched_from_the_same_settings_and_measured_on_prompts_that_the_search_never_saw(studied):
    trials = [one["trial"] for one in studied.runs]
    first = {t["select"]: t for t in reversed(trials) if t["split"] == "dev"}
    assert first["trunk"]["lr"] == first["all"]["lr"] and first["trunk"]["stiffness"] == first["all"]["stiffness"]
    heldout = [t for t in trials if t["split"] == "heldout"]
    assert len(heldout) == 2 * (2 + 3) and {t["seed"] for t in heldout}.isdisjoint(PLAN.tuning)


def test_the_report_ranks_arms_and_prices_what_they_gain(studied, tmp_path):
    text = report.write_report(studied.path, PLAN)
    arms = report.by_arm(studied, PLAN)
    assert [*arms] == ["trunk + tangent", "all + white"] and [
        report.shown(arm.learnt[:, -1]) for arm in arms.values()
    ] == [True, False]
    best = arms["trunk + tangent"]
    assert report.price(best.seconds, best.learnt, 0.4) == pytest.approx(1.0)
    assert report.price(best.seconds, best.learnt, 0.81) == math.inf
    assert (tmp_path / "study.png").stat().st_size > 1000
    assert "| trunk + tangent | 0.0032 | 1 | 2 |" in text and "(not shown)" in text
    figures = {one["figure"]: one["measured"] for one in report.figures(arms)}
    assert all(name in text for name in figures)
    # Nothing is learnt with white noise at any lr and stiffness, so that it stays at the first ones.
    gained = figures["gained per CPU-s at 1 s, trunk + tangent / all + white"]
    assert gained == pytest.approx(1 + math.log(3.2) + math.log(4))
    # At 1 s white noise has learnt -0.005, 0.005 and 0 more than its control: two standard errors of the mean.
    least = figures["learnt per CPU-s at 1 s, trunk + tangent / all + white, at least"]
    assert least == pytest.approx(0.4 / (2 * 0.005 / 3**0.5))
    assert figures["CPU-s until 0.3 is learnt, all + white / trunk + tangent, at least"] == pytest.approx(2 / 0.75)


@pytest.mark.slow
def test_arms_are_studied_side_by_side_in_processes_of_their_own(tmp_path):
    """With every run there already but one, which a process makes for real."""
    path = tmp_path / "study.jsonl"
    for arm in ARMS:
        order.study_arm(store := order.Store(path, pretended), PLAN, *arm)
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in lines[:-1]))
    order.study(path, PLAN)
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["trial"] for one in again] == [one["trial"] for one in store.runs]
    assert again[-1]["curve"][-1]["cpu_s"] >= 2.0


@pytest.fixture(scope="module")
def small(small_run):  # noqa: F811
    return [o for o in small_run if not o.startswith(("rollout.", "seed="))]


def test_a_trial_trains_for_its_cpu_seconds_and_counts_no_evaluation(small):
    one = trial.Trial("trunk", "white", 1e-3, 4.0, 2.0, 1, 3, 0, (0.05, 0.1), "heldout", 2)
    found = trial.run(one, None, *small)
    spent = [at["cpu_s"] for at in found["curve"]]
    assert (
        spent[0] == 0
        and 0.05 <= spent[1] <= spent[2]
        and all(np.isfinite(at["track_error_px"]) for at in found["curve"])
    )
    assert json.loads(json.dumps(found["trial"])) == json.loads(one.key)
    assert trial.run(replace(one, points=(0.01,)), found["curve"][0], *small)["curve"][0] == found["curve"][0]


@pytest.mark.parametrize(("explore", "dimensions"), [("tangent", 4), ("white", 256), ("coarse", 16)])
def test_the_penalty_is_as_stiff_as_the_gradient_is_long_in_the_subspace(small, explore, dimensions):
    training = trial.Training(trial.Trial("trunk", explore, 1e-3, 4.0, 2.0, 1, 3, 0, (1.0,), "dev", 0), *small)
    _, replays = training.bare.rollout(0)
    coordinates = replays[0][0].actions[0].coordinates[0, 0]
    assert training.bare.learner.beta == 4 / math.sqrt(dimensions) and coordinates.numel() == dimensions


def test_the_cosine_of_independent_estimates_is_the_share_of_the_signal():
    rng = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(20_000, generator=rng), dim=0)
    for noise, expected in ((1.0, 0.5), (3.0, 0.1)):
        estimates = [true + noise * torch.randn(20_000, generator=rng) / 20_000**0.5 for _ in range(16)]
        cosine, error = signal.cosines(estimates)
        assert cosine == pytest.approx(expected, abs=5 * error) and error < 0.02
    cosine, error = signal.cosines([torch.randn(20_000, generator=rng) for _ in range(16)])
    assert abs(cosine) < 5 * error


def test_the_signal_of_a_setting_is_measured(small):
    rows = signal.measure("shipped", None, [("trunk", "tangent")], 3, *small)
    assert -1 <= rows[0]["cosine"] <= 1 and rows[0]["cpu_s"] > 0
