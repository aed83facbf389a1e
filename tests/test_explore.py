from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import difference, noise, plans, prompts, tiny_policy

from policy.explore import Basis, Cells, cells_near, tangent_basis
from policy.transition import Kernel
from rollout.group import GroupSampler, RolloutSettings
from rollout.sampler import Sampler

SHAPE = (3, 4, 2, 8, 8)
SEEN = torch.ones(3, 4, dtype=torch.bool)
HALF = torch.tensor([[True, False, True, False], [False, False, False, True], [True, True, True, True]])


def near(size=2, radius=10.0):
    g = torch.Generator().manual_seed(3)
    tracks = 64 * torch.rand(3, 2, 2, 2, generator=g)
    visible = torch.tensor(
        [[[True, True], [True, False]], [[False, True], [False, False]], [[True, True], [True, True]]]
    )
    return cells_near(tracks, visible, SHAPE[-2:], 8, size, SHAPE[1], radius), tracks, visible


def subspaces():
    tangent, hidden = (tangent_basis(noise(*SHAPE), noise(3, 4, *SHAPE[1:], seed=1), live) for live in (SEEN, HALF))
    return {
        "tangent": tangent,
        "hidden": hidden,
        "coarse": near(4, 0.0)[0],
        "near": near()[0],
        "white": near(1, 0.0)[0],
    }


def drawn(subspace, members, seed=0):
    return subspace.noise(
        [[torch.Generator().manual_seed(seed + 100 * p + g) for g in range(members)] for p in range(3)]
    )


def inner(a, b):
    return (a * b).flatten(2).sum(2)


@pytest.mark.parametrize("name", subspaces())
def test_directions_are_orthonormal(name):
    subspace = subspaces()[name]
    a, b = drawn(subspace, 5), drawn(subspace, 5, seed=1)
    assert difference(subspace.project(subspace.lift(a)), a) < 1e-5
    assert difference(inner(subspace.lift(a), subspace.lift(b)), inner(a, b)) < 1e-4  # lifting keeps lengths and angles
    x = noise(3, 5, *SHAPE[1:])
    assert difference(inner(subspace.project(x), a), inner(x, subspace.lift(a))) < 1e-4
    if name != "white":
        assert difference(subspace.lift(subspace.project(x)), x) > 1e-1
    assert difference(subspace.project(x)[:, 2], subspace.project(x[:, 2])) < 1e-6
    assert difference(subspace.lift(a)[:, 2], subspace.lift(a[:, 2])) < 1e-6


def test_directions_that_are_not_orthonormal_fail_the_same_check():
    skewed = Basis(2 * subspaces()["tangent"].vectors)
    a = drawn(skewed, 5)
    assert difference(skewed.project(skewed.lift(a)), a) > 1e-1


@pytest.mark.parametrize("name", subspaces())
def test_mean_square_of_standard_noise_is_one_however_small_the_subspace(name):
    subspace = subspaces()[name]
    assert subspace.mean_square(drawn(subspace, 1500)).mean(1).sub(1).abs().max() < 0.1


def test_mean_square_counts_the_cells_inside_alone():
    cells, _, _ = near()
    assert 0 < cells.inside.float().mean() < 0.5
    z = drawn(cells, 3)
    wide = cells.inside.expand(3, SHAPE[1], -1, -1, -1)
    expected = torch.stack([torch.stack([z[p, g][wide[p]].square().mean() for g in range(3)]) for p in range(3)])
    assert difference(cells.mean_square(z), expected) < 1e-5
    assert not z.masked_select(~wide.unsqueeze(1)).any()
    assert difference(z.square().flatten(2).mean(2), expected) > 0.1


def test_cells_lie_within_the_radius_of_a_visible_point_or_nearest_to_it():
    (cells, tracks, visible), size, stride = near(), 2, 8
    for p in range(3):
        for f in range(2):
            centres = [(size * stride * (c + 0.5) - 0.5) for c in range(4)]
            away = torch.tensor([[min((torch.hypot(x - tracks[p, f, n, 0], y - tracks[p, f, n, 1]).item()
                                       for n in range(2) if visible[p, f, n]), default=torch.inf)
                                  for x in centres] for y in centres])  # fmt: skip
            assert torch.equal(cells.inside[p, 0, f], (away <= 10.0) | (away == away.min()))
    assert near(radius=0.0)[0].inside.all()


def test_a_cell_that_does_not_divide_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"rollout.cell=3 does not divide the latent picture 8x8"):
        near(size=3)


@pytest.mark.parametrize("name", subspaces())
def test_a_row_taken_alone_is_the_same_subspace(name):
    subspace = subspaces()[name]
    x, row = noise(*SHAPE), torch.tensor([2])
    assert difference(subspace.rows(row).project(x[row]), subspace.project(x)[row]) < 1e-5
    assert difference(subspace.rows(row).project(x[row - 1]), subspace.project(x)[row]) > 1e-1
    a = drawn(subspace, 4)
    assert difference(subspace.rows(row).mean_square(a[row]), subspace.mean_square(a)[row]) < 1e-6


