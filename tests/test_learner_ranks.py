"""Two ranks learn what one does, with weights, gradients and optimizer whole or in shards, and go on after a resume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_learner import DEFAULTS, KERNEL
from tiny import plans, prompts, tiny_policy
from wan_cases import SETTINGS, drags, write_folder

import rl.learner
from policy.lora import LoraSettings
from policy.policy import PolicySource, load_policy
from rl.fleet import FleetSpec, closing, fetch, make_fleet
from rl.learner import Learner
from rl.weights import Weights, install
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import make_plan
from rollout.replay import batches

pytestmark = pytest.mark.slow


class Seat:
    """One of two ranks, in a process of its own; one learner after the other takes it."""

    address, ranks = Learner.address, 2

    def course(self, rank, address, made, experience, folder) -> tuple[dict[str, Weights], list[dict[str, float]]]:
        """Rank 0's weights after one update, after two, their average, those after one, a resume and another, and
        after another alone; and what the updates told.
        """
        rl.learner.deepspeed_config = scattered
        learner, resumed, fresh = (Learner(*made, 2) for _ in range(3))
        found, told = {}, []
        learner.join(rank, address)
        for name in ("first", "second"):
            told.append(learner.update(*experience))
            found[name] = learner.weights()
            if name == "first":
                learner.save(folder)
        found["averaged"] = learner.weights(averaged=True)
        resumed.join(rank, address)
        assert resumed.load(folder) == [0, 1]
        fresh.join(rank, address)
        for name, other in (("resumed", resumed), ("fresh", fresh)):
            other.update(*experience)
            found[name] = other.weights()
        found["resumed averaged"] = resumed.weights(averaged=True)
        return found, told


def scattered(settings, ranks, config=rl.learner.deepspeed_config):
    """DeepSpeed's configuration with which ZeRO-3 keeps no weight whole that is not in use, however small."""
    made = config(settings, ranks)
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    made["zero_optimization"] |= {f"stage3_{name}": 0 for name in names} if settings.zero_stage == 3 else {}
    return made


@pytest.fixture(scope="module")
def seats(ray_local):
    spec = FleetSpec("learner", replicas=2, timeout_s=240, start_timeout_s=240, replace=False)
    with closing(make_fleet("ray", Seat, spec, ())) as (ranks,):
        yield ranks


def course(seats, source, experience, folder, **changed):
    """`Seat.course` of two ranks, each with one of the experience's two chunks."""
    chunks, advantages = experience
    made = (source, None, KERNEL, replace(DEFAULTS, ratio_tolerance=10.0, **changed))
    address = fetch(seats.broadcast("address")[0])
    rows = [(rank, address, made, ([chunks[rank]], advantages), str(folder)) for rank in range(2)]
    return fetch(seats.scatter("course", rows)[0])


def played(policy, asked, plans, select="trunk", explore="tangent"):
    """Replays in two chunks, and advantages that are known."""
    sampler = GroupSampler(policy, RolloutSettings(select, 4, explore, KERNEL))
    chunks, advantages, rng = [], {}, np.random.default_rng(0)
    half = len(asked) // 2
    for rows in (slice(half), slice(half, None)):
        groups, replays = sampler.rollout(asked[rows], plans[rows], 0)
        chunks.append(replays)
        advantages |= {g.group_id: {b: rng.normal(size=4).astype(np.float32) for b in g.blocks} for g in groups}
    return chunks, advantages


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tiny_policy().save(path)
    return str(path)


@pytest.fixture(scope="module")
def experience(tiny):
    asked = prompts(4)
    return played(load_policy(tiny), asked, plans(asked, "trunk"))


def alone(source, experience, **changed) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, float]]]:
    """One rank: its weights after one and two updates, and what they told."""
    learner = Learner(source, None, KERNEL, replace(DEFAULTS, ratio_tolerance=10.0, **changed), 1)
    learner.join(0, learner.address())
    states, told = [], []
    for _ in range(2):
        told.append(learner.update(*experience))
        states.append({name: p.float().clone() for name, p in learner.policy.state_dict().items()})
    return states, told


