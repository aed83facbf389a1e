"""`jobs.submit` against a cluster that `ray start --head` made: to the end, and stopped half-way."""

from __future__ import annotations

import json
import time

import pytest
from cluster_cases import ray_head
from jobs_cases import small_run  # noqa: F401  (a fixture)

FEW = ("cluster.rollout.replicas=1", "cluster.reward.replicas=1", "tracking.uri=null")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


def submit(cluster, *words, run, job):
    overrides = (o for o in job if o != "cluster=inline")
    return cluster.run("python", "-m", "jobs.submit", *words, "--", *overrides, *FEW, f"run_dir={run}")


def test_a_submitted_job_trains_and_its_status_is_the_exit_status(cluster, small_run, tmp_path):  # noqa: F811
    status, output = submit(cluster, run=tmp_path / "run", job=(*small_run, "train.iterations=1"))
    assert status == 0 and "SUCCEEDED" in output and "asked for" in output, output
    assert "held-out track error" in output  # the job's own log
    assert json.loads((tmp_path / "run/summary.json").read_text())["iterations"] == 1
    # The same folder again: nothing is left to train. A job that fails says so.
    status, output = submit(cluster, run=tmp_path / "run", job=(*small_run, "train.iterations=1", "resume=none"))
    assert status == 1 and "resume=auto goes on from them" in output and "FAILED" in output, output


def test_ray_job_stop_leaves_a_checkpoint_that_the_same_command_goes_on_from(cluster, small_run, tmp_path):  # noqa: F811
    run, long = tmp_path / "run", (*small_run, "train.iterations=400", "train.checkpoint_every=1000")
    assert submit(cluster, "--name", "first", "--no-wait", run=run, job=long)[0] == 0
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, cluster.run("ray", "job", "logs", "first")[1]
        time.sleep(0.2)
    status, output = submit(cluster, run=run, job=long)
    assert status == 1 and "job first trains in run_dir=" in output, output
    status, output = cluster.run("ray", "job", "stop", "first")
    assert status == 0, output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{steps[-1]:06d}"]
    more = (*long, f"train.iterations={steps[-1] + 1}")
    status, output = submit(cluster, run=run, job=more)
    assert status == 0, output
    assert json.loads((run / "summary.json").read_text())["iterations"] == steps[-1] + 1
