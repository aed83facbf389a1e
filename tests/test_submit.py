"""What `jobs.submit` makes of its command line, and what it refuses; nothing is submitted here."""

from __future__ import annotations

import shlex
import sys

import mlflow
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from jobs import submit
from jobs.cli import ROOT, ConfigError
from jobs.ray_job import check_paths, expand, make_job, shortage
from rl.fleet import FleetSpec

RUN = ("run_dir=/shared/first", "tracking.uri=http://mlflow:5000")


def submitted(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs.submit", *words])
    with pytest.raises(SystemExit) as end:
        submit.main()
    return end.value.code


def test_a_dry_run_prints_the_command_that_the_job_will_run_and_who_asks_for_what(monkeypatch, capsys):
    nowhere = ("--address", "http://127.0.0.1:1", "--dry-run", "--name", "mine", "--env", "NCCL_DEBUG=INFO")
    overrides = (*RUN, "cluster.rollout.replicas=3", "train.grace_s=60", "+rewards.calm.fn=examples/my_reward.py:calm")
    assert submitted(monkeypatch, *nowhere, "--", *overrides) == 0
    output = capsys.readouterr().out
    assert "no Ray cluster answers at http://127.0.0.1:1" in output
    assert [row.split("│")[1:3] for row in output.splitlines() if "rewards.calm" in row and "│" in row] == [
        [" rewards.calm ", "       2 "]
    ]
    job = yaml.safe_load(output[output.index("mine:\n") :])["mine"]
    words = shlex.split(job["entrypoint"])
    assert words == ["python", "-m", "jobs.train", "cluster=ray", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert OmegaConf.to_object(compose("train", overrides=words[3:])).cluster.rollout.replicas == 3
    assert job["runtime_env"]["working_dir"] == str(ROOT)
    assert job["runtime_env"]["env_vars"] == {
        "OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": "75", "NCCL_DEBUG": "INFO",
    }  # fmt: skip
    assert "/outputs" in job["runtime_env"]["excludes"]
    assert not any(name in ("/policy", "*.safetensors") for name in job["runtime_env"]["excludes"])


def test_nothing_is_submitted_where_no_cluster_answers(monkeypatch, capsys):
    assert submitted(monkeypatch, "--address", "http://127.0.0.1:1", "--", *RUN) == 1
    assert "error: no Ray cluster answers at http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, told",
    [
        ("rollout.group_size=1", "rollout.group_size=1: a group needs"),
        ("rolout.group_size=4", "rolout"),
        ("cluster=inline", "joins its own cluster"),
        ("cluster.address=10.0.0.1:6379", "joins its own cluster"),
        ("run_dir=outputs/first", "run_dir=outputs/first would be lost"),
        ("run_dir=null", "run_dir=null would be lost"),
        ("tracking.uri=sqlite:///mlflow.db", "tracking.uri=mlflow.db would be lost"),
        ("tracking.uri=file:mlruns", "tracking.uri=mlruns would be lost"),
        ("tracking.uri=mlruns", "tracking.uri=mlruns would be lost"),
        ("train.checkpoint_url=outputs/copy", "train.checkpoint_url=outputs/copy would be lost"),
        ("policy.weights=outputs/best.safetensors", "policy.weights=outputs/best.safetensors is not sent"),
        ("policy.weights=policy/none.safetensors", "policy.weights=policy/none.safetensors does not exist"),
        ("resume=outputs/train/latest", "resume=outputs/train/latest is not sent"),
        ("+rewards.mine.fn=tests/reward_cases.py:good", "rewards.mine.fn=tests/reward_cases.py is not sent"),
    ],
)
def test_a_job_that_could_not_run_or_would_lose_its_results_is_refused(override, told):
    with pytest.raises((ConfigError, ValueError), match=told):
        make_job([*RUN, override])


@pytest.mark.parametrize(
    "override",
    ["tracking.uri=sqlite:////shared/mlflow.db", "tracking.uri=databricks", "train.checkpoint_url=s3://bucket/run",
     "train.checkpoint_url=file:///shared/copy"],
)  # fmt: skip
def test_what_every_node_sees_is_accepted(override):
    assert override in make_job([*RUN, override]).overrides


def test_a_job_is_sent_from_the_repository_alone(monkeypatch, tmp_path):
    config = make_job(RUN).config
    check_paths(config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run it in"):
        check_paths(config)


@pytest.mark.parametrize(
    "override, env, key",
    [
        ("tracking.uri=https://me:hunter2@mlflow.example", {}, "tracking.uri"),
        ("+rewards.calm.args.hf_token=hunter2", {}, "rewards.calm.args.hf_token"),
        ("+cluster.reward.runtime_env.env_vars.AWS_SECRET_ACCESS_KEY=hunter2", {}, "AWS_SECRET_ACCESS_KEY"),
        ("seed=1", {"MLFLOW_TRACKING_PASSWORD": "hunter2"}, "--env MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(override, env, key):
    with pytest.raises(ConfigError, match=f"{key} looks like a secret") as refusal:
        make_job([*RUN, "+rewards.calm.fn=examples/my_reward.py:calm", override], env=env)
    assert "hunter2" not in str(refusal.value)


def test_where_a_secret_lies_is_no_secret():
    env = {"RAY_AUTH_TOKEN_PATH": "/secrets/token", "TOKENIZERS_PARALLELISM": "false"}
    assert make_job(RUN, env=env).env_vars.items() >= env.items()


def test_a_sweep_is_one_job_for_each_combination_with_a_folder_of_its_own():
    sets = expand(["seed=0,1", "learner.lr=1e-4,3e-4", "learner.betas=[0.9,0.99]", "run_dir=/shared/s"])
    assert [dict(o.split("=", 1) for o in one) for one in sets] == [
        {"seed": seed, "learner.lr": lr, "learner.betas": "[0.9,0.99]",
         "run_dir": f"'/shared/s/seed={seed},learner.lr={lr}'"}
        for seed in "01" for lr in ("0.0001", "0.0003")
    ]  # fmt: skip
    jobs = [make_job([*one, RUN[1]]) for one in sets]
    assert [(job.config.seed, job.config.learner.lr) for job in jobs] == [(0, 1e-4), (0, 3e-4), (1, 1e-4), (1, 3e-4)]
    assert len({job.metadata["run_dir"] for job in jobs}) == 4
    assert expand(["seed=1", "run_dir=/shared/s"]) == [("seed=1", "run_dir=/shared/s")]


def test_the_jobs_of_a_sweep_have_one_mlflow_run_above_theirs(tmp_path):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    jobs = [make_job([*one, f"tracking.uri={store}"], f"job-{i}")
            for i, one in enumerate(expand(["seed=0,1", f"run_dir={tmp_path}"]))]  # fmt: skip
    jobs = submit.under_one_parent(jobs)
    parents = {make_job(job.overrides).config.tracking.parent for job in jobs}
    (parent,) = parents
    run = mlflow.MlflowClient(store).get_run(parent)
    assert run.data.tags["job"] == "sweep" and run.info.status == "FINISHED"
    assert run.data.params["job-1"].startswith("seed=1 ")


def test_what_a_cluster_can_never_hold_is_said():
    nodes = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert shortage([FleetSpec("rollout", 2, num_cpus=4, num_gpus=1), FleetSpec("reward", 4, num_cpus=1)], nodes) == ""
    assert (
        shortage([FleetSpec("learner", num_cpus=6, num_gpus=4)], nodes)
        == "no node has the 6 CPU and 4 GPU that a worker of learner needs"
    )
    assert "13 CPU are asked for, and the cluster has 12" in shortage([FleetSpec("reward", 13, num_cpus=1)], nodes)
