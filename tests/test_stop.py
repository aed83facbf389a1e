"""A training that is asked to stop, as a real process under real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file

LONG = ("train.iterations=400", "train.grace_s=100")  # a machine that is busy with other tests needs more than 25
SLOW = "import time\n\ndef slow(batch):\n    print('judging', flush=True)\n    time.sleep(600)\n"


def start(*overrides: str) -> subprocess.Popen[str]:
    """A training in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "jobs.train", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)


def await_line(process: subprocess.Popen[str], start: str) -> None:
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"it ended without a line {start}: {process.stderr.read()}")


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint_of_what_it_trained(small_run, tmp_path):  # noqa: F811
    run, store = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    more = (f"run_dir={run}", f"tracking.uri={store}", "train.checkpoint_every=1000", "async.max_staleness=1",
            "learner.decay_iterations=8")  # fmt: skip
    with start(*small_run, *more, *LONG) as process:
        await_line(process, "2/")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopping: a checkpoint first" in errors
    assert f"stopped; the same command with run_dir={run} goes on" in errors
    last = steps(run)[-1]
    assert checkpoints(run) == [f"step_{last:06d}"] and last >= 2
    assert not (run / "summary.json").exists()
    manifest = json.loads((run / f"checkpoints/step_{last:06d}/manifest.json").read_text())
    assert mlflow.MlflowClient(store).get_run(manifest["mlflow_run_id"]).info.status == "KILLED"

    assert run_job("train", *small_run, *more, f"train.iterations={last + 1}") == 0
    assert steps(run) == [*range(1, last + 2)]
    assert mlflow.MlflowClient(store).get_run(manifest["mlflow_run_id"]).info.status == "FINISHED"
    whole = (f"run_dir={tmp_path / 'whole'}", "tracking.uri=null", *more[-2:], f"train.iterations={last + 1}")
    assert run_job("train", *small_run, *whole) == 0
    name = f"checkpoints/step_{last + 1:06d}/policy.safetensors"
    stopped, never = load_file(run / name), load_file(tmp_path / "whole" / name)
    assert all((stopped[key] == never[key]).all() for key in never)


def test_a_second_signal_ends_at_once(small_run, tmp_path):  # noqa: F811
    (tmp_path / "slow.py").write_text(SLOW)
    more = (f"run_dir={tmp_path / 'run'}", "tracking.uri=null", f"+rewards.slow.fn={tmp_path / 'slow.py'}:slow")
    with start(*small_run, *more) as process:
        await_line(process, "judging")
        process.send_signal(signal.SIGTERM)
        assert "stopping" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_what_does_not_stop_in_time_ends_without_a_checkpoint(small_run, tmp_path):  # noqa: F811
    (tmp_path / "slow.py").write_text(SLOW)
    more = (f"run_dir={tmp_path / 'run'}", "tracking.uri=null", f"+rewards.slow.fn={tmp_path / 'slow.py'}:slow")
    with start(*small_run, *more, "train.grace_s=2") as process:
        await_line(process, "judging")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 1 and "not stopped within train.grace_s=2 s, the last checkpoint stands" in errors
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.slow
def test_control_c_ends_a_run_on_ray_with_a_checkpoint_and_leaves_no_process(small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    more = ("cluster=local", f"run_dir={run}", "tracking.uri=null", "train.checkpoint_every=1000", *LONG)
    with start(*small_run, *more) as process:
        await_line(process, "2/")
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # a terminal's goes to every process of the group
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert checkpoints(run) == [f"step_{steps(run)[-1]:06d}"]
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