def one_sided(source, experience, **changed) -> dict[str, torch.Tensor]:
    """What one rank learns from the first chunk alone."""
    return alone(source, (experience[0][:1], experience[1]), **changed)[0][0]


def disagreement(source, a, b) -> float:
    """Length of the difference of two updates relative to the first."""
    start = {name: p.float() for name, p in load_policy(source).state_dict().items()}
    a, b = (w.tensors() if isinstance(w, Weights) else w for w in (a, b))
    flat = [torch.cat([(w[k].float() - start[k]).flatten() for k in start]) for w in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[0].norm()).item()


def check_resume(found):
    assert found["resumed"].digest == found["second"].digest != found["fresh"].digest
    assert found["resumed averaged"].digest == found["averaged"].digest != found["second"].digest


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_learn_what_one_learns_and_go_on_after_a_resume(seats, tiny, experience, tmp_path, stage):
    (first, second), told = alone(tiny, experience)
    found, told_here = course(seats, tiny, experience, tmp_path, zero_stage=stage)
    assert disagreement(tiny, first, found["first"]) < 1e-3 and disagreement(tiny, second, found["second"]) < 1e-3
    assert told_here[0]["grad_norm"] == pytest.approx(told[0]["grad_norm"], rel=1e-4)
    check_resume(found)
    assert disagreement(tiny, first, one_sided(tiny, experience)) > 0.1


def wan(tmp_path, lora=None, **changed) -> PolicySource:
    write_folder(tmp_path / "wan", in_channels=36)
    settings = replace(SETTINGS, text_cache=str(tmp_path / "texts"), **changed)
    return PolicySource(str(tmp_path / "wan"), settings, lora)


def wan_experience(source, select="trunk"):
    policy = load_policy(source)
    asked = drags(4, policy)
    made = [make_plan(0, 0, p.id, select, len(policy.sizes) - 1, len(policy.sigmas) - 1) for p in asked]
    return played(policy, asked, made, select, "white")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_a_spread_base_learn_what_they_learn_on_a_whole_one(seats, tmp_path, dtype):
    source = wan(tmp_path, LoraSettings(2, 4.0, ("to_q", "ffn.net.2")), dtype=dtype)
    experience = wan_experience(source)
    (first, second), _ = alone(source, experience)
    found, told = course(seats, source, experience, tmp_path / "saved", zero_stage=3)
    near = 1e-3 if dtype == "float32" else 0.2
    assert all("lora_" in name for name in found["first"].arrays)
    assert disagreement(source, first, found["first"]) < near and disagreement(source, second, found["second"]) < near
    assert told[0]["kl"] == 0 and told[1]["kl"] > 0  # of the same weights with their adapters off
    assert disagreement(source, first, one_sided(source, experience)) > 0.5
    check_resume(found)


def test_weights_of_bfloat16_in_shards_learn_with_float32_copies(seats, tmp_path):
    source = wan(tmp_path, dtype="bfloat16")
    experience = wan_experience(source)
    (first, _), _ = alone(source, experience, zero_stage=2, bf16=True)
    found, told = course(seats, source, experience, tmp_path / "saved", zero_stage=3, bf16=True)
    assert disagreement(source, first, found["first"]) < 0.3
    assert disagreement(source, first, one_sided(source, experience, zero_stage=2, bf16=True)) > 0.5
    assert told[0]["kl"] == 0 and told[1]["kl"] > 0
    check_resume(found)
    policy = load_policy(source)
    for name in ("second", "averaged"):
        assert install(policy, found[name]) == found[name].digest


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_whose_replays_need_different_numbers_of_passes_wait_for_each_other(seats, tiny, tmp_path, stage):
    asked = prompts(8)
    experience = played(load_policy(tiny), asked, plans(asked, "video"), "video")
    assert len({len(batches(chunk, DEFAULTS.micro_batch)) for chunk in experience[0]}) == 2
    (first, _), _ = alone(tiny, experience)
    found, _ = course(seats, tiny, experience, tmp_path, zero_stage=stage)
    assert disagreement(tiny, first, found["first"]) < 1e-3
