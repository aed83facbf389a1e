import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors.torch import load_file, save_file
from tiny import difference, noise
from wan_cases import FEW, tiny_vae

from policy.files import WeightsError
from policy.wan_codec import WanCodec, read_codec

VAE = tiny_vae(**FEW)
CODEC = WanCodec(VAE)
VIDEO = noise(2, 3, 13, 24, 32).clamp(-1, 1)
MEAN, STD = (torch.tensor(VAE.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))


@torch.no_grad()
def stock_latents(video):
    return (VAE.encode(video).latent_dist.mode() - MEAN) / STD


@torch.no_grad()
def stock_pixels(latents):
    return VAE.decode(latents * STD + MEAN).sample


@torch.no_grad()
def decoded(latents, sizes, state=None):
    pixels = []
    for part in latents.split(sizes, 2):
        frames, state = CODEC.decode(part, state)
        pixels.append(frames)
    return torch.cat(pixels, 2)


@torch.no_grad()
def test_latents_are_the_normalised_mode_of_the_stock_posterior():
    latents = CODEC.encode(VIDEO)
    assert latents.shape == (2, CODEC.channels, 4, 3, 4) and (CODEC.spatial_stride, CODEC.temporal_stride) == (8, 4)
    assert difference(latents, stock_latents(VIDEO)) < 1e-5
    assert difference(latents, VAE.encode(VIDEO).latent_dist.mode()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1, 4, 4, 4], [5, 8], [1, 12]])
def test_encoding_a_stream_gives_the_latents_of_the_whole_clip(sizes):
    state, latents = None, []
    for part in VIDEO.split(sizes, 2):
        z, state = CODEC.encode_stream(part, state)
        latents.append(z)
    assert difference(torch.cat(latents, 2), stock_latents(VIDEO)) < 1e-5
    forgetful = torch.cat([CODEC.encode(VIDEO[:, :, :1]), CODEC.encode(VIDEO[:, :, 4:])], 2)
    assert difference(forgetful[:, :, 2:], latents[-1][:, :, -2:]) > 1e-3


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 3], [2, 2], [4]])
def test_decoding_a_stream_gives_the_pixels_of_the_whole_clip(sizes):
    latents = noise(2, 4, 4, 3, 4)
    pixels = decoded(latents, sizes)
    assert pixels.shape == (2, 3, 13, 24, 32)
    assert difference(pixels, stock_pixels(latents)) < 1e-5
    assert difference(decoded(latents[:, :, 2:], [2]), pixels[:, :, -5:]) > 1e-3


def unchanged(state, before):
    return all(a is None if b is None else torch.equal(a, b) for a, b in zip(state, before))


