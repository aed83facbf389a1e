"""Reward fleets on real Ray: rewards that are killed, hang in C, leak and raise cost their own scores alone."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import ray
from hydra import compose, initialize_config_dir
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster
from reward_cases import WORLD, film

from jobs.build import make_judges, validate
from jobs.config import TrainConfig
from rewards.contract import RewardError
from rl.fleet import FleetError, closing
from rl.ray_fleet import ray_session
from rollout.doctored import shifted
from rollout.records import GroupRollout

ROOT = Path(__file__).parents[1]
NOTHING = ("~rewards.trajectory", "~rewards.background", "~rewards.degradation")
LIGHT = "def judge(batch):\n    return batch.video.mean((2, 3, 4)) / 255\n"


def config(*overrides: str) -> TrainConfig:
    importlib.import_module("jobs.train")  # registers the schema
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides=["cluster.reward.replicas=1", *overrides]))


def group(index: int) -> GroupRollout:
    """Four members that share 9 frames of a true video and end up to 3 px apart in the other 4."""
    members = np.stack([film(index, shifted((0, px)))[9:] for px in range(4)])
    return GroupRollout(
        f"{index:02}",
        WORLD.prompt("heldout", index),
        film(index)[:9],
        members,
        {1: range(9, 11), 2: range(11, 13)},
        index,
        0,
    )


def chunks(count: int, size: int = 2) -> list[list[GroupRollout]]:
    return [[group(size * i + k) for k in range(size)] for i in range(count)]


def reward(path: Path, name: str, body: str) -> str:
    """The override that adds a reward: `body` runs before it judges by the light."""
    (path / f"{name}.py").write_text("import ctypes, os, signal\nfrom pathlib import Path\n" + body + LIGHT.replace(
        "judge(batch):\n", "judge(batch):\n    trouble(batch)\n"))  # fmt: skip
    return f"+rewards.{name}.fn={path}/{name}.py:judge"


def collected(judges, work: Sequence[list[GroupRollout]]):
    return judges.collect([judges.score(groups, 0) for groups in work])


def same(a, b, terms: Sequence[str]) -> bool:
    pairs = [(x.frames[t], y.frames[t]) for x, y in zip(a.scores, b.scores, strict=True) for t in terms]
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def test_scores_depend_on_the_sample_alone_and_not_on_fleet_batch_or_worker(ray_local):
    work = chunks(3)
    with closing(make_judges(config("cluster=inline"))) as (judges,):
        judges.dry_run(WORLD.prompt("train", 0))
        expected = collected(judges, work)
    own = ["rewards.background.fleet=null", "+rewards.background.worker={replicas: 2, batch_size: 3}"]
    own += ["rewards.trajectory.fleet=two", "rewards.degradation.fleet=two"]
    with closing(make_judges(config(*own))) as (judges,):
        assert {name: fleet.spec.replicas for name, fleet in judges.fleets.items()} == {
            "reward": 1, "two": 1, "rewards.background": 2}  # fmt: skip
        found = collected(judges, work)
        alone = collected(judges, [[groups[1]] for groups in reversed(work)])
    assert [group.group_id for group in found.scores] == [f"{i:02}" for i in range(6)] and found.lost == 0
    assert same(found, expected, ["trajectory", "background", "degradation"])
    assert found.scores[0].metrics.keys() == expected.scores[0].metrics.keys()
    for one, other in zip(alone.scores, expected.scores[1::2], strict=True):
        for term in ("trajectory", "background", "degradation"):
            np.testing.assert_allclose(one.frames[term], other.frames[term], atol=1e-5)


KILLED_ONCE = """
def trouble(batch):
    marker = Path(__file__).with_name("killed")
    if batch.sample_id[0].startswith("02") and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED = "def trouble(batch):\n    if batch.sample_id[0].startswith('02'): os.kill(os.getpid(), signal.SIGKILL)\n"
HANGS = "def trouble(batch):\n    if batch.sample_id[0].startswith('04'): ctypes.PyDLL(None).pause()  # keeps the GIL\n"
LEAKS = "held = []\ndef trouble(batch):\n    held.append(b'1' * 2**26)\n"
RAISES = """
def trouble(batch):
    if "07/3" in batch.sample_id:
        raise ValueError("no objects found")
"""


