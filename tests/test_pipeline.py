"""Groups that are generated ahead of the learner: which weights make them, and what is learnt from stale ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from benchmarks.common import read_config
from benchmarks.sleepers import SleepingLearner, SleepingRollout, sleepers
from jobs.build import (
    loop_settings,
    make_judges,
    make_learner,
    make_rollout_fleet,
    session,
    term_weights,
    validate,
)
from rl.fleet import FleetError, FleetSpec, closing, fetch, make_fleet
from rl.judges import Judges
from rl.loop import Clock, LoopSettings, chunks, credit, train
from rl.pipeline import Fleets, Pipeline
from rl.weights import Weights

ITERATIONS = 4


def trained(overrides) -> Weights:
    """The weights after ITERATIONS of the loop."""
    c = read_config(*overrides)
    with session(c), closing(make_rollout_fleet(c, validate(c)), make_judges(c), make_learner(c)) as parts:
        train(Fleets(*parts), term_weights(c), loop_settings(c), [0], lambda *_: None, lambda _: None, lambda _: False,
              Clock())  # fmt: skip
        return fetch(parts[2].broadcast("weights")[0])


def by_hand(overrides, staleness: int) -> Weights:
    """The same one after the other: iteration i by the weights of version max(0, i - staleness)."""
    c = read_config(*overrides)
    settings, terms = loop_settings(c), term_weights(c)
    (roller,) = make_rollout_fleet(c, validate(c)).workers
    (judge,) = make_judges(c).fleets["reward"].workers
    (learner,) = make_learner(c).workers
    versions = []
    for i in range(ITERATIONS):
        versions.append(learner.weights())
        version = max(0, i - staleness)
        roller.load_weights(versions[version])
        rolled = [roller.rollout(i, chunk, version) for chunk in chunks(settings, i)]
        scores = [score for groups, _ in rolled for score in judge.score(groups, i)]
        scores.sort(key=lambda group: group.group_id)
        learner.update([replays for _, replays in rolled], credit(scores, terms, settings, i))
    return learner.weights()


@pytest.fixture(scope="module")
def overrides(small_run):  # noqa: F811
    one_each = ("cluster.rollout.replicas=1", "cluster.reward.replicas=1", "learner.lr=0.003",
                "+rewards.brightness.fleet=reward")  # fmt: skip
    return [*small_run, *one_each, f"train.iterations={ITERATIONS}"]


def stale(overrides, staleness: int) -> list[str]:
    return [*overrides, f"async.max_staleness={staleness}"]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_an_iteration_learns_from_groups_of_the_weights_that_many_updates_ago(overrides, staleness):
    here = stale(overrides, staleness)
    found = trained(here)
    assert found.version == ITERATIONS
    assert found.digest == by_hand(here, staleness).digest
    if staleness:
        assert found.digest not in (by_hand(here, staleness - 1).digest, trained(overrides).digest)


@pytest.mark.slow
@pytest.mark.parametrize("staleness, replicas", [(0, 1), (1, 2)])
def test_how_many_workers_there_are_on_ray_changes_no_bit(overrides, ray_local, staleness, replicas):
    on_ray = ["cluster=local", f"cluster.rollout.replicas={replicas}", "cluster.reward.replicas=2"]
    here = [o for o in stale(overrides, staleness) if not o.startswith("cluster")]
    assert trained([*here, *on_ray]).digest == trained(stale(overrides, staleness)).digest


def slept(backend: str, staleness: int, rollout: float = 0.0, reward: float = 0.0, learner: float = 0.0) -> list[tuple]:
    """What happens in four iterations of three chunks, one worker each; the seconds that a call takes."""
    settings = LoopSettings(0, 4, 3, 1, True, 5.0, False, 100, max_staleness=staleness)
    with sleepers(backend, {"rollout": (rollout, 1), "reward": (reward, 1), "learner": (learner, 1)}) as run:
        return run(settings)


@pytest.mark.parametrize("staleness", [0, 1, 2, 9])
def test_replays_reach_the_learner_with_the_version_that_is_due(staleness):
    updates = [note[2] for note in slept("inline", staleness) if note[0] == "update"]
    assert updates == [(max(0, i - staleness),) * 3 for i in range(4)]


def test_after_a_resume_iterations_are_generated_by_the_weights_that_would_have_generated_them():
    def versions(held: list[int]) -> list[int]:
        settings = LoopSettings(0, 6, 3, 3, True, 5.0, False, 100, max_staleness=2)
        with sleepers("inline", {"rollout": (0.0, 1), "reward": (0.0, 1), "learner": (0.0, 1)}) as run:
            return [note[2][0] for note in run(settings, held) if note[0] == "update"]

    assert versions([0]) == [0, 0, 0, 1, 2, 3]
    assert versions([2, 3, 4]) == [2, 3] and versions([0, 1]) == [0, 0, 1, 2, 3]
    assert versions([4]) == [4, 4]  # a checkpoint of a run that kept no earlier weights


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_resumed_run_equals_one_that_was_never_interrupted(small_run, tmp_path, staleness):  # noqa: F811
    more = (f"async.max_staleness={staleness}", "tracking.uri=null", "learner.lr=0.003")

    def weights_after(run: Path, *lives: int) -> dict[str, torch.Tensor]:
        for iterations in lives:
            assert run_job("train", *small_run, *more, f"run_dir={run}", f"train.iterations={iterations}") == 0
        return load_file(run / f"checkpoints/step_{lives[-1]:06d}/policy.safetensors")

    whole, resumed = weights_after(tmp_path / "whole", 4), weights_after(tmp_path / "resumed", 2, 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "resumed/metrics.jsonl").read_text().splitlines()]
    assert [line["async/staleness"] for line in lines] == [min(i, staleness) for i in range(4)]


def test_finished_chunks_are_judged_while_the_learner_is_at_work(ray_local):
    def during_the_first_update(staleness: int) -> list[tuple]:
        notes = slept("ray", staleness, rollout=0.1, reward=0.05, learner=0.8)
        begin, end = next(note[-2:] for note in notes if note[0] == "update")
        return [note[:2] for note in notes if begin < note[-2] < end]

    assert during_the_first_update(1).count(("score", 1)) >= 2
    assert ("rollout", 2) not in during_the_first_update(1)
    assert during_the_first_update(0) == []


def test_workers_that_hold_different_weights_are_told():
    class Odd(SleepingRollout):
        def load_weights(self, weights: int) -> str:
            return str(id(self))

    rollout = make_fleet("inline", Odd, FleetSpec("rollout", 2), (0,))
    learner = make_fleet("inline", SleepingLearner, FleetSpec("learner"), (0,))
    pipeline = Pipeline(Fleets(rollout, Judges({}, {}, 0.0), learner), range(2), lambda _: [], 0, [0])
    with pytest.raises(FleetError, match="rollout workers hold different weights"):
        pipeline.take(0)
