"""The hack watch on numbers, and on a real training whose reward and canary pull against each other."""

from __future__ import annotations

import json

import mlflow
import numpy as np
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from rl.advantage import TermWeight
from rl.hack_watch import Evaluation, HackWatch, alarm, moved
from rl.tracking import Tracking

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=64)


def evaluations(*means: tuple[float, float], noise: float = 0.05) -> list[Evaluation]:
    """64 prompts that differ by far more than any two evaluations of one of them."""
    noises = [noise * RNG.normal(size=(2, 64)) for _ in means]
    return [Evaluation(step, BASE + reward + a, {"canary/psnr_db": BASE + canary + b, "canary/still": BASE})
            for step, ((reward, canary), (a, b)) in enumerate(zip(means, noises))]  # fmt: skip


def test_a_move_is_paired_over_the_prompts_and_counted_in_standard_errors():
    shift = 0.05 * RNG.normal(size=64)
    assert moved(BASE, BASE + 0.1 + shift) > 5 and moved(BASE, BASE - 0.1 + shift) < -5
    assert abs(moved(BASE, RNG.permutation(BASE) + 0.1)) < 5, "the negative control: without the pairing it drowns"
    assert moved(BASE, BASE) == moved(BASE[:1], BASE[:1] + 1) == moved(BASE[:9], BASE + 1) == 0
    holes = np.where(np.arange(64) < 20, np.nan, BASE)
    assert moved(holes, BASE + 0.1 + shift) > 3 and moved(np.full(64, np.nan), BASE) == 0


def test_an_alarm_needs_the_reward_to_rise_and_one_canary_to_fall_often_enough():
    hacked = evaluations((0, 0), (0.1, -0.1), (0.2, -0.2), (0.3, -0.3))
    text = alarm(hacked, 3)
    assert (
        text
        and "step 3: since step 0 the training reward rose" in text
        and "got worse: canary/psnr_db from" in text
        and "still" not in text
    )
    assert alarm(hacked[:3], 3) is None and alarm(hacked[:3], 2)
    assert alarm(evaluations((0, 0), (0.1, 0.1), (0.2, 0.2), (0.3, 0.3)), 1) is None, "both get better"
    assert alarm(evaluations((0, 0), (-0.1, -0.1), (-0.2, -0.2)), 1) is None, "both get worse: no hack"
    assert alarm(evaluations((0, 0), (0.1, -0.1), (0.2, 0.0), (0.3, -0.1)), 2) is None, "it recovered in between"
    assert alarm(evaluations((0, 0), (0.0, 0.0), (0.0, 0.0)), 2) is None


def test_a_canary_is_every_term_that_is_not_trained_on_the_larger_the_better():
    metrics = {"reward/mine": np.float32([0.5, 1]), "reward/watch": np.float32([0.1, 0.2]), "sharpness": np.ones(2),
               "canary/track_error_px": np.float32([3, 4]), "canary/psnr_db": np.float32([20, 30])}  # fmt: skip
    seen = Evaluation.of(7, metrics, {"mine": TermWeight(2.0, 0.1)})
    assert seen.reward.tolist() == [1, 2] and set(seen.canaries) == {
        "canary/track_error_px", "canary/psnr_db", "reward/watch"}  # fmt: skip
    assert seen.canaries["canary/track_error_px"].tolist() == [-3, -4]


def test_a_resumed_watch_remembers_what_lies_before_the_checkpoint(tmp_path):
    terms = {"mine": TermWeight(1.0, 0.1)}
    tracking = Tracking.open(None, "x", params={}, tags={}, required=False, spool=tmp_path)
    watch = HackWatch(tmp_path / "watch", terms, 2, True)
    stops = []
    for seen in evaluations((0, 0), (0.1, -0.1), (0.2, -0.2), (0.3, -0.3)):
        found = {"reward/mine": seen.reward, **seen.canaries, "canary/hole": np.full(64, np.nan)}
        stops.append(watch.look(10 * seen.step, found, tracking))
    assert stops == [False, False, True, True] and len(watch.alarms) == 2
    assert [watch.stops(step) for step in (0, 10, 20, 25, 30)] == [False, False, True, False, True]
    again = HackWatch(tmp_path / "watch", terms, 2, False)
    again.resume(20)
    assert again.summary() == {"evaluations": 3, "alarms": watch.alarms[:1]} and not again.stops(20)
    assert again.look(30, found, tracking) is False and len(again.alarms) == 2, "without `stop` it only warns"


@pytest.fixture(scope="module")
def hacked(small_run, tmp_path_factory):  # noqa: F811
    """A training that makes videos brighter, watched by a canary that likes them dark."""
    home = tmp_path_factory.mktemp("hacked")
    (home / "dark.py").write_text("def judge(batch):\n    return 1 - batch.video.mean((1, 2, 3, 4)) / 255\n")
    common = [*small_run, "learner.beta=0", "learner.ema=0", "learner.lr=0.02", "learner.freeze=[]",
              "rollout.explore=coarse", "rollout.amplitude=2", "rollout.group_size=8", "train.iterations=4",
              "evaluate.prompts=4"]  # fmt: skip
    watch = [f"+rewards.dark={{fn: {home}/dark.py:judge, role: canary, weight: 0}}", "evaluate.every=1",
             "evaluate.patience=2"]  # fmt: skip
    store = f"tracking.uri=sqlite:///{home / 'mlflow.db'}"
    for _ in range(2):  # the second time it has ended already, and does not train on
        assert run_job("train", *common, *watch, "evaluate.stop=true", store, f"run_dir={home / 'stopped'}") == 0
    assert run_job("train", *common, *watch, "tracking.uri=null", f"run_dir={home / 'warned'}") == 0
    assert run_job("train", *common, "tracking.uri=null", f"run_dir={home / 'plain'}") == 0
    return home


def test_a_hacked_training_is_stopped_and_says_why(hacked):
    summary = json.loads((hacked / "stopped/summary.json").read_text())
    watch = summary["hack_watch"]
    step = watch["stopped_at"]
    assert 2 <= step < 4 and summary["iterations"] == step and watch["evaluations"] == step + 1
    assert "the training reward rose" in watch["alarms"][0] and "reward/dark from" in watch["alarms"][0]
    assert (hacked / f"stopped/checkpoints/step_{step:06d}/policy.safetensors").exists()
    client = mlflow.MlflowClient(f"sqlite:///{hacked / 'mlflow.db'}")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.data.tags["hack_alarm"] == watch["alarms"][-1]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "heldout/reward/dark")] == [*range(step + 1)]
    videos = {a.path for a in client.list_artifacts(run.info.run_id, f"videos/step_{step:06d}")}
    assert f"videos/step_{step:06d}/reward_quantiles.mp4" in videos
    assert {a.path for a in client.list_artifacts(run.info.run_id, "histograms")} == {
        f"histograms/step_{s:06d}_histograms.png" for s in range(1, step + 1)}  # fmt: skip


def test_watching_changes_nothing_about_the_training(hacked):
    summary = json.loads((hacked / "warned/summary.json").read_text())
    assert summary["iterations"] == 4 and summary["hack_watch"]["stopped_at"] is None
    assert summary["hack_watch"]["evaluations"] == 5 and len(summary["hack_watch"]["alarms"]) >= 1
    last = "checkpoints/step_000004/policy.safetensors"
    watched, plain = (load_file(hacked / run / last) for run in ("warned", "plain"))
    assert all((watched[name] == plain[name]).all() for name in plain)
    assert json.loads((hacked / "plain/summary.json").read_text())["hack_watch"]["evaluations"] == 2
