"""Properties over all layouts and groups: plans, masks, windows and advantages."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_causal import inputs, layouts, per_frame, streamed, wan
from tiny import difference

from policy.attention import KVCache, packed_mask, visible_from
from rl.advantage import STDS, TermWeight, advantages, best_and_worst, normalise
from rollout.plan import SELECTS, make_plan

SHAPE = (2, 1, 2, 2)
few = budget(max_examples=15, deadline=None, derandomize=True)
many = budget(max_examples=60, deadline=None, derandomize=True)


def drawn(plan, members) -> tuple:
    """All that a plan ever says, as comparable values."""
    blocks = {block for block, _ in plan.selected}
    noise = [plan.initial(block, SHAPE) for block in sorted(blocks)]
    noise += [torch.randn(SHAPE, generator=plan.exploration(b, k, g)) for b, k in plan.selected for g in range(members)]
    return plan.selected, tuple(tuple(draw.flatten().tolist()) for draw in noise)


@many
@given(
    st.integers(0, 2**31), st.sampled_from(SELECTS), st.integers(2, 4), st.integers(1, 4), st.integers(2, 5),
    st.lists(st.text(max_size=4), min_size=2, max_size=5, unique=True), st.data(),
)  # fmt: skip
def test_a_plan_is_the_same_whoever_makes_it_and_in_whatever_order(seed, select, members, blocks, steps, names, data):
    def made(name, state) -> tuple:
        torch.manual_seed(state)
        np.random.seed(state)
        return drawn(make_plan(seed, 3, name, select, blocks, steps), members)

    alone = {name: made(name, 0) for name in names}
    workers = data.draw(st.integers(1, 4))
    order = data.draw(st.permutations(names))
    shared = {name: made(name, 1 + rank) for rank in range(workers) for name in order[rank::workers]}
    assert shared == alone
    assert all(step < steps - 1 for selected, _ in alone.values() for _, step in selected)
    noise = [draw for _, draws in alone.values() for draw in draws]
    assert len(set(noise)) == len(noise)


@few
@given(layouts())
@torch.no_grad()
def test_one_packed_pass_sees_what_the_stream_sees_block_by_block(layout):
    sizes, window, sink = layout
    net = wan(window, sink)
    clean, noisy, t, text = inputs(net, sizes, batch=1)
    stream = streamed(net, clean, noisy, t, text, sizes)
    packed = net.packed(clean, noisy, per_frame(t, sizes), text, sizes, range(len(sizes)))
    assert difference(stream, packed) < 1e-5
    if len(sizes) > 1:
        later = wan(window, sink).packed(clean, noisy, per_frame(t, sizes), text, sizes, [*range(1, len(sizes)), 0])
        assert difference(stream, later) > 1e-3  # the blocks in another order are other blocks


@few
@given(layouts(), st.data())
@torch.no_grad()
def test_a_frame_changes_the_velocities_that_the_mask_lets_see_it_and_no_others(layout, data):
    sizes, window, sink = layout
    net, blocks = wan(window, sink), range(len(sizes))
    clean, noisy, t, text = inputs(net, sizes, batch=1)
    frame = data.draw(st.integers(0, sum(sizes) - 1))
    loud = clean.clone()
    loud[:, :, frame] += 3
    before, after = (net.packed(x, noisy, per_frame(t, sizes), text, sizes, blocks) for x in (clean, loud))
    moved = (after - before).abs().amax((0, 1, 3, 4))
    mask, _ = packed_mask(sizes, blocks, sum(sizes), window, sink)
    seen = mask.clone()
    for _ in range(len(net.model.blocks) - 1):  # through the frames that see it
        seen = (seen.float() @ mask.float()) > 0
    sees = seen[sum(sizes) :, frame]
    assert not moved[~sees].any() and (moved[sees] > 1e-6).all()


@many
@given(layouts())
def test_evicting_frame_by_frame_forgets_nothing_that_the_window_still_shows(layout):
    sizes, window, sink = layout
    held, end = torch.tensor([], dtype=torch.long), 0
    for size in sizes:
        end += size
        held = torch.cat((held, torch.arange(end - size, end)))
        held = held[visible_from(held, torch.tensor(end), window, sink)]
        everything = torch.arange(end)
        assert held.tolist() == everything[visible_from(everything, torch.tensor(end), window, sink)].tolist()
        assert window is None or len(held) <= window


@few
@given(layouts())
@torch.no_grad()
def test_the_cache_of_a_stream_holds_what_the_next_block_may_see(layout):
    sizes, window, sink = layout
    net, cache = wan(window, sink), KVCache()
    for block in inputs(net, sizes, batch=1)[0].split(sizes, 2):
        cache = net.append(block, torch.zeros(1, 1, 8), cache)
        ids = torch.arange(cache.next_frame)
        assert (
            list(cache.frames)
            == ids[visible_from(ids, torch.tensor(cache.next_frame + net.least), window, sink)].tolist()
        )
        assert cache.layers[0][0].shape[1] == 4 * len(cache.frames)


scores = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(4, 9)),
                elements=st.integers(0, 1000).map(lambda n: n / 1000))  # fmt: skip
FLOOR = 0.01


@many
@given(scores, st.sampled_from(STDS), st.floats(-5, 5), st.integers(0, 2**31))
def test_whatever_the_spread_advantages_know_neither_the_zero_nor_the_order(scores, std, offset, seed):
    a = normalise(scores, FLOOR, std)
    np.testing.assert_allclose(normalise(scores + offset, FLOOR, std), a, atol=1e-9)
    rng = np.random.default_rng(seed)
    groups, members = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    np.testing.assert_allclose(normalise(scores[groups][:, members], FLOOR, std), a[groups][:, members], atol=1e-9)
    assert np.abs(a.sum(-1)).max() < 1e-6 / FLOOR
    flat = np.append(scores, np.full((1, scores.shape[1]), 0.7), 0)
    assert not normalise(flat, FLOOR, std)[-1].any()


@many
@given(scores, st.sampled_from(("group", "batch")), st.floats(0.5, 20))
def test_a_divided_advantage_does_not_know_the_unit_and_an_undivided_one_does(scores, std, scale):
    np.testing.assert_allclose(normalise(scores * scale, FLOOR * scale, std), normalise(scores, FLOOR, std), atol=1e-9)
    np.testing.assert_allclose(
        normalise(scores * scale, 0.0, "none"), scale * normalise(scores, 0.0, "none"), atol=1e-9
    )


@many
@given(scores, st.sampled_from(STDS), st.data())
def test_a_missing_score_counts_as_if_its_member_had_not_been(scores, std, data):
    gone = data.draw(st.sets(st.integers(0, scores.shape[1] - 1), min_size=1, max_size=scores.shape[1] - 1))
    kept = [i for i in range(scores.shape[1]) if i not in gone]
    masked = scores.copy()
    masked[:, list(gone)] = np.nan
    a = normalise(masked, FLOOR, std)
    assert not a[:, list(gone)].any()
    np.testing.assert_allclose(a[:, kept], normalise(scores[:, kept], FLOOR, std), atol=1e-9)


@many
@given(scores, st.sampled_from(STDS), st.integers(1, 2))
def test_selected_members_carry_the_groups_whole_weight(scores, std, k):
    whole = advantages({"a": scores}, {"a": TermWeight(1.0, FLOOR)}, 5.0, std)
    kept = best_and_worst(whole, k)
    ordered = np.sort(whole, -1)
    ends = np.concatenate((ordered[:, :k], ordered[:, -k:]), -1)
    np.testing.assert_allclose(kept.mean(-1), ends.mean(-1), atol=1e-5)
    assert ((kept != 0).sum(-1) <= 2 * k).all()
