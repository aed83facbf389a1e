import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORLD as SMALL
from tiny import tiny_policy

from policy.pretrain import FlowMatching, fit_policy
from rollout.prompts import DragPrompt, PromptError
from rollout.sampler import Sampler
from rollout.seeds import torch_generator
from rollout.sprites import SPLITS, SpriteWorld
from rollout.teaching import Teaching, example_batches, own_history

WORLD = SpriteWorld()


def covered(scene, sprite, t):
    """How much of each pixel a sprite covers, 0..1 [H, W]: drawn before white and before black, subtracted."""
    alone = replace(scene, still=(), dragged=(sprite,))
    light, dark = (WORLD._draw(replace(alone, background=np.full_like(scene.background, g)), t) for g in (1, 0))
    return 1 - (light[..., 0].astype(float) - dark[..., 0]) / 255


def centroid(weight):
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def test_tracks_are_the_centres_of_the_drawn_sprites():
    shapes = set()
    for index in range(24):
        scene = WORLD._scene("train", index)
        tracks, _ = scene.tracks()
        for n, sprite in enumerate(scene.dragged):
            shapes.add(sprite.shape)
            for t in (0, 5, 12):
                drawn = centroid(covered(scene, sprite, t))
                assert np.abs(drawn - tracks[t, n]).max() < 0.06  # px; a pixel's centre is at its index
                assert np.abs(drawn - tracks[t, n] - 0.5).max() > 0.3
    assert len(shapes) == 4


def test_a_drag_is_visible_where_no_other_sprite_lies_over_its_centre():
    hidden = 0
    for index in range(500):
        scene = WORLD._scene("train", index)
        _, visible = scene.tracks()
        for n, sprite in enumerate(scene.dragged):
            for t in np.flatnonzero(~visible[:, n]):
                x, y = np.rint(sprite.path[t]).astype(int)
                assert max(covered(scene, above, t)[y, x] for above in scene.dragged[n + 1 :]) > 0.5
                hidden += 1
        assert visible[:, -1].all()
    assert hidden > 10


def test_prompts_stay_within_the_picture_and_move_at_their_speed():
    steps = []
    for index in range(100):
        prompt = WORLD.prompt("train", index)
        assert prompt.tracks.dtype == np.float32 and prompt.tracks.shape[0] == WORLD.frames
        assert (prompt.tracks > 8).all() and (prompt.tracks < 56).all()
        away = np.linalg.norm(np.diff(prompt.tracks, axis=0), axis=-1)
        assert (away.max(0) < 1.05 * np.median(away, 0) + 0.02).all()  # an even pace, slower only round a sharp bend
        steps.append(away.mean())
    assert 0.7 * WORLD.speed < np.mean(steps) < 1.1 * WORLD.speed


def test_the_share_of_second_drags_is_as_asked():
    for share in (0.0, 0.3, 1.0):
        world = SpriteWorld(two_drags=share)
        two = np.mean([len(world._scene("train", index).dragged) == 2 for index in range(200)])
        assert abs(two - share) < 0.1


def test_the_true_video_starts_with_the_given_frame():
    for split in SPLITS:
        prompt = WORLD.prompt(split, 7)
        truth = WORLD.truth(prompt)
        np.testing.assert_array_equal(truth[0], prompt.first_frame)
        assert truth.shape == (13, 64, 64, 3) and (truth[1] != truth[0]).any()
        video, tracks, visible = WORLD.sample(split, 7)
        np.testing.assert_array_equal(video, truth)
        np.testing.assert_array_equal(tracks, prompt.tracks)
        np.testing.assert_array_equal(visible, prompt.visible)


def test_sprites_that_lag_are_where_they_should_have_been_before():
    truth, tracks, _ = WORLD.sample("train", 3)
    late, same, _ = WORLD.sample("train", 3, lag=2.0)
    np.testing.assert_array_equal(same, tracks)
    np.testing.assert_array_equal(late, truth[[0, 0, *range(len(truth) - 2)]])
    between, _, _ = WORLD.sample("train", 3, lag=1.5)
    assert (between[4] != late[4]).any() and (between[4] != truth[3]).any()


def test_a_prompt_of_another_world_has_no_truth_here():
    with pytest.raises(ValueError, match=r"'sprites/1/train/0' is not of this world \(seed 0\)"):
        WORLD.truth(SpriteWorld(seed=1).prompt("train", 0))


