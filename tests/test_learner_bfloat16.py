"""A tiny random Wan of bfloat16: what learns is what rolls out, and the average is finer than the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_learner import distance, settings, state
from wan_cases import SETTINGS, drags, write_folder

from policy.policy import PolicySource, load_policy
from policy.transition import Kernel
from rl.learner import Learner
from rl.weights import install
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import make_plan


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    home = tmp_path_factory.mktemp("wan")
    write_folder(home / "wan", in_channels=36)
    return PolicySource(str(home / "wan"), replace(SETTINGS, dtype="bfloat16", text_cache=str(home / "texts")))


@pytest.fixture(scope="module")
def experience(source):
    policy, rng = load_policy(source), np.random.default_rng(0)
    asked = drags(2, policy)
    plans = [make_plan(0, 0, p.id, "trunk", len(policy.sizes) - 1, len(policy.sigmas) - 1) for p in asked]
    groups, replays = GroupSampler(policy, RolloutSettings("trunk", 4, "white", Kernel())).rollout(asked, plans, 0)
    return [replays], {g.group_id: {b: rng.normal(size=4).astype(np.float32) for b in g.blocks} for g in groups}


def learner(source, stage=1, **changed) -> Learner:
    made = Learner(source, None, Kernel(), settings(bf16=True, zero_stage=stage, ratio_tolerance=1.0, **changed), 1)
    made.join(0, made.address())
    return made


@pytest.mark.parametrize("stage", [1, 2])
def test_what_learns_is_the_policy_that_rolled_out_weight_by_weight(source, experience, stage):
    made, rolled = learner(source, stage), load_policy(source).state_dict()
    assert distance(made.policy.state_dict(), rolled) == 0
    assert {name: p.dtype for name, p in made.policy.state_dict().items()} == {n: p.dtype for n, p in rolled.items()}
    assert {p.dtype for p in rolled.values()} == {torch.bfloat16, torch.float32}
    before = state(made)
    stats = made.update(*experience)
    assert stats["kl"] == 0 and stats["grad_norm"] > 0 and stats["ratio_deviation"] < 1e-3
    moved = {p.dtype for name, p in state(made).items() if (p != before[name]).any()}
    assert moved == {torch.bfloat16, torch.float32}
    assert made.update(*experience)["kl"] > 0


def test_the_gradients_length_is_that_of_its_own_update(source, experience):
    wan = replace(source.wan, dtype="float32", text_cache=source.wan.text_cache + "32")
    plain = Learner(replace(source, wan=wan), None, Kernel(), settings(ratio_tolerance=1.0), 1)
    plain.join(0, plain.address())
    made = learner(source, lr=0.03)
    first, second = (made.update(*experience)["grad_norm"] for _ in range(2))
    assert first == pytest.approx(plain.update(*experience)["grad_norm"], rel=0.02)
    assert second != pytest.approx(first, rel=0.02)


def test_the_average_moves_by_less_than_a_step_of_bfloat16(source, experience, tmp_path):
    made = learner(source, ema=0.999, lr=1e-2)
    before = state(made)
    made.update(*experience)
    now = state(made)
    for name, average in made.averaged.items():
        expected = before[name].float().lerp(now[name].float(), 0.001)
        assert average.dtype == torch.float32 and torch.equal(average, expected)
    assert any(
        (average != before[name]).any() for name, average in made.averaged.items() if now[name].dtype == torch.bfloat16
    )
    rounded = made.weights(averaged=True)
    assert install(load_policy(source), rounded) == rounded.digest
    made.save(str(tmp_path))
    saved = load_file(tmp_path / "policy.safetensors")
    assert {name: p.dtype for name, p in saved.items()} == {name: p.dtype for name, p in now.items()}
    resumed = learner(source, ema=0.999, lr=1e-2)
    resumed.load(str(tmp_path))
    for one in (made, resumed):
        one.update(*experience)
    assert distance(made.averaged, resumed.averaged) == 0 and distance(state(made), state(resumed)) == 0
