"""What a run that goes on restores, and what it may change."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from test_learner import KERNEL, experience, policy_path, settings  # noqa: F401  (fixtures)

from jobs.cli import ConfigError
from jobs.resume import FIXED, FREE, changes
from rl.fleet import FleetSpec, closing, fetch, make_fleet
from rl.learner import Learner

BEFORE = {
    "seed": 1,
    "run_dir": "a",
    "policy": {"path": "p", "wan": None, "lora": {"rank": 4}},
    "learner": {"lr": 0.1, "ranks": 1, "freeze": ["x"], "decay_iterations": None},
    "rewards": {"near": {}},
}


def changed(**parts) -> dict:
    return BEFORE | {name: BEFORE[name] | part if isinstance(part, dict) else part for name, part in parts.items()}


def test_what_changes_is_told_key_by_key():
    assert changes(BEFORE, BEFORE) == []
    assert changes(BEFORE, changed(run_dir="b")) == []
    assert changes(BEFORE, changed(learner={"lr": 0.2}, rewards={"far": {"weight": 1}})) == [
        "learner.lr: 0.1 -> 0.2",
        "rewards.far.weight: absent -> 1",
    ]
    assert changes(BEFORE, changed(policy={"of_a_later_version": 3})) == ["policy.of_a_later_version: absent -> 3"]


@pytest.mark.parametrize(
    "part, key",
    [
        ({"seed": 2}, r"seed: 1 -> 2: .* cannot change seed"),
        ({"policy": {"lora": {"rank": 8}}}, r"policy\.lora\.rank: 4 -> 8: .* cannot change policy"),
        ({"policy": {"wan": {"height": 480}}}, r"policy\.wan: None -> absent: .* cannot change policy"),
        ({"learner": {"ranks": 2}}, r"learner\.ranks: 1 -> 2"),
        ({"learner": {"freeze": []}}, r"learner\.freeze: \['x'\] -> \[\]: .*restore it, or choose another run_dir"),
    ],
)
def test_what_must_stay_is_refused_by_its_key(part, key):
    with pytest.raises(ConfigError, match=key):
        changes(BEFORE, changed(**part))


def test_attention_and_caches_of_the_policy_may_change():
    before = changed(policy={"wan": {"attention": "sdpa", "height": 480}})
    assert changes(before, changed(policy={"wan": {"attention": "flex", "height": 480}}))
    with pytest.raises(ConfigError, match=r"policy\.wan\.height"):
        changes(before, changed(policy={"wan": {"attention": "sdpa", "height": 832}}))


def test_a_changed_setting_is_written_down_where_the_run_is(small_run, tmp_path, capsys):  # noqa: F811
    run, store = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    more = (f"run_dir={run}", f"tracking.uri={store}", "train.checkpoint_every=1")
    assert run_job("train", *small_run, *more, "train.iterations=1") == 0
    assert run_job("train", *small_run, *more, "train.iterations=1", "seed=5") == 1
    assert "seed: 0 -> 5: a run that goes on cannot change seed" in capsys.readouterr().err
    assert run_job("train", *small_run, *more, "train.iterations=2", "learner.lr=0.001") == 0
    told = capsys.readouterr().out
    assert "changed: learner.lr: 0.0003 -> 0.001\n" in told and "changed: train.iterations: 1 -> 2\n" in told
    assert [path.name for path in sorted((run / "config").iterdir())] == ["segment_0.yaml", "segment_1.yaml"]
    assert "lr: 0.0003" in (run / "config/segment_0.yaml").read_text()
    assert (run / "config/segment_1.yaml").read_text() == (run / "config.yaml").read_text()
    manifest = json.loads((run / "checkpoints/step_000002/manifest.json").read_text())
    assert manifest["config"]["learner"]["lr"] == 0.001
    tags = mlflow.MlflowClient(store).get_run(manifest["mlflow_run_id"]).data.tags
    assert "learner.lr: 0.0003 -> 0.001" in tags["resume.1.changed"] and "changed" not in tags


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_killed_before_its_first_checkpoint_repeats_no_step(small_run, tmp_path):  # noqa: F811
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/kl": 0.0}\n{"step": 2, "train')
    assert run_job("train", *small_run, f"run_dir={tmp_path}", "tracking.uri=null") == 0
    assert steps(tmp_path) == [1, 2]


def test_an_error_that_leaves_the_learner_whole_loses_nothing_that_is_trained(small_run, tmp_path, capsys):  # noqa: F811
    run, reward = tmp_path / "run", tmp_path / "moody.py"
    body = "def judge(batch):\n    {}\n    return (batch.video / 255.0).mean((2, 3, 4))\n"
    reward.write_text(body.format("assert batch.step < 2, 'no more'"))
    job = ("train", *small_run, f"+rewards.moody.fn={reward}:judge", f"run_dir={run}", "tracking.uri=null",
           "train.checkpoint_every=10", "train.iterations=3")  # fmt: skip
    assert run_job(*job) == 1
    assert "rewards.moody" in (told := capsys.readouterr().err) and "no more" in told
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    reward.write_text(body.format("pass"))
    assert run_job(*job) == 0 and steps(run) == [1, 2, 3]


def test_a_branch_has_a_folder_and_an_mlflow_run_of_its_own(small_run, tmp_path, capsys):  # noqa: F811
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    job = ("train", *small_run, f"tracking.uri={store}", "train.iterations=2")
    branch = (f"run_dir={tmp_path / 'b'}", f"resume={tmp_path / 'a/checkpoints/step_000001'}", "evaluate.strips=3")
    assert run_job(*job, f"run_dir={tmp_path / 'a'}") == 0 and run_job(*job, *branch, "learner.lr=0.001") == 0
    trunk, other = (json.loads((tmp_path / name / "summary.json").read_text())["mlflow_run_id"] for name in "ab")
    client = mlflow.MlflowClient(store)
    assert other != trunk and client.get_run(other).data.tags["continues"] == trunk
    assert [point.step for point in client.get_metric_history(other, "train/lr")] == [2]
    assert [point.step for point in client.get_metric_history(trunk, "train/lr")] == [1, 2]
    assert [len([*(tmp_path / name / "videos").iterdir()]) for name in "ab"] == [1, 3]  # more than evaluate.batch
    capsys.readouterr()
    assert run_job(*job, f"run_dir={tmp_path / 'a'}", "train.iterations=1") == 1
    assert "train.iterations=1 is less than the step of" in capsys.readouterr().err


HOLD = """
import sys, time
from rl.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).taken():
    print("taken", flush=True)
    time.sleep(600)
