"""The training job as a user runs it, on real parts at the smallest size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from policy.wan_formats import WanTransformer3DModel


def weights(run, step: int) -> dict:
    return load_file(run / f"checkpoints/step_{step:06d}/policy.safetensors")


def equal(a: dict, b: dict) -> bool:
    return all((a[k] == b[k]).all() for k in a)


@pytest.fixture(scope="module")
def three_iterations(small_run, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("three") / "run"
    store = f"tracking.uri=sqlite:///{run.parent / 'mlflow.db'}"
    assert run_job("train", *small_run, f"run_dir={run}", store, "train.iterations=3") == 0
    return run


def test_a_run_leaves_everything_that_its_folder_promises(three_iterations):
    run = three_iterations
    summary = json.loads((run / "summary.json").read_text())
    held = summary["heldout"]
    assert held["prompts"] == 3 and summary["iterations"] == 3
    for row in (held["track_error_px"], held["canary"]["track_error_px"], held["canary"]["quality"]["psnr_db"]):
        assert set(row) == {"base", "tuned", "ci95"} and len(row["ci95"]) == 2
    assert {"total", "rollout", "reward", "learn", "sync"} <= set(summary["seconds"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["train/ratio_deviation"] <= 1e-5 for line in lines)
    assert all(line["train/grad_norm"] > 0 for line in lines)
    for part in (
        "config.yaml",
        "report.html",
        "checkpoints/step_000003/manifest.json",
        "checkpoints/step_000003/learner",
    ):
        assert (run / part).exists(), part
    assert len(list((run / "videos").glob("*.mp4"))) == 1
    assert not equal(weights(run, 1), weights(run, 3))


def test_mlflow_holds_the_run_with_its_curves_videos_and_configuration(three_iterations):
    summary = json.loads((three_iterations / "summary.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{three_iterations.parent / 'mlflow.db'}")
    stored = client.get_run(summary["mlflow_run_id"])
    assert stored.info.status == "FINISHED"
    assert stored.data.params["rollout.select"] == "trunk"
    assert [m.step for m in client.get_metric_history(stored.info.run_id, "train/kl")] == [1, 2, 3]
    top = {a.path for a in client.list_artifacts(stored.info.run_id)}
    assert {"config", "videos", "report.html", "summary.json"} <= top


def test_a_run_that_is_continued_equals_one_that_was_never_interrupted(three_iterations, small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    for iterations in (2, 3):
        assert (
            run_job("train", *small_run, f"run_dir={run}", "tracking.uri=null", f"train.iterations={iterations}") == 0
        )
    assert equal(weights(run, 3), weights(three_iterations, 3))
    other = tmp_path / "other"
    assert run_job("train", *small_run, f"run_dir={other}", "tracking.uri=null", "train.iterations=3", "seed=1") == 0
    assert not equal(weights(other, 3), weights(three_iterations, 3))


def test_a_tuned_policy_is_registered_as_a_folder_that_diffusers_loads(small_run, tmp_path):  # noqa: F811
    run, store = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    more = (f"run_dir={run}", f"tracking.uri={store}", "tracking.register=drag", "train.iterations=1")
    assert run_job("train", *small_run, *more) == 0
    client = mlflow.MlflowClient(store)
    (version,) = client.search_model_versions("name = 'drag'")
    assert "held-out track error" in version.description
    folder = Path(mlflow.artifacts.download_artifacts(version.source, tracking_uri=store))
    assert {"config.json", "report.html", "summary.json"} < {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pth")]
    loaded, tuned = WanTransformer3DModel.from_pretrained(folder).state_dict(), weights(run, 1)
    assert tuned.keys() == loaded.keys() and equal(tuned, loaded)
    nodes = {name for name in client.get_run(version.run_id).data.metrics if name.endswith("/cpu_percent")}
    assert len(nodes) == 1
    assert run_job("train", *small_run, *more[:-2], "tracking.register=a/b") == 1


def test_advantages_of_the_wrong_members_teach_something_else(three_iterations, small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    more = (f"run_dir={run}", "tracking.uri=null", "experiment=control_permuted", "train.iterations=1")
    assert run_job("train", *small_run, *more) == 0
    assert not equal(weights(run, 1), weights(three_iterations, 1))


@pytest.mark.slow
@pytest.mark.parametrize("select, explore", [("video", "coarse"), ("frame", "white"), ("all", "white")])
def test_every_way_of_selecting_trains(small_run, tmp_path, select, explore):  # noqa: F811
    more = (f"rollout.select={select}", f"rollout.explore={explore}", "rollout.amplitude=1", "train.iterations=1")
    assert run_job("train", *small_run, *more, f"run_dir={tmp_path / 'run'}", "tracking.uri=null") == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["train/ratio_deviation"] <= 1e-5 and line["train/grad_norm"] > 0


@pytest.mark.slow
def test_every_option_of_the_objective_trains(small_run, tmp_path):  # noqa: F811
    more = ("learner.ratio_norm=true", "learner.advantage_std=batch", "learner.best_and_worst=1",
            "learner.kl_target=0.02", "learner.updates_per_rollout=2", "train.iterations=1")  # fmt: skip
    assert run_job("train", *small_run, *more, f"run_dir={tmp_path / 'run'}", "tracking.uri=null") == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["train/ratio_deviation"] <= 1e-5 and line["train/grad_norm"] > 0
    assert line["train/beta"] == 2.0 and line["train/kl"] > 0 and abs(line["train/ratio"] - 1) > 1e-9


@pytest.mark.slow
def test_a_fleet_of_ray_actors_trains_the_same_weights_bit_for_bit(three_iterations, small_run, ray_local, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    assert (
        run_job("train", *small_run, "cluster=local", f"run_dir={run}", "tracking.uri=null", "train.iterations=3") == 0
    )
    assert equal(weights(run, 3), weights(three_iterations, 3))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(three_iterations, small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "jobs.train",
        *small_run,
        f"run_dir={run}",
        "tracking.uri=null",
        "train.iterations=3",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("2/3"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (run / "summary.json").exists()
    assert run_job("train", *small_run, f"run_dir={run}", "tracking.uri=null", "train.iterations=3") == 0
    assert equal(weights(run, 3), weights(three_iterations, 3))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
