from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from tiny import SETTINGS, WORLD, difference, plans, prompts, tiny_policy

from policy.transition import Kernel
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import SELECTS, NoisePlan
from rollout.sampler import Sampler
from rollout.worker import RolloutWorker

BLOCKS = {1: range(1, 3), 2: range(3, 5), 3: range(5, 7), 4: range(7, 9)}
"""The video frames of each generated block."""


def settings(select="trunk", explore="tangent", group_size=4, **changed):
    kernel = Kernel(amplitude=4.0 if explore == "tangent" else 1.0)
    return RolloutSettings(select, group_size, explore, kernel, cell=2, **changed)


def rolled(settings, count=2, plan=lambda plan: plan, **policy):
    some = prompts(count)
    made = [plan(p) for p in plans(some, settings.select)]
    groups, replays = GroupSampler(tiny_policy(**policy), settings).rollout(some, made, version=7)
    return some, made, groups, replays


def apart(a, b):
    """Largest difference of two pictures in grey levels; rounding in another batch shape can cost one."""
    return np.abs(a.astype(int) - b.astype(int)).max()


class OneNoise(NoisePlan):
    """Every member draws the first member's noise."""

    def exploration(self, block, step, member):
        return super().exploration(block, step, 0)


def one_noise(plan):
    return OneNoise(plan.key, plan.selected)


@pytest.mark.parametrize("select", SELECTS)
def test_groups_and_replays_have_the_shapes_of_their_mode(select):
    some, made, groups, replays = rolled(settings(select))
    frames = SETTINGS.frames
    for group in groups:
        assert group.shared.dtype == group.members.dtype == np.uint8 and group.version == 7
        np.testing.assert_array_equal(group.shared[0], group.prompt.first_frame)
    if select == "trunk":
        assert len(groups) == 8 and len(replays) == 2
        by_id = {g.group_id: g for g in groups}
        for p, block in product(some, (1, 2, 3, 4)):
            group = by_id[f"0/0/{p.id}/block{block}"]
            assert group.blocks == {block: BLOCKS[block]} and len(group.shared) == BLOCKS[block].start
            assert group.prompt is p and group.members.shape == (4, 2, 32, 32, 3)
        assert all([(a.block, a.step) for a in r.actions] == list(p.selected) for p, r in zip(made, replays))
    if select == "video":
        assert len(groups) == len(replays) == 2
        for group in groups:
            ((block, own),) = group.blocks.items()
            assert own == BLOCKS[block] and own.start == len(group.shared) == frames - group.members.shape[1]
    if select in ("frame", "all"):
        assert len(groups) == 2 and len(replays) == 8 and len({g.group_id for g in groups}) == 2
        assert all(g.members.shape == (4, frames - 1, 32, 32, 3) for g in groups)
        assert all(g.blocks == BLOCKS for g in groups)
        assert [r.actions[0].members for r in replays] == [(0,), (1,), (2,), (3,)] * 2
        assert {len(r.actions) for r in replays} == {4 if select == "frame" else 8}
    taken = {(a.group_id, a.block, a.step, m) for r in replays for a in r.actions for m in a.members}
    assert len(taken) == sum(a.logp.numel() for r in replays for a in r.actions)
    assert {a.group_id for r in replays for a in r.actions} == {g.group_id for g in groups}