def test_splits_and_indices_and_seeds_share_no_prompt():
    worlds = (WORLD, SpriteWorld(seed=1))
    prompts = [world.prompt(split, index) for world in worlds for split in SPLITS for index in range(60)]
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.first_frame.tobytes() for prompt in prompts}) == len(prompts)
    assert len({prompt.tracks.tobytes() for prompt in prompts}) == len(prompts)


def test_the_same_id_is_the_same_prompt_in_another_process(tmp_path):
    script = """
import sys, numpy
from rollout.sprites import SpriteWorld
p = SpriteWorld().prompt("heldout", 3)
numpy.savez(sys.argv[1], first_frame=p.first_frame, tracks=p.tracks, visible=p.visible, id=p.id)
"""
    file, root = tmp_path / "prompt.npz", Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script, file], cwd=root, check=True)
    here, there = WORLD.prompt("heldout", 3), np.load(file)
    assert there["id"] == here.id
    for name in ("first_frame", "tracks", "visible"):
        np.testing.assert_array_equal(there[name], getattr(here, name))
    assert (there["first_frame"] != WORLD.prompt("heldout", 4).first_frame).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first_frame": np.zeros((8, 8, 3), np.float32)}, "first_frame must be uint8"),
        ({"first_frame": np.zeros((8, 8), np.uint8)}, "first_frame must be uint8"),
        ({"tracks": np.zeros((3, 2), np.float32)}, "tracks must be"),
        ({"tracks": np.zeros((3, 0, 2), np.float32)}, "tracks must be"),
        ({"visible": np.ones((3, 2), bool)}, "visible must be"),
        ({"tracks": np.full((3, 1, 2), np.nan, np.float32)}, "track 0 is not finite at frame 0"),
        ({"tracks": np.full((3, 1, 2), 7.5, np.float32)}, "track 0 leaves the 8x8 picture at frame 0"),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(changed, message):
    good = {"first_frame": np.zeros((8, 8, 3), np.uint8), "text": "", "tracks": np.zeros((3, 1, 2), np.float32),
            "visible": np.ones((3, 1), bool), "id": "mine"}  # fmt: skip
    DragPrompt(**good)
    with pytest.raises(PromptError, match=message) as error:
        DragPrompt(**{**good, **changed})
    assert "'mine'" in str(error.value)


def test_an_invisible_point_may_leave_the_picture():
    away, hidden = np.full((2, 1, 2), -3, np.float32), np.zeros((2, 1), bool)
    DragPrompt(np.zeros((8, 8, 3), np.uint8), "", away, hidden, "x")


def test_the_policy_learns_from_the_worlds_examples():
    policy = tiny_policy()
    examples = example_batches(policy, SMALL, Teaching(batch=4, pool=32, fresh=1), seed=0)
    (latents, control, history), (others, _, _) = islice(examples, 2)
    assert latents.shape == (4, 8, 9, 4, 4) and control.shape == (4, 10, 9, 4, 4)
    assert not torch.equal(latents, others) and history is latents
    before = policy.state_dict()["proj_out.weight"].clone()
    losses = []
    settings = FlowMatching(steps=52, lr=3e-3, muon_lr=0.02, ema=0.9, context_noise=0.1, on_schedule=0.7)
    fit_policy(policy, examples, settings, report=lambda step, r: losses.append(r["loss"]), seed=0)
    assert losses[-1] < 0.7 * losses[0]
    assert (policy.state_dict()["proj_out.weight"] - before).abs().max() > 1e-3


def test_an_own_history_is_what_the_policy_streams():
    policy = tiny_policy()
    sampler, prompts = Sampler(policy), [SMALL.prompt("train", i) for i in range(2)]
    stream, first = sampler.begin(prompts)
    history = own_history(policy, first, stream.control, torch_generator("h"))
    noise, video = torch_generator("h"), []
    while stream.block < len(policy.sizes):
        x = torch.randn(
            2, *policy.latent_shape[:1], policy.sizes[stream.block], *policy.latent_shape[1:], generator=noise
        )
        x = sampler.finish(stream, x, ())
        video.append(x)
        stream = sampler.append(stream, x)
    torch.testing.assert_close(history, torch.cat((first, *video), 2), rtol=0, atol=1e-6)
    examples = example_batches(policy, SMALL, Teaching(4, 32, 1, own_history=True), seed=0)
    latents, _, own = next(examples)
    assert own.shape == latents.shape and torch.equal(own[:, :, 0], latents[:, :, 0])
    assert not torch.allclose(own[:, :, 1:], latents[:, :, 1:])
