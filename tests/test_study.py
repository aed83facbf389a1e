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
PLAN = order.Plan(stages=(ARMS,), tuning_s=1.0, points=(1.0, 2.0), dev=2, heldout=2, seeds=(0, 1))
BASE = {"track_error_px": 2.0, "canary/track_error_px": 4.0, "canary/psnr_db": 25.0, "sharpness": 0.5}


def pretended(one: trial.Trial, base: dict | None) -> dict:
    """A run whose gain is highest at lr 1e-2. Of it, chance gives the control more the larger the steps."""
    gain = 0.8 / (1 + abs(math.log(one.lr / 1e-2)))
    if one.permute:
        gain *= min(1.0, one.lr / 1e-2)
    curve = [{"cpu_s": 0.0, "iterations": 0, **(base or BASE)}]
    for at in one.points:
        errors = {name: BASE[name] * (1 - gain * at / one.points[-1]) for name in order.TRACKERS}
        curve.append({"cpu_s": at, "iterations": 3, **BASE, **errors})
    return {"trial": asdict(one), "curve": curve, "kl": 0.1}


def test_the_search_finds_where_a_run_is_furthest_above_its_control(tmp_path):
    found = order.search(store := order.Store(tmp_path / "study.jsonl", pretended), PLAN, "trunk", "tangent")
    # At 1e-2 the gain is highest, but the control has it too.
    assert found.lr == 3.2e-3 and {one["trial"]["lr"] for one in store.runs} == {1e-3, 3.2e-3, 1e-2}
    assert [one["trial"]["permute"] for one in store.runs] == [False, True] * 3


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path):
    path, asked = tmp_path / "study.jsonl", []

    def counted(one, base):
        if len(asked) == 12:
            raise KeyboardInterrupt
        asked.append(one.key)
        return pretended(one, base)

    with pytest.raises(KeyboardInterrupt):
        order.study(order.Store(path, counted), PLAN)
    assert len(path.read_text().splitlines()) == 12
    order.study(again := order.Store(path, pretended), PLAN)
    keys = [json.dumps(one["trial"]) for one in again.runs]
    assert len({*keys}) == len(keys) and keys[:12] == asked
    order.study(order.Store(path, lambda *_: pytest.fail("a run that is there was repeated")), PLAN)


def test_every_arm_is_searched_from_the_same_settings_and_measured_on_prompts_that_the_search_never_saw(tmp_path):
    order.study(store := order.Store(tmp_path / "study.jsonl", pretended), PLAN)
    trials = [one["trial"] for one in store.runs]
    first = {t["select"]: t for t in reversed(trials) if t["split"] == "dev"}
    assert first["trunk"]["lr"] == first["all"]["lr"] and first["trunk"]["stiffness"] == first["all"]["stiffness"]
    heldout = [t for t in trials if t["split"] == "heldout"]
    assert len(heldout) == 2 * 2 * 2 and {t["seed"] for t in heldout}.isdisjoint(t["seed"] for t in trials[:3])


def test_the_report_ranks_arms_and_prices_what_they_gain_above_their_controls(tmp_path):
    order.study(store := order.Store(tmp_path / "study.jsonl", pretended), PLAN)
    text = report.write_report(store.runs, tmp_path)
    arms = report.by_arm(store.runs)
    gain = 0.8 / (1 + math.log(1e-2 / 3.2e-3))
    net = gain * (1 - 0.32)
    assert report.price(arms["trunk + tangent"], 0.5 * net) == pytest.approx(1.0)
    assert report.price(arms["trunk + tangent"], 1.01 * net) == math.inf
    assert (tmp_path / "study.png").stat().st_size > 1000 and "| trunk + tangent |" in text
    assert "| net gain per CPU-s, point 1, trunk + tangent / all + white | 1 | >= 3 | no |" in text


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
