from itertools import repeat

import pytest
import torch
from tiny import WORLD, difference, noise, tiny_policy

from policy.codec import ConvCodec, from_pixels, to_pixels
from policy.pretrain import fit_codec
from rollout.teaching import frame_batches


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_one_latent_frame_for_every_video_frame_and_eight_pixels(frames):
    codec = tiny_policy().codec
    latents = codec.encode(noise(2, 3, frames, 32, 48))
    assert latents.shape == (2, codec.channels, frames, 4, 6)
    video, _ = codec.decode(latents)
    assert video.shape == (2, 3, frames, 32, 48)


@torch.no_grad()
def test_a_decoded_stream_is_the_decoded_video():
    codec = tiny_policy().codec
    latents = noise(2, codec.channels, 5, 4, 4)
    whole, _ = codec.decode(latents)
    state, parts = None, []
    for part in latents.split((1, 2, 2), 2):
        video, state = codec.decode(part, state)
        parts.append(video)
    assert difference(torch.cat(parts, 2), whole) < 1e-5
    assert difference(torch.cat(parts, 2), whole.flip(2)) > 1e-2


@torch.no_grad()
def test_a_video_is_encoded_alike_in_every_batch():
    codec = tiny_policy().codec
    video = noise(3, 3, 4, 32, 32)
    assert difference(codec.encode(video)[1], codec.encode(video[1:2])[0]) < 1e-5


def test_the_policy_never_trains_its_codec():
    policy = tiny_policy()
    assert not policy.codec.training and not any(p.requires_grad for p in policy.codec.parameters())
    assert all(p.requires_grad for p in policy.net.parameters())


def test_pixels_survive_the_way_there_and_back():
    video = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 2, 16, 8, 3)
    floats = from_pixels(video)
    assert floats.shape == (1, 3, 2, 16, 8) and floats.amin() == -1 and floats.amax() == 1
    assert torch.equal(to_pixels(floats), video)


def test_values_outside_the_range_are_clamped_and_a_broken_frame_is_black():
    video = torch.zeros(2, 3, 3, 4, 4)
    video[0, :, 0], video[0, :, 1] = 7.0, -7.0
    video[1, 2, 1, 3, 3], video[1, 0, 2, 0, 0] = torch.nan, torch.inf
    pixels = to_pixels(video)
    assert (pixels[0, 0] == 255).all() and (pixels[0, 1] == 0).all()
    assert not pixels[1, 1].any() and not pixels[1, 2].any()
    assert (pixels[1, 0] == 128).all() and (pixels[0, 2] == 128).all()  # the frames beside it stay


def test_training_makes_the_pictures_sharper():
    torch.manual_seed(0)
    codec, reports = ConvCodec(channels=8, width=16), []
    frames = repeat(next(frame_batches(WORLD, batch=8, per_video=4, seed=0)))
    fit_codec(codec, frames, steps=80, lr=3e-3, jitter=0.05, report=lambda step, r: reports.append(r["psnr"]), seed=0)
    assert len(reports) == 2 and reports[1] > reports[0] + 3
    assert not codec.training