@torch.no_grad()
@pytest.mark.parametrize("shared", [1, 2, 3])
def test_a_forked_stream_leaves_the_shared_state_alone(shared):
    latents, members = noise(1, 4, shared, 3, 4), noise(3, 4, 2, 3, 4, seed=1)
    _, state = CODEC.decode(latents)
    before = [None if part is None else part.clone() for part in state]
    forked = tuple(None if part is None else part.expand(3, *part.shape[1:]) for part in state)
    together, _ = CODEC.decode(members, forked)
    assert unchanged(state, before)
    for i in range(3):
        alone = stock_pixels(torch.cat((latents, members[i : i + 1]), 2))
        assert difference(together[i : i + 1], alone[:, :, -8:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_decoded_in_parts_are_those_decoded_together(rows):
    exact = tiny_vae(**FEW).double()  # in float32 convolutions of other batch sizes round differently, by some 1e-6
    whole, parts = WanCodec(exact), WanCodec(exact, rows)
    latents, after = noise(5, 4, 2, 3, 4), noise(5, 4, 1, 3, 4, seed=1)
    (first, state), (same, halves) = whole.decode(latents), parts.decode(latents)
    (second, ended), (next_same, ends) = whole.decode(after, state), parts.decode(after, halves)
    assert difference(first, same) < 1e-6 and difference(second, next_same) < 1e-6
    assert [part is None for part in ends] == [part is None for part in ended]
    assert all(difference(a, b) < 1e-6 for a, b in zip(ends, ended) if a is not None)
    forked = tuple(None if part is None else part[:1].expand(5, *part.shape[1:]) for part in state)
    before = [None if part is None else part.clone() for part in forked]
    twigs, _ = parts.decode(after, forked)
    assert unchanged(forked, before) and difference(twigs, whole.decode(after, forked)[0]) < 1e-6
    assert difference(twigs[1:], second[1:]) > 1e-3  # of rows that remember something else


@torch.no_grad()
def test_rows_encoded_in_parts_are_those_encoded_together():
    exact, video = tiny_vae(**FEW).double(), noise(5, 3, 5, 24, 32)
    whole = WanCodec(exact).encode(video)
    assert difference(WanCodec(exact, 2).encode(video), whole) < 1e-6
    assert difference(WanCodec(exact, 2).encode(video.flip(0)), whole) > 1e-3


@torch.no_grad()
def test_an_encoders_state_is_not_changed_by_what_follows():
    _, state = CODEC.encode_stream(VIDEO[:, :, :5])
    before = [None if part is None else part.clone() for part in state]
    first, _ = CODEC.encode_stream(VIDEO[:, :, 5:9], state)
    again, _ = CODEC.encode_stream(VIDEO[:, :, 5:9], state)
    assert torch.equal(first, again) and all(
        a is None if b is None else torch.equal(a, b) for a, b in zip(state, before)
    )


@pytest.mark.parametrize(("state", "frames"), [(None, 4), (None, 0), ((), 3)])
def test_frames_that_make_no_whole_latent_frame_are_refused(state, frames):
    with pytest.raises(ValueError, match=f"cannot encode {frames} frames"):
        CODEC.encode_stream(VIDEO[:, :, :frames], state)


def test_the_state_has_an_entry_for_every_causal_convolution():
    for part in (VAE.encoder, VAE.decoder):
        convolutions = [m for m in part.modules() if isinstance(m, torch.nn.Conv3d)]
        assert all(isinstance(m, WanCausalConv3d) for m in convolutions)
    _, state = CODEC.decode(noise(1, 4, 1, 2, 2))
    assert len(state) == VAE._cached_conv_counts["decoder"]


@torch.no_grad()
def test_a_codec_in_bfloat16_takes_and_gives_float32(tmp_path):
    VAE.save_pretrained(tmp_path)
    half, full = read_codec(tmp_path, torch.bfloat16), read_codec(tmp_path)
    assert half.vae.dtype == torch.bfloat16 and half.mean.dtype == torch.float32
    latents = half.encode(VIDEO)
    pixels, _ = half.decode(latents)
    assert latents.dtype == pixels.dtype == torch.float32
    assert 0 < difference(latents, full.encode(VIDEO)) < 0.3
    assert torch.equal(full.encode(VIDEO), CODEC.encode(VIDEO))


def halve(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_an_entry(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("quant_conv.weight")
    save_file(state, file, {"format": "pt"})


def forget_the_config(folder):
    (folder / "config.json").unlink()


def become_wan22(folder):
    shutil.rmtree(folder)
    AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2, is_residual=True,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=16,
    ).save_pretrained(folder)  # fmt: skip


def another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_dim": 8}))


@pytest.mark.parametrize("damage", [halve, drop_an_entry, forget_the_config, become_wan22, another_shape])
def test_an_autoencoder_that_is_missing_damaged_or_of_another_kind_is_named(tmp_path, damage):
    folder = tmp_path / "vae"
    VAE.save_pretrained(folder)
    read_codec(folder)
    damage(folder)
    with pytest.raises(WeightsError, match=str(folder)) as error:
        read_codec(folder)
    assert "\n" not in str(error.value)