def test_the_noise_of_a_member_depends_on_its_own_generator_alone():
    cells = subspaces()["coarse"]
    few, many = drawn(cells, 2), drawn(cells, 6)
    assert torch.equal(few, many[:, :2])
    assert len({round(value, 6) for value in many[..., 0, 0, 0, 0].flatten().tolist()}) == 18


def test_the_tangent_basis_spans_the_finite_differences():
    v = noise(*SHAPE)
    moved = v.unsqueeze(1) + 0.01 * noise(3, 4, *SHAPE[1:], seed=1)
    assert outside(tangent_basis(v, moved, SEEN), moved - v.unsqueeze(1)) < 1e-4
    assert outside(tangent_basis(v, moved, SEEN), noise(3, 4, *SHAPE[1:], seed=2)) > 0.9


def outside(basis, x, rows=slice(None)):
    """The largest share of a vector x [P, M, C, f, h, w] that the basis leaves out."""
    basis = basis.rows(rows)
    rest = x - basis.lift(basis.project(x))
    return (rest.flatten(2).norm(dim=2) / x.flatten(2).norm(dim=2)).max().item()


def test_the_tangent_has_no_direction_where_nobody_sees_the_drag():
    v = noise(*SHAPE)
    moved = v.unsqueeze(1) + torch.where(HALF[:, :, None, None, None, None], noise(3, 4, *SHAPE[1:], seed=1), 1e-6)
    basis = tangent_basis(v, moved, HALF)
    assert torch.equal(basis.vectors.flatten(2).any(2), HALF)
    assert outside(basis, (moved - v.unsqueeze(1))[:1, [0, 2]], slice(0, 1)) < 1e-5  # what is left is not bent by it
    blind = tangent_basis(v, moved, torch.zeros_like(HALF))
    a = drawn(blind, 3)
    assert not blind.lift(a).any() and not blind.mean_square(a).any()
    assert torch.equal(tangent_basis(v, moved, SEEN).vectors.flatten(2).any(2), HALF)  # nothing moves but rounding
    assert tangent_basis(v, v.unsqueeze(1) + 0.01 * noise(3, 4, *SHAPE[1:]), SEEN).vectors.flatten(2).any(2).all()


@torch.no_grad()
@pytest.mark.parametrize("select", ["trunk", "video", "frame"])
def test_members_are_alike_in_the_blocks_where_the_drag_is_hidden(select):
    seen = prompts(1)[0]
    hidden = replace(seen, visible=seen.visible & (np.arange(len(seen.visible)) < 5)[:, None])  # of blocks 3 and 4

    def spread(prompt):
        """Grey levels between members, by block."""
        settings = RolloutSettings(select, 3, "tangent", Kernel(amplitude=8.0))
        plan = [replace(plans([prompt], select)[0], selected=((3, 1),))]
        (group,), replays = GroupSampler(tiny_policy(), settings).rollout([prompt], plan, 0)
        assert all(action.logp.isfinite().all() for replay in replays for action in replay.actions)
        return np.ptp(group.members.astype(int), axis=0).max()

    assert spread(hidden) <= 1 < 5 < spread(seen)


@torch.no_grad()
def test_a_rollout_explores_where_its_prediction_goes_when_the_drag_is_moved():
    policy, prompt = tiny_policy(), prompts(2)[1]
    settings = RolloutSettings("trunk", 2, "tangent", Kernel())
    plan = plans([prompt], "trunk")
    _, replays = GroupSampler(policy, settings).rollout([prompt], plan, 0)
    action, sampler = replays[0].actions[0], Sampler(policy)
    frames = sampler.frames[action.block]

    def predicted(prompt):
        stream, _ = sampler.begin([prompt])
        return sampler.velocity(stream, action.x, action.s)

    def dragged(frame, axis, offset):
        tracks = prompt.tracks.copy()
        tracks[frame, :, axis] += offset
        return replace(prompt, tracks=tracks)

    v = predicted(prompt)
    assert action.block == 1
    assert action.subspace.vectors.shape[1] == 2 * (frames.stop - frames.start)
    for frame in range(frames.start, frames.stop):
        for axis in (0, 1):
            assert outside(action.subspace, (predicted(dragged(frame, axis, 1.0)) - v).unsqueeze(1)) < 1e-3
    assert outside(action.subspace, (predicted(dragged(frames.start, 0, -6.0)) - v).unsqueeze(1)) > 0.1


def test_cells_of_one_pixel_are_the_whole_space():
    x = noise(*SHAPE)
    white = Cells(1, SHAPE[1], torch.ones(3, 1, *SHAPE[2:], dtype=torch.bool))
    assert torch.equal(white.lift(white.project(x)), x)