"""


def test_two_processes_never_train_in_one_folder_and_a_killed_one_leaves_it_free(small_run, tmp_path, capsys):  # noqa: F811
    job = ("train", *small_run, f"run_dir={tmp_path}", "tracking.uri=null", "train.iterations=1")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"taken\n"
        assert run_job(*job) == 1
        assert f"run_dir={tmp_path} is in use by another process" in capsys.readouterr().err
        other.kill()
    assert run_job(*job) == 0


class DrawingLearner(Learner):
    """A learner that draws random numbers, as dropout would, to show that its generators are its own."""

    def seed(self, seed: int) -> None:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)

    def draw(self) -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()


@pytest.mark.slow
def test_each_of_two_ranks_resumes_its_own_generators_and_share_of_the_optimizer(request, ray_local, tmp_path):
    path, (chunks, advantages) = (request.getfixturevalue(name) for name in ("policy_path", "experience"))
    rows = [([chunks[rank]], advantages) for rank in range(2)]
    spec = FleetSpec("learner", replicas=2, timeout_s=120, start_timeout_s=240, replace=False)
    args = (path, None, KERNEL, settings(zero_stage=2, ratio_tolerance=10.0), 2)
    found = []
    for resumed in (False, True):
        with closing(make_fleet("ray", DrawingLearner, spec, args)) as (ranks,):
            address = fetch(ranks.broadcast("address")[0])
            ranks.scatter("join", [(rank, address) for rank in range(2)])
            if resumed:
                assert [held[-1] for held in fetch(ranks.broadcast("load", str(tmp_path)))] == [1, 1]
            else:
                ranks.scatter("seed", [(rank,) for rank in range(2)])
                ranks.scatter("update", rows)
                ranks.broadcast("save", str(tmp_path))
            drawn = fetch(ranks.broadcast("draw"))
            ranks.scatter("update", rows)
            found.append((drawn, fetch(ranks.broadcast("weights", False)[0]).digest))
    (drawn, digest), (drawn_again, digest_again) = found
    assert drawn_again == drawn and drawn[0] != drawn[1]
    assert digest_again == digest


def test_the_documentation_names_every_setting_that_must_stay():
    page = (Path(__file__).parents[1] / "docs/resume.md").read_text()
    for key in FIXED:
        assert f"`{key}`" in page or f"`{key}.*`" in page
    for key in FREE:
        assert f"`{key}`" in page or f"`.{key.rpartition('.')[2]}`" in page
