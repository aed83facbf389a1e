"""A learner that is really killed: the run makes another, takes itself back to the last checkpoint and goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from rl.ray_fleet import FLEET

SLOWLY = (
    "import time\n\ndef brightness(batch):\n    time.sleep(1.5)\n    return (batch.video / 255.0).mean((2, 3, 4))\n"
)


def kill_learner(driver: int) -> None:
    def is_learner(process: psutil.Process) -> bool:
        try:
            return process.environ().get(FLEET) == "learner"
        except psutil.Error:
            return False

    (learner,) = filter(is_learner, psutil.Process(driver).children(recursive=True))
    learner.kill()


def killed_at(command: list[str], *lines: str) -> tuple[int, str, str]:
    """Runs it and kills its learner at each of these lines in turn; exit code, output, errors."""
    told = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            told += line
            if lines and line.startswith(lines[0]):
                lines = lines[1:]
                kill_learner(process.pid)
        errors = process.stderr.read()
    assert not lines, told + errors
    return process.returncode, told, errors


@pytest.fixture
def slow_run(small_run, tmp_path):  # noqa: F811
    """The same run on Ray, with time to kill somebody in."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    fast = [o for o in small_run if not o.startswith(("cluster", "+rewards.brightness"))]
    return [*fast, f"+rewards.brightness.fn={tmp_path / 'slowly.py'}:brightness", "cluster=local",
            "cluster.rollout.replicas=1", "cluster.reward.replicas=1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_loses_its_learner_ends_as_if_nobody_had_killed_it(small_run, slow_run, tmp_path):  # noqa: F811
    more = ("tracking.uri=null", "async.max_staleness=1", "train.checkpoint_every=2", "train.iterations=4")
    assert run_job("train", *small_run, *more, f"run_dir={tmp_path / 'whole'}") == 0
    run = tmp_path / "run"
    command = [sys.executable, "-m", "jobs.train", *slow_run, *more, f"run_dir={run}", "train.max_recoveries=2"]
    # Before the first checkpoint, after it, and once more than may be; then the same command goes on.
    code, told, errors = killed_at(command, "1/4", "3/4", "3/4")
    assert code == 1 and "learner[0]" in errors, told + errors
    assert "learner[0]" in told and "recovery 1 of 2, from the beginning" in told
    assert "recovery 2 of 2, from " in told and "step_000002" in told and "recovery 3" not in told
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["system/recoveries"]) for line in lines[:3]] == [(1, 1), (2, 1), (3, 2)]
    code, told, errors = killed_at(command)
    assert code == 0, told + errors
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    name = "checkpoints/step_000004/policy.safetensors"
    recovered, undisturbed = load_file(run / name), load_file(tmp_path / "whole" / name)
    assert all((recovered[key] == undisturbed[key]).all() for key in undisturbed)
