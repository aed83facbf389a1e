from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from tiny import difference, noise, plans, prompts, tiny_policy

from policy.transition import Kernel
from rl.objective import clipped_ratio_loss
from rollout.group import EXPLORES, GroupSampler, RolloutSettings
from rollout.plan import SELECTS
from rollout.records import Replay
from rollout.replay import ReplayBatch, batches, in_parts

MEMBERS = 4
WINDOWS = [{"window": None, "sink": 0}, {"window": 4, "sink": 1}]


def settings(select, explore="tangent"):
    return RolloutSettings(select, MEMBERS, explore, Kernel(amplitude=4.0 if explore == "tangent" else 1.0), cell=2)


def replays_of(policy, settings, count=3):
    some = prompts(count)
    return GroupSampler(policy, settings).rollout(some, plans(some, settings.select), 0)[1]


def deviation(policy, kernel, replays, size):
    """Largest |ratio - 1| between replay and rollout, batched by `size`."""
    worst = 0.0
    for indices in batches(replays, size):
        batch = ReplayBatch(tuple(replays[i] for i in indices))
        scored = batch.log_probs(kernel, batch.velocity(policy, policy.net))
        worst = max(worst, ((scored - batch.rollout_log_probs()).exp() - 1).abs().max().item())
    return worst


@pytest.mark.parametrize("explore", EXPLORES)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@torch.no_grad()
def test_replay_equals_rollout_in_any_batch_shape(window, select, explore):
    policy, chosen = tiny_policy(**window), settings(select, explore)
    replays = replays_of(policy, chosen)
    assert all(deviation(policy, chosen.kernel, replays, size) <= 1e-5 for size in (1, 2, 5))


def shift(replay, control=0, step=0.0, history=1.0):
    """The replay with its control rolled in time, its noise level raised, its history scaled."""
    actions = tuple(replace(a, s=a.s + step) for a in replay.actions)
    return Replay(replay.history * history, replay.control.roll(control, 2), replay.text, actions, replay.version)


@pytest.mark.parametrize("wrong", [{"control": 1}, {"step": 0.05}, {"history": 0.0}], ids=str)
@pytest.mark.parametrize("select", SELECTS)
@torch.no_grad()
def test_a_replay_of_something_else_shows(select, wrong):
    policy, chosen = tiny_policy(), settings(select)
    replays = [shift(r, **wrong) for r in replays_of(policy, chosen)]
    assert deviation(policy, chosen.kernel, replays, 2) > 1e-3


@torch.no_grad()
def test_a_replay_by_other_weights_or_another_window_shows():
    policy, chosen = tiny_policy(), settings("trunk")
    replays = replays_of(policy, chosen)
    assert deviation(policy, chosen.kernel, replays, 2) <= 1e-5
    assert deviation(tiny_policy(window=3, sink=1), chosen.kernel, replays, 2) > 1e-3
    for p in policy.net.parameters():
        p.mul_(1.01)
    assert deviation(policy, chosen.kernel, replays, 2) > 1e-3


class Instrumented(GroupSampler):
    """Adds a variable to the network's output at every (block, step), to take gradients with respect to it."""

    def __init__(self, policy, settings):
        super().__init__(policy, settings)
        self.outputs = {}

    def _velocities(self, stream, x, s, parents, at):
        v, moved = super()._velocities(stream, x, s, parents, at)
        step = [level for level, _ in self.sampler.levels].index(s)
        return v + self.outputs.setdefault((stream.block, step), torch.zeros(1, requires_grad=True)), moved


def learnt(policy, groups, replays):
    """The (block, step) outputs that the learner's log-probs depend on, streamed ones and those it evaluates."""
    total = torch.zeros(())
    for replay in replays:
        batch = ReplayBatch((replay,))
        v = batch.velocity(policy, policy.net)
        v = torch.stack([out + groups.outputs[a.block, a.step] for out, a in zip(v, replay.actions)])
        total = total + batch.log_probs(groups.settings.kernel, v).sum()
    grads = torch.autograd.grad(total, list(groups.outputs.values()), allow_unused=True)
    return {at for at, grad in zip(groups.outputs, grads) if grad is not None and grad.abs().max() > 0}


@pytest.mark.parametrize("select", SELECTS)
def test_no_other_step_than_the_selected_ones_learns(select):
    policy, some = tiny_policy(), prompts(1)
    made = plans(some, select, seed=1)
    groups = Instrumented(policy, settings(select))
    _, replays = groups.rollout(some, made, 0)
    assert learnt(policy, groups, replays) == set(made[0].selected)

    groups = Instrumented(policy, settings(select))
    _, replays = GroupSampler.rollout.__wrapped__(groups, some, made, 0)  # with the graph of the rollout kept
    assert learnt(policy, groups, replays) > set(made[0].selected)