@pytest.mark.slow
def test_a_killed_a_hanging_a_leaking_and_a_raising_reward_lose_only_what_they_could_not_score(ray_local, tmp_path):
    rewards = {"sound": "def trouble(batch): pass\n", "once": KILLED_ONCE, "killed": KILLED, "hangs": HANGS,
               "leaks": LEAKS, "raises": RAISES}  # fmt: skip
    overrides = [reward(tmp_path, name, body) for name, body in rewards.items()]
    more = ["+rewards.sound.fleet=reward", "+rewards.hangs.worker.timeout_s=3", "+rewards.leaks.worker.memory_gb=0.4"]
    work = chunks(5)
    with closing(make_judges(config(*NOTHING, *overrides, *more))) as (judges,):
        judges.dry_run(WORLD.prompt("train", 0))
        begin = time.monotonic()
        found = collected(judges, work)
        assert time.monotonic() - begin < 3 + 15
        restarts = {name: fleet.restarts for name, fleet in judges.fleets.items() if fleet.restarts}
        assert restarts == {"rewards.once": 1, "rewards.killed": 2, "rewards.hangs": 1}
        assert judges.fleets["rewards.leaks"].recycled >= 1 and judges.recycled >= 1 and judges.restarts == 4
        assert found.lost == 2
        # And the next iteration is whole but for what fails again.
        again = collected(judges, work[:2] + work[3:])
        assert again.lost == 1 and {name for group in again.scores for name in group.faults} == {"killed", "raises"}
    missing = {}
    for scores in found.scores:
        assert set(scores.frames) == set(rewards)
        for name, fault in scores.faults.items():
            missing |= {(name, scores.group_id): fault.clips.tolist()}
            assert np.isnan(scores.frames[name][fault.clips]).all()
            assert np.isfinite(scores.frames[name][~fault.clips, 9:]).all()
    whole = [True] * 4
    assert missing == {("killed", "02"): whole, ("killed", "03"): whole, ("hangs", "04"): whole, ("hangs", "05"): whole,
                       ("raises", "07"): [False, False, False, True]}  # fmt: skip
    assert "rewards.hangs[0].score: no result after 3" in found.scores[4].faults["hangs"].text
    assert "rewards.killed[0].score: the worker died" in found.scores[2].faults["killed"].text
    assert found.scores[7].faults["raises"].text == "ValueError: no objects found"
    sound = {group.group_id: group.frames["sound"] for group in found.scores}
    for scores in found.scores:
        for name in set(rewards) - set(scores.faults):
            assert np.array_equal(scores.frames[name], sound[scores.group_id], equal_nan=True)


ONCE = """
def trouble(batch):
    marker = Path(__file__).with_suffix(".done")
    if batch.step == 1 and batch.group_id[0] != "dry run" and not marker.exists():
        marker.touch()
        {what}
"""


@pytest.mark.slow
def test_a_run_finishes_with_a_killed_a_hanging_a_leaking_and_a_raising_reward(ray_local, small_run, tmp_path):  # noqa: F811
    dies, hangs = "os.kill(os.getpid(), signal.SIGKILL)", "ctypes.PyDLL(None).pause()"
    rare = "def trouble(batch):\n    if any(hash_of(s) % 100 == 0 for s in batch.sample_id): raise OSError('torn')\n"
    rewards = {"dies": ONCE.format(what=dies), "hangs": ONCE.format(what=hangs), "leaks": LEAKS,
               "rare": "from zlib import crc32\nhash_of = lambda s: crc32(s.encode())\n" + rare}  # fmt: skip
    more = [reward(tmp_path, name, body) for name, body in rewards.items()]
    more += ["cluster=local", "cluster.reward.replicas=1", "+rewards.hangs.worker.timeout_s=4",
             "+rewards.leaks.worker.memory_gb=0.6", "train.iterations=3", "rollout.prompts_per_iteration=4",
             "rollout.group_size=8", "tracking.uri=null", f"run_dir={tmp_path}/run"]  # fmt: skip
    assert run_job("train", *small_run, *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["masked/chunks"] for line in lines] == [0, 1, 0]
    assert [line["group/hangs/masked"] for line in lines] == pytest.approx([0, 1 / 4, 0])
    assert [line["group/dies/masked"] for line in lines] == [0, 0, 0]
    rare = [line["group/rare/masked"] for line in lines]
    assert 0 < sum(rare) < 0.1
    assert lines[-1]["system/restarts"] == 2 and lines[-1]["system/recycled"] >= 1
    assert max(line["time/reward"] for line in lines) < 4 + 15
    assert all(line["train/grad_norm"] > 0 for line in lines)


