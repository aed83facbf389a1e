from dataclasses import replace

import pytest
import torch
from tiny import difference, noise
from wan_cases import FEW, tiny_vae

from policy.control import Drag
from policy.wan_codec import WanCodec
from policy.wan_control import BACKGROUNDS, FEATURES, WanControl

CODEC = WanCodec(tiny_vae(**FEW)).requires_grad_(False)
SIGMA, WINDOW = 6.0, 9.0
HEIGHT, WIDTH, FRAMES = 48, 64, 13  # 6 x 8 cells, 4 latent frames


def control(features="splat", background="zeros"):
    return WanControl(CODEC, features, background, SIGMA, WINDOW)


def drag(*ends, batch=1, visible=None, start=((19.5, 11.5), (43.5, 35.5))):
    """Points that go in a straight line from cell centres of the first frame to `ends` [(x, y), ...]."""
    share = torch.linspace(0, 1, FRAMES)[:, None, None]
    tracks = torch.tensor(start[: len(ends)]).lerp(torch.tensor(ends), share)
    first = noise(1, 3, HEIGHT, WIDTH).clamp(-1, 1)
    visible = torch.ones(tracks.shape[:2], dtype=torch.bool) if visible is None else visible
    return Drag(*(x.expand(batch, *x.shape[1:]) for x in (first, tracks[None], visible[None])))


RIGHT = drag((51.5, 11.5))


def test_every_video_frame_has_its_heat_map_and_the_given_frame_is_marked_whole():
    heat = control().encode(RIGHT)[0, :4]
    assert heat.shape == (4, 4, 6, 8) and (heat[:, 0] == 1).all()
    x = torch.arange(8) * 8 + 3.5
    for latent in range(1, 4):
        for k in range(4):
            point = RIGHT.tracks[0, 4 * (latent - 1) + 1 + k, 0]
            row = heat[k, latent, 1]  # the cells whose centre is 11.5 px from the top
            assert difference(row, torch.exp(-((x - point[0]) ** 2) / (2 * SIGMA**2))) < 1e-5
    assert difference(heat[3, 3], heat[2, 3]) > 0.05


def test_the_feature_under_a_point_is_laid_where_the_drag_has_it():
    encoded = control().encode(drag((51.5, 11.5), (3.5, 35.5)))[0, 4:]
    first = CODEC.encode(RIGHT.first_frame[:, :, None])[0, :, 0]
    assert difference(encoded[:, 0], first) == 0
    assert difference(encoded[:, 3, 1, 6], first[:, 1, 2]) < 1e-5  # from (19.5, 11.5) to (51.5, 11.5)
    assert difference(encoded[:, 3, 4, 0], first[:, 4, 5]) < 1e-5  # from (43.5, 35.5) to (3.5, 35.5)
    assert difference(encoded[:, 3, 1, 6], first[:, 1, 6]) > 0.05
    assert encoded[:, 3, 2, 3].abs().max() < 1e-2  # far from both


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_block_is_encoded_as_it_is_in_the_whole_video(features, background):
    wan = control(features, background)
    prepared = wan.prepare(drag((51.5, 20.0), (9.0, 35.5), batch=2))
    whole = wan.encode(prepared)
    assert whole.shape == (2, wan.channels, 4, 6, 8) and wan.channels == 8
    for frames in (slice(0, 1), slice(1, 2), slice(1, 4), slice(3, 4)):
        assert difference(wan.encode(prepared, frames), whole[:, :, frames]) < 1e-5
    assert difference(wan.encode(replace(prepared, background=None)), whole) < 1e-5


@pytest.mark.parametrize("features", FEATURES)
def test_a_drag_that_changes_later_leaves_what_was_encoded_before(features):
    wan = control(features)
    before, after = wan.prepare(RIGHT), wan.prepare(drag((51.5, 44.0)))
    mixed = torch.cat((before.tracks[:, :9], after.tracks[:, 9:]), 1)
    a, b = wan.encode(before), wan.encode(replace(before, tracks=mixed))
    assert difference(a[:, :, :3], b[:, :, :3]) < 1e-6 and difference(a[:, :, 3], b[:, :, 3]) > 0.1


@pytest.mark.parametrize("hidden", [slice(0, 1), slice(12, 13)])
def test_a_point_that_is_hidden_now_or_at_the_start_leaves_no_trace(hidden):
    visible = torch.ones(FRAMES, 1, dtype=torch.bool)
    visible[hidden] = False
    wan = control()
    seen, unseen = wan.encode(RIGHT), wan.encode(drag((51.5, 11.5), visible=visible))
    assert not unseen[0, 3:, 3].any() and seen[0, 3:, 3].any()


def test_grey_is_the_condition_that_image_to_video_checkpoints_know():
    video = torch.zeros(1, 3, FRAMES, HEIGHT, WIDTH)
    video[:, :, 0] = RIGHT.first_frame
    far = drag((1e4, 1e4))  # beyond the picture: nothing is laid over the background
    encoded = control(background="grey").encode(far)
    assert difference(encoded[:, 4:, 3], CODEC.encode(video)[:, :, 3]) < 1e-5
    assert difference(encoded[:, 4:, 3], control().encode(far)[:, 4:, 3]) > 0.1


def test_a_moved_window_is_the_encoding_of_the_picture_with_its_window_moved():
    first = torch.full((1, 3, HEIGHT, WIDTH), -0.5)
    first[:, :, 8:16, 16:24] = 0.7
    shown = replace(RIGHT, first_frame=first)
    moved = torch.full((1, 3, HEIGHT, WIDTH), -0.5)
    moved[:, :, 8:16, 48:56] = 0.7
    encoded = control("moved_window").encode(shown, slice(3, 4))[:, 4:]
    assert difference(encoded, CODEC.encode(moved[:, :, None])) < 1e-4
    assert difference(encoded, CODEC.encode(first[:, :, None])) > 0.05
