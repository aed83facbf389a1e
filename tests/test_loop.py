"""Credit, masking and the version handshake of the training loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import WORLD, tiny_policy

from policy.transition import Kernel
from rewards.terms import SystemFault
from rl.advantage import TermWeight
from rl.fleet import FleetError, FleetSpec, closing, make_fleet
from rl.judges import Judges
from rl.loop import LoopSettings, credit, summarise
from rl.reward_worker import GroupScores
from rl.rollout_worker import SyncedRolloutWorker
from rl.weights import pack
from rollout.group import RolloutSettings

SETTINGS = LoopSettings(
    seed=0,
    iterations=1,
    prompts_per_iteration=1,
    prompts_per_task=1,
    reward_to_go=True,
    advantage_clip=5.0,
    permute=False,
    checkpoint_every=1,
)
TERMS = {"near": TermWeight(1.0, 0.01)}


def scores(frames, group_id="0/0/a", faults=None):
    """Four frames, the first given; block 1 is frames 1 and 2, block 2 is frame 3."""
    return GroupScores(
        group_id, {1: range(1, 3), 2: range(3, 4)}, {"near": np.array(frames, np.float32)}, {}, faults or {}
    )


NAN = np.nan
GROUP = scores([[NAN, 1, 1, 0], [NAN, 0, 0, 1], [NAN, 0.5, 0.5, 0.5]])


def test_a_block_is_credited_with_its_own_frames_and_all_later_ones():
    assert GROUP.block("near", 1, True) == pytest.approx([2 / 3, 1 / 3, 0.5])
    assert GROUP.block("near", 1, False) == pytest.approx([1, 0, 0.5])
    assert GROUP.block("near", 2, True) == pytest.approx([0, 1, 0.5])
    given = credit([GROUP], TERMS, SETTINGS, 0)["0/0/a"]
    assert given[1][0] > 0 > given[1][1] and given[2][0] < 0 < given[2][1]
    alone = replace(GROUP, blocks={1: range(1, 3)})  # as with `video`, where later frames have no advantage
    assert alone.block("near", 1, False) == pytest.approx(GROUP.block("near", 1, False))


def test_a_member_without_a_score_is_masked_and_changes_nobody_else():
    hidden = scores([[NAN] * 4, *GROUP.frames["near"][1:]])
    given = credit([hidden], TERMS, SETTINGS, 0)["0/0/a"][1]
    alone = credit([scores(GROUP.frames["near"][1:])], TERMS, SETTINGS, 0)["0/0/a"][1]
    assert given[0] == 0 and given[1:] == pytest.approx(alone)


def test_the_control_gives_the_same_advantages_to_other_members():
    right = credit([GROUP], TERMS, SETTINGS, 0)["0/0/a"]
    wrong = [credit([GROUP], TERMS, replace(SETTINGS, permute=True, seed=s), 0)["0/0/a"] for s in range(8)]
    assert all(sorted(w[1]) == pytest.approx(sorted(right[1])) for w in wrong)
    assert any((w[1] != right[1]).any() for w in wrong)
    again = credit([GROUP], TERMS, replace(SETTINGS, permute=True), 0)["0/0/a"]
    assert (again[1] == wrong[0][1]).all()


def test_groups_can_share_one_spread_and_leave_the_middle_out():
    flat = scores(0.1 * GROUP.frames["near"], "0/0/b")
    own = credit([GROUP, flat], TERMS, SETTINGS, 0)
    shared = credit([GROUP, flat], TERMS, replace(SETTINGS, advantage_std="batch"), 0)
    assert own["0/0/b"][1] == pytest.approx(own["0/0/a"][1], abs=1e-6)
    assert shared["0/0/b"][1] == pytest.approx(0.1 * shared["0/0/a"][1], abs=1e-6)
    ends = credit([GROUP], TERMS, replace(SETTINGS, best_and_worst=1), 0)["0/0/a"][1]
    assert ends == pytest.approx(1.5 * own["0/0/a"][1] * [1, 1, 0], abs=1e-6)


class Near:
    """Scores, or fails on as many members as the group's name ends with."""

    def score(self, name, step):
        failed = np.arange(3) < int(name[-1])
        return [
            scores(GROUP.frames["near"], name, {"near": SystemFault(failed, "OSError: away")} if any(failed) else {})
        ]


def test_too_many_failed_scores_stop_the_run_and_few_are_counted():
    fleet = make_fleet("inline", Near, FleetSpec("reward"))
    with closing(Judges({"reward": fleet}, {"reward": ["near"]}, fault_share=0.25)) as (judges,):
        found = judges.collect([judges.score(name, 0) for name in ("a0", "b0", "c0", "away3")])
        assert len(found.scores) == 4 and found.lost == 0
        metrics = summarise(found.scores, TERMS)
        assert (metrics["masked/terms"], metrics["masked/scores"], metrics["group/near/masked"]) == (1, 3, 0.25)
        with pytest.raises(FleetError, match=r"rewards\.near failed on 4 of 12 clips: OSError: away"):
            judges.collect([judges.score(name, 0) for name in ("a0", "b0", "c1", "away3")])


def test_a_rollout_worker_serves_only_the_version_it_holds(tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path)
    settings = RolloutSettings("trunk", 2, "tangent", Kernel("cps", 0.5, 4.0))
    worker = SyncedRolloutWorker(str(tmp_path), None, settings, lambda: WORLD, 0)
    with pytest.raises(ValueError, match="asked for weights 1, but this rollout worker holds 0"):
        worker.rollout(0, [0], 1)
    weights = pack(tiny_policy(seed=1).state_dict(), 1)
    assert worker.load_weights(weights) == weights.digest
    groups, replays = worker.rollout(0, [0], 1)
    assert {g.version for g in groups} == {1} and len(replays) == 1
    damaged = replace(weights, digest="0" * 32)
    with pytest.raises(ValueError, match="arrived damaged"):
        worker.load_weights(damaged)
