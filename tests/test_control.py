from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import PixelCodec, difference, prompts, tiny_policy

from policy.control import Drag, MovedWindowControl
from rollout.sampler import collate

SIZE, WINDOW = 32, 5.0
GROUND = torch.tensor([-0.4, 0.1, 0.3])


def blob(x, y):
    """A smooth bright spot around (x, y) on an even ground, [3, H, W]; it ends well within the window."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    spot = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 1.3**2))
    return GROUND[:, None, None] + 0.5 * spot


def drag(*path, visible=None):
    """One blob at the start of the path [(x, y), ...]."""
    tracks = torch.tensor(path, dtype=torch.float32)[None, :, None]
    visible = torch.tensor([True] * len(path) if visible is None else visible)[None, :, None]
    return Drag(blob(*path[0])[None], tracks, visible)


def control(drag, frames=slice(None)):
    """Heat map [B, f, H, W], known [B, f, H, W] and picture [B, 3, f, H, W]: with this codec a latent is a pixel."""
    encoded = MovedWindowControl(PixelCodec(), WINDOW, sigma=2.0).encode(drag, frames)
    return encoded[:, 0], encoded[:, 1], encoded[:, 2:]


def test_the_window_moves_with_the_track_by_parts_of_a_pixel():
    path = [(12, 15), (12.5, 15), (15.3, 13.6), (17.75, 18.2)]
    heat, _, picture = control(drag(*path))
    for t, (x, y) in enumerate(path):
        assert difference(picture[0, :, t], blob(x, y)) < 0.02
        assert difference(heat[0, t].amax(), torch.ones(())) < 0.1
        row, column = divmod(heat[0, t].argmax().item(), SIZE)
        assert max(abs(row - y), abs(column - x)) <= 0.5
    rounded = blob(*(round(c) for c in path[2]))
    assert difference(picture[0, :, 2], rounded) > 0.1


def test_what_the_window_leaves_bare_is_filled_smoothly_and_marked_as_not_known():
    _, known, picture = control(drag((10, 10), (21, 10)))
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    hole = (columns >= 5) & (columns <= 15) & (rows >= 5) & (rows <= 15)
    assert torch.equal(known[0, 1] == 0, hole) and known[0, 0].all()
    assert difference(picture[0, :, 1][:, hole], GROUND[:, None]) < 0.02
    assert difference(blob(10, 10)[:, hole], GROUND[:, None]) > 0.4


def test_a_drag_that_stands_still_gives_the_first_frame_back():
    _, known, picture = control(drag((11.3, 14.8), (11.3, 14.8)))
    assert known.all() and difference(picture[0, :, 1], blob(11.3, 14.8)) < 1e-5


def test_a_frame_of_the_control_depends_on_the_start_and_on_its_own_frame_alone():
    before = drag((12, 15), (14, 15), (16, 15), (18, 15))
    tracks, visible = before.tracks.clone(), before.visible.clone()
    tracks[:, 2] += 3
    visible[:, 2] = False
    for changed in (replace(before, tracks=tracks), replace(before, visible=visible)):
        assert same_frames(before, changed) == [True, True, False, True]
    tracks = before.tracks.clone()
    tracks[:, 0] += 2
    assert same_frames(before, replace(before, tracks=tracks)) == [False] * 4


def same_frames(a, b):
    layout = MovedWindowControl(PixelCodec(), WINDOW, sigma=2.0)
    return [torch.equal(x, y) for x, y in zip(layout.encode(a).unbind(2), layout.encode(b).unbind(2))]


def test_the_control_of_some_frames_is_that_part_of_the_whole():
    policy = tiny_policy()
    batch = collate(prompts(3))
    whole = policy.control.encode(batch)
    assert whole.shape == (3, policy.control.channels, 9, 4, 4)
    for frames in (slice(0, 1), slice(3, 5), slice(7, 9)):
        assert difference(policy.control.encode(batch, frames), whole[:, :, frames]) < 1e-5


def test_features_are_the_codec_of_the_picture_with_the_window_moved():
    policy = tiny_policy()
    d = drag((12, 15), (15.3, 13.6))
    features = MovedWindowControl(policy.codec, WINDOW, sigma=2.0).encode(d)[:, 2:]
    expected = policy.codec.encode(control(d)[2])
    assert difference(features, expected) < 1e-5
    assert difference(features[:, :, 1], expected[:, :, 0]) > 1e-2


def test_a_hidden_point_is_neither_pasted_nor_marked():
    heat, known, picture = control(drag((10, 10), (21, 10), (21, 10), visible=[True, False, True]))
    assert not heat[0, 1].any() and heat[0, 2].any()
    assert (known[0, 1] == 0).sum() == 11 * 11  # its place of the first frame stays bare
    assert difference(picture[0, :, 1], GROUND[:, None, None].expand(-1, SIZE, SIZE)) < 0.02


def test_a_point_hidden_in_the_first_frame_has_no_window_to_move():
    heat, known, picture = control(drag((10, 10), (21, 10), visible=[False, True]))
    assert heat[0, 1].amax() == 1 and known.all()
    assert difference(picture[0, :, 1], blob(10, 10)) < 1e-5


def test_the_later_point_lies_in_front():
    bright, dark = drag((8, 16), (16, 16)), drag((24, 16), (16, 16))
    first = bright.first_frame - dark.first_frame + GROUND[:, None, None]
    both = Drag(first, torch.cat((bright.tracks, dark.tracks), 2), torch.ones(1, 2, 2, dtype=torch.bool))
    assert (control(both)[2][0, :, 1, 16, 16] < GROUND - 0.4).all()
    swapped = replace(both, tracks=both.tracks.flip(2))
    assert (control(swapped)[2][0, :, 1, 16, 16] > GROUND + 0.4).all()


def test_padding_points_change_nothing():
    policy = tiny_policy()
    some = prompts(12)
    counts = np.array([p.tracks.shape[1] for p in some])
    one, two = some[int(np.argmin(counts))], some[int(np.argmax(counts))]
    assert (one.tracks.shape[1], two.tracks.shape[1]) == (1, 2)
    alone, batch = (policy.control.encode(collate(p)) for p in ([one], [one, two]))
    assert difference(alone[0], batch[0]) < 1e-5
    padding = collate([one, two])
    seen = policy.control.encode(replace(padding, visible=torch.ones_like(padding.visible)))
    assert difference(seen[0], alone[0]) > 1e-2


@pytest.mark.parametrize("corner", [(0, 0), (31, 31), (0, 31)])
def test_a_window_over_the_border_stays_inside_the_picture(corner):
    heat, known, picture = control(drag((16, 16), corner))
    assert heat.isfinite().all() and picture.isfinite().all()
    x, y = corner
    assert difference(picture[0, :, 1, y, x], blob(16, 16)[:, 16, 16]) < 1e-3 and known[0, 1, y, x] == 1
