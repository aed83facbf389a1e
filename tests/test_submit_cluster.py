"""`jobs.submit` against a cluster that `ray start --head` made."""

from __future__ import annotations

import json
import time

import pytest
from cluster_cases import ray_head
from jobs_cases import small_run  # noqa: F401  (a fixture)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_job_is_stopped_with_a_checkpoint_and_the_same_command_finishes_it(small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    job = [o for o in small_run if o != "cluster=inline"]
    job += ["cluster.rollout.replicas=1", "cluster.reward.replicas=1", "tracking.uri=null", f"run_dir={run}"]
    long = [*job, "train.iterations=400", "train.checkpoint_every=1000"]
    with ray_head() as cluster:
        submit = ("python", "-m", "jobs.submit")
        status, output = cluster.run(*submit, "--name", "first", "--no-wait", "--", *long)
        assert status == 0 and "submitted first: python -m jobs.train" in output, output
        deadline = time.monotonic() + 150
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline, cluster.run("ray", "job", "logs", "first")[1]
            time.sleep(0.2)
        status, output = cluster.run(*submit, "--", *long)
        assert status == 1 and "job first trains in run_dir=" in output, output
        status, output = cluster.run("ray", "job", "stop", "first")
        assert status == 0, output
        trained = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
        assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{trained:06d}"]

        status, output = cluster.run(*submit, "--", *long, f"train.iterations={trained + 1}")
    assert status == 0 and "SUCCEEDED" in output and "held-out track error" in output, output
    assert json.loads((run / "summary.json").read_text())["iterations"] == trained + 1