def test_a_reward_that_fails_on_too_much_ends_the_run_early_and_is_named(ray_local, tmp_path):
    hangs = reward(tmp_path, "hangs", HANGS.replace("startswith('04')", "isdigit() or not batch.step"))
    overrides = [hangs, "+rewards.hangs.worker.timeout_s=1", "cluster.fault_share=0.5"]
    with closing(make_judges(config(*NOTHING, *overrides))) as (judges,):
        with pytest.raises(FleetError, match=r"rewards.hangs could not be scored on 2 of 3 chunks: .* no result after"):
            collected(judges, chunks(3, 1))


def test_the_file_of_a_reward_goes_to_the_workers_with_the_job(tmp_path):
    """On a cluster of two nodes, the second of which is the only one with room; then the file is gone."""
    (tmp_path / "mine.py").write_text("import os\nMORE = 0.5\n" + LIGHT + "    os\n")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/constants.py").write_text("LIGHT = 0.25\n")
    (tmp_path / "imports.py").write_text(
        "import constants\ndef judge(batch):\n    return [constants.LIGHT] * len(batch)\n"
    )
    overrides = [f"+rewards.mine.fn={tmp_path}/mine.py:judge", "+rewards.mine.worker.num_cpus=1", "cluster=ray",
                 f"+rewards.sibling.fn={tmp_path}/imports.py:judge", "cluster.reward.num_cpus=0",
                 f"+rewards.sibling.worker.runtime_env.env_vars.PYTHONPATH={ROOT}:{tmp_path}/kept"]  # fmt: skip
    c = config(*NOTHING, *overrides)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        with ray_session(cluster.address), closing(make_judges(c)) as (judges,):
            for name in ("mine.py", "imports.py"):
                (tmp_path / name).unlink()
            judges.dry_run(WORLD.prompt("train", 0))
            fleet = judges.fleets["rewards.mine"]
            found = collected(judges, chunks(1))
            assert found.scores[0].frames["sibling"][0, -1] == 0.25
            pid = ray.get(fleet.replicas[0].actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
            os.kill(pid, signal.SIGKILL)
            assert same(collected(judges, chunks(1)), found, ["mine"]) and fleet.restarts == 1
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.trajectory.worker.replicas=2"], "rewards.trajectory.worker: the fleet 'reward' is that of cluster."),
        (["+rewards.a.fn=x:y", "+rewards.a.worker.replica=2"], "rewards.a.worker: Key 'replica' not in"),
        (["+rewards.a.fn=x:y", "+rewards.a.worker.timeout_s=soon"], "rewards.a.worker: Value 'soon'"),
        (["+rewards.a.fn=x:y", "+rewards.a.worker.batch_size=0"], "'rewards.a': batch_size=0 must be at least 1"),
        (["+rewards.a.fn=x:y", "+rewards.a.range=[1]"], r"rewards.a.range must be \[worst, best\], not \[1.0\]"),
        (["+rewards.a.fn.x=y", "+rewards.a.args.b=1"], "rewards.a.args goes with a function or class named"),
        ([f"+rewards.{n}={{fn: x:y, fleet: f, worker: {{retries: {i}}}}}" for i, n in enumerate("ab")],
         "rewards.b.worker.retries=1: the fleet 'f' has 0 already"),
        (["+rewards.a.fn=nowhere/mine.py:judge"], "no such file"),
    ],
)  # fmt: skip
def test_a_fleet_that_makes_no_sense_is_named_before_anything_starts(overrides, message):
    with pytest.raises(RewardError, match=message):
        validate(config(*(o if o.startswith("+") else f"+{o}" for o in overrides)))
