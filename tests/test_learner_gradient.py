"""The gradient that the learner steps along: what leaves it as it is, and what the objective's options make of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_learner import KERNEL, alone, distance, experience, policy_path, settings, state  # noqa: F401  (fixtures)
from tiny import plans, prompts
from wan_cases import SETTINGS, drags, write_folder

from policy.policy import PolicySource, load_policy
from policy.transition import Kernel
from rl.learner import Learner
from rl.objective import gradient_scale
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import SELECTS, make_plan
from rollout.replay import ReplayBatch


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def gradients(learner, experience) -> list[tuple[torch.Tensor, dict]]:  # noqa: F811
    """Of every optimizer step of an update: the gradient before clipping, and the weights before the step."""
    taken, step = [], learner.engine.step

    def recorded() -> None:
        if learner.engine.is_gradient_accumulation_boundary():
            taken.append((flat(p.grad for p in learner.policy.net.parameters()).clone(), state(learner)))
        step()

    learner.engine.step = recorded
    learner.update(*experience)
    return taken


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def rolled_out(policy, made, asked, select, explore, kernel):
    groups, replays = GroupSampler(policy, RolloutSettings(select, 4, explore, kernel)).rollout(asked, made, 0)
    rng = np.random.default_rng(0)
    return [replays], {g.group_id: {b: rng.normal(size=4).astype(np.float32) for b in g.blocks} for g in groups}


@pytest.mark.parametrize("select", SELECTS)
def test_micro_batches_leave_the_gradient_unchanged(policy_path, select):  # noqa: F811
    asked = prompts(3)
    seen = rolled_out(load_policy(policy_path), plans(asked, select), asked, select, "white", Kernel())

    def gradient(micro_batch: int, experience) -> torch.Tensor:  # noqa: F811
        learner = Learner(policy_path, None, Kernel(), settings(micro_batch=micro_batch, beta=0.0), 1)
        learner.join(0, learner.address())
        return gradients(learner, experience)[0][0]

    whole = gradient(8, seen)
    assert apart(gradient(1, seen), whole) < 1e-6
    assert apart(gradient(1, ([seen[0][0][:-1]], seen[1])), whole) > 0.01


def test_gradient_checkpointing_leaves_the_gradient_unchanged(tmp_path):
    write_folder(tmp_path / "wan", in_channels=36)
    source = PolicySource(str(tmp_path / "wan"), replace(SETTINGS, text_cache=str(tmp_path / "texts")))
    policy = load_policy(source)
    asked = drags(2, policy)
    made = [make_plan(0, 0, p.id, "trunk", len(policy.sizes) - 1, len(policy.sigmas) - 1) for p in asked]
    seen = rolled_out(policy, made, asked, "trunk", "white", Kernel())
    found = []
    for checkpointing in (False, True):
        changed = replace(source, wan=replace(source.wan, gradient_checkpointing=checkpointing))
        learner = Learner(changed, None, Kernel(), settings(updates_per_rollout=2), 1)
        learner.join(0, learner.address())
        assert learner.policy.net.model.is_gradient_checkpointing == checkpointing
        found.append(gradients(learner, seen))
    (first, second), (again, _) = found
    assert apart(again[0], first[0]) < 1e-6 < 1e-2 < apart(second[0], first[0])


def by_hand(policy_path, weights, experience, clip):  # noqa: F811
    """The gradient of the clipped objective at other weights, a member at a time, and the share that is clipped."""
    policy, total, clipped, count = load_policy(policy_path), torch.zeros(()), [], 0
    policy.load_state_dict(weights)
    for replay in (replay for chunk in experience[0] for replay in chunk):
        batch = ReplayBatch((replay,))
        ratios = (batch.log_probs(KERNEL, batch.velocity(policy, policy.net)) - batch.rollout_log_probs()).exp()
        for action, row in zip(replay.actions, ratios):
            count += 1
            for ratio, advantage in zip(row, experience[1][action.group_id][action.block]):
                clipped.append(abs(ratio.item() - 1) > clip)
                gone = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
                total = total - (0 if gone else ratio * float(advantage)) / len(row)
    return flat(torch.autograd.grad(total / count, list(policy.net.parameters()), allow_unused=True)), np.mean(clipped)


def test_a_second_update_starts_where_the_first_ended_and_clips_what_has_gone_far_enough(policy_path, experience):  # noqa: F811
    learner = alone(policy_path, updates_per_rollout=2, clip=2e-3, beta=0.0, equalise_steps=False)
    (first, start), (second, between) = gradients(learner, experience)
    assert distance(start, load_policy(policy_path).state_dict()) == 0 < distance(start, between)
    assert apart(first, by_hand(policy_path, start, experience, 2e-3)[0]) < 1e-4
    expected, share = by_hand(policy_path, between, experience, 2e-3)
    assert 0.1 < share < 0.9 and apart(second, expected) < 1e-3
    assert apart(second, by_hand(policy_path, between, experience, math.inf)[0]) > 0.1


def test_the_normalised_ratio_has_the_plain_ones_gradient_until_the_policy_moves(policy_path, experience):  # noqa: F811
    taken = [gradients(alone(policy_path, ratio_norm=on, updates_per_rollout=2), experience) for on in (False, True)]
    assert apart(taken[1][0][0], taken[0][0][0]) < 1e-5
    assert apart(taken[1][1][0], taken[0][1][0]) > 1e-5
    unscaled = gradients(alone(policy_path, ratio_norm=True, equalise_steps=False), experience)[0][0]
    assert apart(unscaled, taken[0][0][0]) > 0.1 and gradient_scale(KERNEL, 1.0, 0.5, True) == pytest.approx(2.0)


def test_without_a_divergence_there_is_no_reference_to_run(policy_path, experience):  # noqa: F811
    without, with_it = (alone(policy_path, beta=beta, ratio_tolerance=math.inf) for beta in (0.0, 3.0))
    first, second = ([gradients(learner, experience)[0][0] for learner in (without, with_it)] for _ in range(2))
    assert apart(*first) < 1e-6 < 1e-3 < apart(*second)  # the policy is the reference at first
    assert without.reference is None and math.isnan(without.update(*experience)["kl"])
    assert with_it.update(*experience)["kl"] > 0


def test_an_adapted_weight_of_the_divergence_survives_a_resume(policy_path, experience, tmp_path):  # noqa: F811
    changed = {"kl_target": 1e-9, "ratio_tolerance": 10.0}
    straight = alone(policy_path, **changed)
    assert [straight.update(*experience)["beta"] for _ in range(3)] == [3.0, pytest.approx(2.94), pytest.approx(2.9988)]
    straight.save(str(tmp_path))
    resumed = alone(policy_path, **changed)
    resumed.load(str(tmp_path))
    assert resumed.beta == straight.beta > 3.0
    assert straight.update(*experience)["beta"] == resumed.update(*experience)["beta"]
    assert distance(state(straight), state(resumed)) == 0
    fixed = alone(policy_path, ratio_tolerance=10.0, beta=2.0)
    fixed.load(str(tmp_path))
    assert fixed.beta == 2.0
    fixed.update(*experience)
    assert distance(state(straight), state(fixed)) > 1e-6