def test_an_action_depends_on_its_own_state_alone_among_the_packed_ones():
    policy, chosen = tiny_policy(), settings("trunk")
    (replay,) = replays_of(policy, chosen, 1)
    states = [a.x.clone().requires_grad_() for a in replay.actions]
    batch = ReplayBatch((replace(replay, actions=tuple(replace(a, x=x) for a, x in zip(replay.actions, states))),))
    for j, v in enumerate(batch.velocity(policy, policy.net)):
        grads = torch.autograd.grad(v.square().sum(), states, retain_graph=True)
        assert [bool(g.any()) for g in grads] == [i == j for i in range(len(states))]


def gradient(policy, kernel, replays, advantage):
    """Of the clipped objective summed over all actions and members, flat; advantage: per (group, block, member)."""
    total = torch.zeros(())
    for replay in replays:
        batch = ReplayBatch((replay,))
        logp = batch.log_probs(kernel, batch.velocity(policy, policy.net))
        for action, new in zip(replay.actions, logp):
            a = torch.stack([advantage[action.group_id, action.block, m] for m in action.members])
            total = total + clipped_ratio_loss(new, action.logp[0], a, clip=0.1)[0].sum()
    grads = torch.autograd.grad(total, list(policy.net.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def one_by_one(replay):
    """Every member of every action as a replay of its own: as many forwards as there are members."""
    for a in replay.actions:
        for i, member in enumerate(a.members):
            own = replace(a, members=(member,), coordinates=a.coordinates[:, i : i + 1], logp=a.logp[:, i : i + 1])
            yield Replay(replay.history, replay.control, replay.text, (own,), replay.version)


@pytest.mark.parametrize("explore", EXPLORES)
@pytest.mark.parametrize("select", ["trunk", "video"])
def test_one_forward_gives_the_gradient_of_a_forward_for_every_member(select, explore):
    policy, chosen = tiny_policy(), settings(select, explore)
    replays = replays_of(policy, chosen, 2)
    keys = [(a.group_id, a.block, m) for r in replays for a in r.actions for m in a.members]
    advantage = dict(zip(keys, noise(len(keys))))
    together = gradient(policy, chosen.kernel, replays, advantage)
    apart = gradient(policy, chosen.kernel, [one for r in replays for one in one_by_one(r)], advantage)
    assert (together - apart).norm() < 1e-6 * apart.norm()
    mixed = {key: advantage[(*key[:2], (key[2] + 1) % MEMBERS)] for key in keys}
    assert (gradient(policy, chosen.kernel, replays, mixed) - apart).norm() > 0.1 * apart.norm()


@pytest.mark.parametrize("explore", EXPLORES)
@torch.no_grad()
def test_the_drift_is_what_keeps_a_log_ratio_from_being_linear_in_the_velocity(explore):
    policy, chosen = tiny_policy(), settings("trunk", explore)
    batch = ReplayBatch(tuple(replays_of(policy, chosen, 2)))
    old = batch.velocity(policy, policy.net)
    step, kernel = noise(*old.shape), chosen.kernel
    ratios = [batch.log_probs(kernel, old + k * step) - batch.log_probs(kernel, old) for k in (1, 2)]
    once, twice = (ratio + batch.drift(kernel, old + k * step, old) for k, ratio in zip((1, 2), ratios))
    assert difference(2 * once, twice) < 1e-4 * twice.abs().max()
    assert difference(2 * ratios[0], ratios[1]) > 1e-2 * twice.abs().max()
    assert not batch.drift(kernel, old, old).any()


def test_replays_of_different_layouts_are_not_batched():
    policy = tiny_policy()
    trunk, frame = (replays_of(policy, settings(select), 1)[0] for select in ("trunk", "frame"))
    with pytest.raises(ValueError, match="different signatures"):
        ReplayBatch((trunk, frame))


@budget(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), max_size=12), st.integers(1, 5))
def test_batches_hold_every_replay_once_with_its_like_and_in_order(lengths, size):
    replays = [Replay(torch.zeros(1, 1, n, 1, 1), torch.zeros(1), torch.zeros(1), (), 0) for n in lengths]
    made = batches(replays, size)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    for batch in made:
        assert 1 <= len(batch) <= size and batch == sorted(batch)
        assert len({lengths[i] for i in batch}) == 1
    assert len(made) == sum(-(-lengths.count(n) // size) for n in set(lengths))


def test_batches_are_halved_until_there_are_as_many_as_asked_for():
    assert in_parts([[0, 1, 2, 3], [4]], 2) == [[0, 1, 2, 3], [4]]
    assert in_parts([[0, 1, 2, 3], [4]], 4) == [[0], [1], [2, 3], [4]]
    with pytest.raises(ValueError, match="2 replays cannot be learnt from in 3 passes"):
        in_parts([[0, 1]], 3)