@pytest.mark.parametrize(("explore", "renoise"), [("tangent", False), ("coarse", False), ("white", True)])
@pytest.mark.parametrize("select", SELECTS)
def test_members_differ_in_the_selected_noise_alone(select, explore, renoise):
    chosen = settings(select, explore, group_size=3, renoise=renoise)
    _, _, groups, _ = rolled(chosen, plan=one_noise)
    assert all(apart(g.members, g.members[:1]) <= 1 for g in groups)
    _, _, groups, _ = rolled(chosen)
    assert all(apart(g.members[a], g.members[b]) > 5 for g in groups for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("select", ["trunk", "video"])
def test_a_group_shares_its_state_and_its_members_sample_around_one_mean(select):
    _, _, _, replays = rolled(settings(select, "white", group_size=64))
    for action in (a for r in replays for a in r.actions):
        assert action.x.shape[0] == 1 and action.coordinates.shape[:2] == (1, 64)
        _, std = Kernel().moments(action.x, action.x, action.s, action.s2)
        spread = action.coordinates.std(1)
        assert abs(spread.mean() / std - 1) < 0.05


def test_the_trunk_is_what_the_policy_generates_when_it_is_deployed():
    some, made, groups, replays = rolled(settings("trunk"))
    policy = tiny_policy()
    sampler = Sampler(policy)
    videos = sampler.generate(some, made)
    assert videos.shape == (2, 9, 32, 32, 3)
    for prompt, video in zip(some, videos):
        twigs = next(g for g in groups if g.group_id == f"0/0/{prompt.id}/block4")
        assert apart(twigs.shared, video[:7]) <= 1
        assert apart(twigs.members[0], video[7:]) > 5
    decoded, _ = sampler.decode(sampler.begin(some)[0], torch.cat([r.history for r in replays])[:, :, 1:])
    assert apart(decoded, videos[:, 1:7]) <= 1


@pytest.mark.parametrize("select", SELECTS)
def test_a_result_does_not_depend_on_which_prompts_are_rolled_out_together(select):
    chosen = settings(select, group_size=2)
    some, made, groups, replays = rolled(chosen, count=3)
    sampler = GroupSampler(tiny_policy(), chosen)
    together = {g.group_id: g for g in groups}
    actions = {(a.group_id, a.members, a.block, a.step): a for r in replays for a in r.actions}
    for i in (2, 0, 1):
        groups, replays = sampler.rollout(some[i : i + 1], made[i : i + 1], version=7)
        for group in groups:
            other = together.pop(group.group_id)
            assert apart(group.members, other.members) <= 1 and apart(group.shared, other.shared) <= 1
            assert group.seed == other.seed
        for action in (a for r in replays for a in r.actions):
            other = actions.pop((action.group_id, action.members, action.block, action.step))
            assert difference(action.coordinates, other.coordinates) < 1e-3
            assert difference(action.x, other.x) < 1e-3
    assert not together and not actions


@pytest.mark.parametrize("select", SELECTS)
def test_no_two_members_of_any_group_draw_the_same_noise(select):
    _, _, _, replays = rolled(settings(select, "white", group_size=3))
    drawn = []
    for action in (a for r in replays for a in r.actions):
        z = action.coordinates[0, :, 0, 0, 0, 0]
        drawn += z.tolist()
    assert len(set(drawn)) == len(drawn) >= 6


@pytest.mark.parametrize("select", ["trunk", "frame"])
def test_antithetic_members_lie_opposite_each_other(select):
    _, _, _, replays = rolled(settings(select, antithetic=True), count=1)
    first = [a for r in replays for a in r.actions if a.block == 1]
    coordinates = torch.cat([a.coordinates[0] for a in first])
    a, b, c, d = coordinates
    assert difference(a + b, c + d) < 1e-4
    assert difference(a + c, b + d) > 1e-2


def test_a_horizon_lets_twigs_run_on():
    _, _, short, _ = rolled(settings("trunk"), count=1)
    _, _, long, _ = rolled(settings("trunk", horizon=2), count=1)
    assert [g.members.shape[1] for g in long] == [6, 6, 4, 2]
    for a, b in zip(short, long):
        assert apart(a.members, b.members[:, :2]) <= 1 and apart(a.shared, b.shared) == 0
    assert apart(long[0].members[:, 2:], long[0].members[:1, 2:]) > 2  # what came later saw the twig's own past


def test_noise_moves_its_own_block_and_later_ones_alone():
    loud = replace(settings("frame"), kernel=Kernel(amplitude=16.0))
    some, made, groups, _ = rolled(loud, plan=lambda plan: replace(plan, selected=((3, 1),)))
    for group, video in zip(groups, Sampler(tiny_policy()).generate(some, made)):
        away = [apart(group.members[:, t], video[t + 1]) for t in range(8)]
        assert max(away[:4]) <= 1 and min(away[4:6]) > 5 and min(away[6:]) > 2


def test_unselected_steps_of_a_renoising_sampler_draw_what_the_group_shares():
    _, made, plain, _ = rolled(settings("trunk"))
    _, _, fresh, _ = rolled(settings("trunk", renoise=True))
    assert apart(plain[-1].shared, fresh[-1].shared) > 5
    sampler = Sampler(tiny_policy(), renoise=True)
    x = torch.zeros(2, 8, 2, 4, 4)
    moved = sampler.advance(x, x, 0, made, block=1)
    noise = torch.stack([p.renoise(1, 0, (8, 2, 4, 4)) for p in made])
    assert difference(moved, sampler.levels[0][1] * noise) < 1e-6
    assert not sampler.advance(x, x, 2, made, block=1).any()  # the last step draws nothing


@pytest.mark.parametrize("renoise", [True, False])
def test_a_twig_leaves_the_path_of_the_deployed_policy_in_the_subspace_alone(renoise):
    faint = replace(settings("trunk", renoise=renoise), kernel=Kernel(eta=1.0, amplitude=1e-6))
    some, made, groups, _ = rolled(faint, count=1)
    away = {}
    for deployed in (True, False):
        video = Sampler(tiny_policy(), deployed).generate(some, made)[0]
        twigs = groups[0]  # of the first block, before which both are the same
        away[deployed] = np.abs(twigs.members[0].astype(int) - video[1:3]).mean()
    assert away[renoise] < 0.2 * away[not renoise]


def test_the_first_frame_and_the_prompt_decide_the_video():
    policy, some = tiny_policy(), prompts(2)
    sampler, made = Sampler(policy), plans(some, "trunk")
    video = sampler.generate(some[:1], made[:1])[0]
    np.testing.assert_array_equal(video, sampler.generate(some[:1], made[:1])[0])
    dragged = replace(some[0], tracks=some[0].tracks * np.float32([1, 0.5]))
    assert apart(video, sampler.generate([dragged], made[:1])[0]) > 5
    assert apart(video, sampler.generate(some[:1], made[1:])[0]) > 5


def test_a_worker_rolls_out_the_prompts_of_its_source_with_the_weights_it_is_asked_for(tmp_path):
    tiny_policy().save(tmp_path)
    worker = RolloutWorker(str(tmp_path), None, settings(), lambda: WORLD, seed=0)
    groups, replays = worker.rollout(iteration=0, indices=[0, 1], version=0)
    expected = {g.group_id: g for g in rolled(settings())[2]}
    assert len(replays) == 2 and {g.group_id for g in groups} == expected.keys()
    assert all(apart(g.members, expected[g.group_id].members) <= 1 for g in groups)
    with pytest.raises(ValueError, match="asked for weights 1, but this rollout worker holds 0"):
        worker.rollout(iteration=0, indices=[0], version=1)
    films, alone = worker.generate("heldout", [4, 2], noise_seed=5), worker.generate("heldout", [2], noise_seed=5)
    assert apart(films.videos[1], alone.videos[0]) <= 1
    assert apart(films.videos[1], worker.generate("heldout", [2], noise_seed=6).videos[0]) > 5
    np.testing.assert_array_equal(films.truths[1], WORLD.truth(alone.prompts[0]))


def test_the_videos_that_a_prompt_needs_no_more_are_not_generated():
    early = rolled(settings("video"), plan=lambda plan: replace(plan, selected=((1, 0),)))
    late = rolled(settings("video"), plan=lambda plan: replace(plan, selected=((4, 1),)))
    assert [r.history.shape[2] for r in early[3]] == [1, 1] and [r.history.shape[2] for r in late[3]] == [7, 7]
    mixed = iter((((1, 0),), ((4, 1),)))
    _, _, groups, replays = rolled(settings("video"), plan=lambda plan: replace(plan, selected=next(mixed)))
    assert [r.history.shape[2] for r in replays] == [1, 7]
    assert apart(groups[0].members, early[2][0].members) <= 1 and apart(groups[1].members, late[2][1].members) <= 1


@torch.no_grad()
def test_forks_read_the_cache_of_their_parents():
    policy, some = tiny_policy(), prompts(2)
    sampler = Sampler(policy)
    stream, _ = sampler.begin(some)
    x, parents = torch.randn(5, 8, 2, 4, 4), torch.tensor([1, 0, 0, 1, 1])
    control = sampler.control(stream)[parents]
    v = sampler.velocity(stream, x, 0.5, control, parents)
    assert difference(v, sampler.velocity(stream.rows(parents), x, 0.5)) < 1e-6
    assert difference(v, sampler.velocity(stream, x, 0.5, control, parents.flip(0) * 0)) > 1e-3


@pytest.mark.slow
def test_compiled_blocks_roll_out_the_same_without_a_break_in_their_graph():
    some, chosen = prompts(2), settings("trunk")
    made, policy = plans(some, "trunk"), tiny_policy()
    _, plain = GroupSampler(policy, chosen).rollout(some, made, 0)
    policy.net.model.compile_repeated_blocks(dynamic=True, fullgraph=True, backend="aot_eager")
    _, compiled = GroupSampler(policy, chosen).rollout(some, made, 0)
    for a, b in zip((a for r in plain for a in r.actions), (a for r in compiled for a in r.actions)):
        assert difference(a.coordinates, b.coordinates) < 1e-4 and difference(a.x, b.x) < 1e-5


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"rollout.explore='pink' is none of tangent, coarse, white"):
        settings(explore="pink")
    with pytest.raises(ValueError, match=r"rollout.antithetic needs an even rollout.group_size, not 3"):
        settings(antithetic=True, group_size=3)
