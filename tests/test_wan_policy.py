import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import difference, noise
from torch.utils.checkpoint import CheckpointError
from wan_cases import FEW, SETTINGS, drags, same, tiny_vae, tiny_wan, wan_policy, write_folder

from policy.attention import KVCache
from policy.files import WeightsError
from policy.policy import load_policy
from policy.transition import Kernel
from policy.wan_formats import read_wan, write_wan
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import make_plan
from rollout.replay import ReplayBatch
from rollout.sampler import Sampler

KERNEL = Kernel("cps", 0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Wan of 36 input channels without a CLIP branch."""
    return write_folder(tmp_path_factory.mktemp("wan"), in_channels=36)


def plans(policy, prompts, select="trunk"):
    blocks, steps = len(policy.sizes) - 1, len(policy.sigmas) - 1
    return [make_plan(0, 0, p.id, select, blocks, steps) for p in prompts]


def film(policy, count=2):
    prompts = drags(count, policy)
    return Sampler(policy).generate(prompts, plans(policy, prompts))


def rolled_out(policy, select="trunk", explore="tangent", count=2):
    prompts = drags(count, policy)
    sampler = GroupSampler(policy, RolloutSettings(select, 3, explore, KERNEL, cell=2))
    return sampler.rollout(prompts, plans(policy, prompts, select), 0)


def deviation(policy, replays):
    """Largest |log-prob of the replay - log-prob of the rollout|, both means over the coordinates."""
    worst = []
    for replay in replays:
        batch = ReplayBatch((replay,))
        again = batch.log_probs(KERNEL, batch.velocity(policy, policy.net))
        worst += [difference(a, b) for a, b in zip(again, batch.rollout_log_probs())]
    return max(worst)


def test_a_folder_becomes_a_policy_of_its_shape(folder):
    policy = wan_policy(folder)
    assert policy.sizes == (1, 1, 1, 1) and policy.latent_shape == (16, 4, 6) and policy.settings.size == (32, 48)
    assert film(policy).shape == (2, 13, 32, 48, 3) and same(policy.net.model, read_wan(folder))
    assert wan_policy(folder, width=32).settings.size == 32


def test_latent_frames_hold_one_and_then_four_video_frames(folder):
    policy = wan_policy(folder)
    held = [policy.video_frames(slice(a, b)) for a, b in ((0, 1), (1, 2), (2, 4), (0, 4))]
    assert held == [slice(0, 1), slice(1, 5), slice(5, 13), slice(0, 13)]


@torch.no_grad()
def test_a_text_to_video_checkpoint_is_given_control_channels_that_change_nothing(tmp_path):
    policy = wan_policy(write_folder(tmp_path))
    stock = tiny_wan()
    x, text, t = noise(2, 16, 2, 4, 6), noise(2, 5, 8), torch.tensor([700.0, 700.0])
    assert policy.net.model.config.in_channels == 36
    v = policy.net.block(torch.cat((x, noise(2, 20, 2, 4, 6, seed=1)), 1), t, text, KVCache())
    assert difference(v, stock(x, t, text, return_dict=False)[0]) < 1e-5


@pytest.mark.parametrize("layout", ["original", "self_forcing"])
def test_a_student_in_another_format_takes_the_other_parts_from_the_base(folder, tmp_path, layout):
    write_wan(tiny_wan(in_channels=36, seed=5), tmp_path / "student", layout)
    path = next((tmp_path / "student").glob("*.pt"), tmp_path / "student")
    student = wan_policy(path, base=str(folder), text_cache=str(folder / "text_cache"))
    assert same(student.net.model, tiny_wan(in_channels=36, seed=5))
    assert (film(student) != film(wan_policy(folder))).any()


@pytest.mark.parametrize("explore", ["tangent", "coarse", "white"])
@pytest.mark.parametrize(("select", "changed"), [
    ("trunk", {}), ("frame", {"window": None, "sink": 0}), ("trunk", {"block": 3, "window": 4}),
    ("trunk", {"features": "moved_window"}), ("all", {"background": "grey"}),
])  # fmt: skip
def test_the_packed_replay_gives_the_log_probs_of_the_stream(folder, select, changed, explore):
    policy = wan_policy(folder, **changed)
    _, replays = rolled_out(policy, select, explore)
    assert deviation(policy, replays) < 1e-5
    for part in ("text", "control", "history"):
        other = [replace(r, **{part: noise(*getattr(r, part).shape)}) for r in replays]
        assert deviation(policy, other) > 1e-4


def test_groups_own_the_video_frames_of_their_block(folder):
    policy = wan_policy(folder)
    groups, _ = rolled_out(policy, count=1)
    assert [(len(g.shared), g.members.shape[:2], g.blocks) for g in groups] == [
        (1, (3, 4), {1: range(1, 5)}), (5, (3, 4), {2: range(5, 9)}), (9, (3, 4), {3: range(9, 13)})]  # fmt: skip
    whole, _ = rolled_out(policy, "frame", count=1)
    assert whole[0].members.shape == (3, 12, 32, 48, 3) and whole[0].blocks == {
        1: range(1, 5),
        2: range(5, 9),
        3: range(9, 13),
    }


@torch.no_grad()
def test_memory_does_not_grow_with_the_video_when_a_window_is_set(folder):
    frames = 49
    held = {}
    for window, sink in ((4, 1), (None, 0)):
        policy = wan_policy(folder, frames=frames, window=window, sink=sink)
        sampler, prompts = Sampler(policy), drags(1, policy)
        stream, _ = sampler.begin(prompts)
        held[window] = []
        while stream.block < len(policy.sizes) - 1:  # nothing is kept of the last one
            x = sampler.initial(plans(policy, prompts), stream.block)
            _, stream = sampler.decode(stream, x)
            stream = sampler.append(stream, x)
            parts = [t for layer in stream.cache.layers for t in layer] + [
                t for t in stream.codec_state if t is not None
            ]
            held[window].append(sum(t.numel() for t in parts))
    assert len(set(held[4][1:])) == 1 and held[4][0] < held[4][1]
    assert all(a < b for a, b in zip(held[None], held[None][1:]))


@torch.no_grad()
def test_positions_beyond_the_window_are_those_of_the_whole_video(folder):
    policy = wan_policy(folder, frames=49)
    sizes, text = policy.sizes, noise(1, 5, 8)
    x = noise(1, 36, len(sizes), 4, 6)
    full = policy.net.full(x, torch.full((1, len(sizes)), 0.0), text, sizes)
    cache, streamed = KVCache(), []
    for f in range(len(sizes)):
        streamed.append(policy.net.block(x[:, :, f : f + 1], 0.0, text, cache))
        cache = policy.net.append(x[:, :, f : f + 1], text, cache)
    assert difference(torch.cat(streamed, 2), full) < 1e-5
    assert cache.frames == (0, 12)
    restarted = replace(cache, next_frame=3)
    x = noise(1, 36, 1, 4, 6, seed=9)
    assert difference(policy.net.block(x, 0.0, text, cache), policy.net.block(x, 0.0, text, restarted)) > 1e-3


@torch.no_grad()
def test_the_drag_can_change_while_the_video_is_made(folder):
    policy = wan_policy(folder)
    sampler, prompts = Sampler(policy), drags(1, policy)

    def made(change_at):
        stream, _ = sampler.begin(prompts)
        video = []
        while stream.block < len(policy.sizes):
            if stream.block == change_at:
                tracks = stream.drag.tracks.clone()
                tracks[:, 5:] = tracks[:, 4:5]  # from latent frame 2 on the points stay where they are
                drag = replace(stream.drag, tracks=tracks)
                stream = replace(stream, drag=drag, control=policy.control.encode(drag))
            x = sampler.finish(stream, sampler.initial(plans(policy, prompts), stream.block), ())
            pixels, stream = sampler.decode(stream, x)
            stream = sampler.append(stream, x)
            video.append(pixels)
        return np.concatenate(video, 1)

    as_planned, changed = made(None), made(2)
    np.testing.assert_array_equal(as_planned[:, :4], changed[:, :4])
    assert (as_planned[:, 4:] != changed[:, 4:]).any()


def test_the_text_reaches_the_video(folder):
    policy = wan_policy(folder)
    told, untold = drags(1, policy), [replace(p, text="") for p in drags(1, policy)]
    stream, _ = Sampler(policy).begin(told)
    other, _ = Sampler(policy).begin(untold)
    assert stream.text.shape == (1, 12, 8) and difference(stream.text, other.text) > 0.1


def test_forks_of_one_prompt_share_its_memory(folder):
    policy = wan_policy(folder)
    stream, _ = Sampler(policy).begin(drags(1, policy))
    forked = stream.rows(torch.zeros(8, dtype=torch.int64))
    pairs = [(layer[0], own[0]) for layer, own in zip(forked.cache.layers, stream.cache.layers)]
    pairs += [(a, b) for a, b in zip(forked.codec_state, stream.codec_state) if a is not None]
    assert all(len(a) == 8 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in pairs)


@torch.no_grad()
def test_bfloat16_weights_take_and_give_float32(folder, tmp_path):
    half = {"dtype": "bfloat16", "codec_dtype": "bfloat16", "text_cache": str(tmp_path)}
    policy, exact = wan_policy(folder, **half), wan_policy(folder)
    sampler = Sampler(policy)
    stream, first = sampler.begin(drags(1, policy))
    x = sampler.initial(plans(policy, drags(1, policy)), 1)
    v = sampler.velocity(stream, x, 0.755)
    assert v.dtype == first.dtype == torch.float32
    assert stream.cache.layers[0][0].dtype == policy.net.model.proj_out.weight.dtype == torch.bfloat16
    reference = Sampler(exact)
    assert 0 < difference(v, reference.velocity(reference.begin(drags(1, exact))[0], x, 0.755)) < 0.2 * v.abs().max()
    _, replays = rolled_out(policy)
    assert deviation(policy, replays) < 0.05


def test_a_saved_policy_says_what_it_is(folder, tmp_path):
    policy = wan_policy(folder, base=str(folder))
    policy.save(tmp_path)
    assert json.loads((tmp_path / "policy.json").read_text())["kind"] == "wan"
    again = load_policy(tmp_path)
    assert again.settings == policy.settings and same(again.net.model, policy.net.model)
    np.testing.assert_array_equal(film(again), film(policy))


def test_gradient_checkpointing_gives_the_same_gradients_whatever_runs_in_between(folder):
    def gradients(policy):
        _, replays = rolled_out(policy, count=1)
        v = ReplayBatch(tuple(replays)).velocity(policy, policy.net)
        film(policy, 1)
        sum(part.square().sum() for part in v).backward()
        assert all(p.rotary is p.mask is p.past is p.fresh is None for p in policy.net.processors)
        return torch.cat([p.grad.flatten() for p in policy.net.parameters() if p.grad is not None])

    plain = gradients(wan_policy(folder))
    assert difference(plain, gradients(wan_policy(folder, gradient_checkpointing=True))) < 1e-6 * plain.abs().max()
    stock = wan_policy(folder)
    stock.net.model.enable_gradient_checkpointing()  # computes again without the mask
    with pytest.raises(CheckpointError):
        gradients(stock)


def without_vae(folder):
    shutil.rmtree(folder / "vae")


def with_a_last_frame(folder):
    shutil.rmtree(folder / "transformer")
    tiny_wan("flf2v").save_pretrained(folder / "transformer")


def of_other_channels(folder):
    shutil.rmtree(folder / "vae")
    tiny_vae(**FEW).save_pretrained(folder / "vae")


def without_transformer(folder):
    shutil.rmtree(folder / "transformer")


@pytest.mark.parametrize(("damage", "named"), [
    (without_vae, "no vae/; give policy.wan.base"), (with_a_last_frame, "reads a last frame too"),
    (of_other_channels, "input channels, not 12"), (without_transformer, "files of weights"),
])  # fmt: skip
def test_parts_that_are_missing_or_do_not_go_together_are_named(folder, tmp_path, damage, named):
    home = shutil.copytree(folder, tmp_path / "wan")
    damage(home)
    with pytest.raises(WeightsError, match=named) as error:
        wan_policy(home)
    assert str(home) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("changed", "named"), [
    ({"height": 40}, "policy.wan.height=40 must be a multiple of 16"),
    ({"block": 0}, "policy.wan.block=0 must be 1 or more"),
    ({"drag_sigma": 0.0}, r"policy.wan.drag_sigma=0.0 \(px\) must be above 0"),
    ({"frames": 12}, "policy.wan.frames=12 must be one given frame and whole blocks of 4"),
    ({"frames": 13, "block": 2}, "whole blocks of 8"),
    ({"window": 1}, "policy.wan.window=1 must hold the sink=1 and a block=1"),
    ({"dtype": "float16"}, "policy.wan.dtype=float16 is none of float32, bfloat16"),
    ({"features": "glue"}, "policy.wan.features=glue is none of splat, moved_window"),
    ({"sigmas": (1.0, 0.5)}, "must fall strictly from 1 to 0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_named(changed, named):
    with pytest.raises(ValueError, match=named):
        replace(SETTINGS, **changed)


def test_a_video_of_more_latent_frames_than_positions_is_refused(folder):
    with pytest.raises(ValueError, match="more latent frames than the transformer's 1024"):
        wan_policy(folder, frames=4097)
