"""The DeepSpeed learner: what it learns from, and that ranks, micro-batches and a resume do not change it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import plans, prompts, tiny_policy

from policy.causal import freeze
from policy.policy import load_policy
from policy.transition import Kernel
from rl.learner import Learner, LearnerSettings
from rl.weights import install
from rollout.group import GroupSampler, RolloutSettings

KERNEL = Kernel("cps", 0.5, 4.0)
DEFAULTS = LearnerSettings(
    lr=1e-3,
    decay_iterations=None,
    betas=(0.9, 0.99),
    eps=1e-6,
    weight_decay=0.0,
    grad_clip=1.0,
    beta=3.0,
    kl_target=None,
    clip=0.2,
    ratio_norm=False,
    ema=0.5,
    equalise_steps=True,
    micro_batch=4,
    updates_per_rollout=1,
    zero_stage=0,
    bf16=False,
    freeze=(),
    ratio_tolerance=1e-5,
    max_staleness=3,
    weight_cap=5.0,
)


def settings(**changed) -> LearnerSettings:
    return replace(DEFAULTS, **changed)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tiny_policy().save(path)
    return str(path)


@pytest.fixture(scope="module")
def experience(policy_path):
    """Replays of four prompts in two chunks, and advantages that are known."""
    sampler = GroupSampler(load_policy(policy_path), RolloutSettings("trunk", 4, "tangent", KERNEL))
    chunks, advantages, rng = [], {}, np.random.default_rng(0)
    for first in (0, 2):
        asked = prompts(2, first)
        groups, replays = sampler.rollout(asked, plans(asked, "trunk"), 0)
        chunks.append(replays)
        for group in groups:
            advantages[group.group_id] = {b: rng.normal(size=4).astype(np.float32) for b in group.blocks}
    return chunks, advantages


def alone(policy_path: str, **changed) -> Learner:
    learner = Learner(policy_path, None, KERNEL, settings(**changed), 1)
    learner.join(0, learner.address())
    return learner


def state(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.policy.state_dict().items()}


def distance(a: dict, b: dict) -> float:
    return max((torch.as_tensor(a[k]) - torch.as_tensor(b[k])).abs().max().item() for k in a)


def test_an_update_changes_the_weights_and_reports_a_ratio_of_one(policy_path, experience):
    learner = alone(policy_path)
    before = state(learner)
    stats = learner.update(*experience)
    assert stats["ratio_deviation"] <= 1e-5
    assert stats["ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["kl"] == 0 and stats["grad_norm"] > 0
    assert distance(before, state(learner)) > 1e-5
    assert learner.version == 1


def test_groups_that_were_not_scored_teach_nothing(policy_path, experience):
    learner = alone(policy_path)
    before = state(learner)
    learner.update(experience[0], {})
    assert distance(before, state(learner)) == 0


def test_frozen_weights_stay_and_all_others_move(policy_path, experience):
    learner = alone(policy_path, freeze=("*.ffn.*", "patch_embedding.*"))
    before = state(learner)
    learner.update(*experience)
    moved = {name for name, after in state(learner).items() if not torch.equal(after, before[name])}
    assert not [name for name in moved if ".ffn." in name or name.startswith("patch_embedding")]
    assert {"proj_out.weight", "blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"} <= moved


@pytest.mark.parametrize(
    "patterns, message", [(("*.fnn.*",), r"'\*\.fnn\.\*' matches no weight"), (("*",), "nothing to train")]
)
def test_a_freeze_that_cannot_be_meant_is_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        freeze(tiny_policy().net.model, patterns)


def test_the_learning_rate_falls_linearly_to_nothing(policy_path, experience):
    learner = alone(policy_path, lr=1e-3, decay_iterations=2, ratio_tolerance=math.inf)
    rates, states = [], []
    for _ in range(3):
        rates.append(learner.update(*experience)["lr"])
        states.append(state(learner))
    assert rates == [1e-3, 5e-4, 0.0]
    assert disagreement(policy_path, states[0], states[1]) > 0 and disagreement(policy_path, states[1], states[2]) == 0


def test_micro_batches_leave_the_update_unchanged(policy_path, experience):
    one, four = alone(policy_path, micro_batch=1), alone(policy_path, micro_batch=4)
    one.update(*experience)
    four.update(*experience)
    assert disagreement(policy_path, state(one), state(four)) < 1e-3
    different = alone(policy_path, micro_batch=4)
    different.update(experience[0][:1], experience[1])
    assert disagreement(policy_path, state(different), state(four)) > 0.1


def test_a_rollout_of_another_policy_is_refused(policy_path, experience):
    learner = alone(policy_path)
    with torch.no_grad():
        learner.policy.net.model.proj_out.weight.mul_(1.01)
    with pytest.raises(ValueError, match="replay and rollout disagree"):
        learner.update(*experience)


def test_a_policy_that_became_nan_is_refused_too(policy_path, experience):
    learner = alone(policy_path)
    with torch.no_grad():
        learner.policy.net.model.proj_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="replay and rollout disagree"):
        learner.update(*experience)


def test_a_group_that_is_too_old_or_of_the_future_is_refused(policy_path, experience):
    learner = alone(policy_path, max_staleness=1)
    learner.update(*experience)
    learner.update(*experience)
    with pytest.raises(ValueError, match=r"groups of 2 to 2 updates ago .* async.max_staleness=1"):
        learner.update(*experience)
    learner.version = -1
    with pytest.raises(ValueError, match="groups of -1 to -1 updates ago"):
        learner.update(*experience)


def test_a_stale_group_is_weighed_and_its_deviation_told(policy_path, experience):
    fresh, capped = alone(policy_path), alone(policy_path, weight_cap=1.0)
    assert fresh.update(*experience)["behaviour_weight"] == 1
    stats = fresh.update(*experience)
    assert stats["ratio_deviation"] > 1e-5 and stats["ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(stats["behaviour_weight"] - 1) > 1e-6
    capped.update(*experience)
    assert capped.update(*experience)["behaviour_weight"] < min(1, stats["behaviour_weight"])
    assert distance(state(fresh), state(capped)) > 0


def test_the_learner_keeps_the_weights_that_groups_under_way_come_from(policy_path, experience, tmp_path):
    learner = alone(policy_path)
    digests = [learner.weights().digest]
    for _ in range(2):
        learner.update(*experience)
        digests.append(learner.weights().digest)
    learner.save(str(tmp_path))
    assert alone(policy_path, max_staleness=0).load(str(tmp_path)) == [0, 1, 2]
    resumed = alone(policy_path)
    assert resumed.load(str(tmp_path)) == [0, 1, 2]
    assert [resumed.weights(version=v).digest for v in range(3)] == digests and len({*digests}) == 3
    for _ in range(2):
        resumed.update(*experience)
    resumed.weights()
    with pytest.raises(ValueError, match=r"has the weights of versions \[1, 2, 3, 4\], not those of 0"):
        resumed.weights(version=0)


def test_several_updates_on_one_rollout_move_the_ratio(policy_path, experience):
    learner = alone(policy_path, updates_per_rollout=3, clip=1e-4)
    stats = learner.update(*experience)
    assert stats["ratio_deviation"] <= 1e-5
    assert stats["clip_fraction"] > 0 and abs(stats["ratio"] - 1) > 1e-6
    assert stats["kl"] > 0


def test_a_resumed_learner_goes_on_bit_for_bit(policy_path, experience, tmp_path):
    straight = alone(policy_path)
    straight.update(*experience)
    straight.save(str(tmp_path))
    straight.settings = settings(ratio_tolerance=10.0)
    resumed = alone(policy_path, ratio_tolerance=10.0)
    assert resumed.load(str(tmp_path)) == [0, 1]
    straight.update(*experience)
    resumed.update(*experience)
    assert distance(state(straight), state(resumed)) == 0
    assert distance(straight.averaged, resumed.averaged) == 0
    fresh = alone(policy_path, ratio_tolerance=10.0)
    fresh.update(*experience)
    assert distance(state(straight), state(fresh)) > 1e-5


class Planted:
    ran = False

    def __reduce__(self):
        return setattr, (Planted, "ran", True)


def test_a_checkpoint_that_holds_code_is_refused_before_it_runs(policy_path, experience, tmp_path):
    learner = alone(policy_path, zero_stage=2)
    learner.update(*experience)
    learner.save(str(tmp_path))
    learner.load(str(tmp_path))
    [path] = (tmp_path / "learner" / "engine").glob("*optim_states.pt")
    kept = torch.load(path, weights_only=False)
    torch.save({**kept, "note": Planted()}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        learner.load(str(tmp_path))
    assert not Planted.ran
    torch.load(path, weights_only=False)
    assert Planted.ran  # the trap is one


def test_the_weights_that_leave_the_learner_arrive_with_the_same_digest(policy_path, experience):
    learner = alone(policy_path)
    first = learner.weights()
    learner.update(*experience)
    second = learner.weights()
    assert first.digest != second.digest
    policy = load_policy(policy_path)
    assert install(policy, second) == second.digest


def disagreement(policy_path: str, a: dict, b: dict) -> float:
    """Length of the difference of two updates relative to the update."""
    start = load_policy(policy_path).state_dict()
    flat = [torch.cat([(torch.as_tensor(w[k]) - start[k]).flatten() for k in start]) for w in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[0].norm()).item()
