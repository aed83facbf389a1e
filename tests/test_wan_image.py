"""Image-to-video Wans, which read CLIP features of the first frame too."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from tiny import difference, noise
from transformers import CLIPImageProcessor, CLIPVisionModel
from wan_cases import drags, tiny_wan, wan_policy, write_folder

from policy.attention import KVCache
from policy.causal import TEXT_TOKENS
from policy.files import WeightsError
from policy.transition import Kernel
from policy.wan_image import WanImage
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import make_plan
from rollout.replay import ReplayBatch
from rollout.sampler import Sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("wan"), kind="i2v")


@torch.no_grad()
def stock_image(folder, picture):
    """What diffusers' pipeline gives its transformer."""
    processor = CLIPImageProcessor.from_pretrained(folder / "image_processor")
    encoder = CLIPVisionModel.from_pretrained(folder / "image_encoder").eval()
    pipeline = WanImageToVideoPipeline(None, None, None, None, image_processor=processor, image_encoder=encoder)
    return pipeline.encode_image(Image.fromarray(picture), torch.device("cpu"))


@torch.no_grad()
def test_the_network_reads_image_and_text_as_the_stock_model_does(folder):
    policy = wan_policy(folder, text_length=TEXT_TOKENS)
    prompts = drags(2, policy)
    stream, _ = Sampler(policy).begin(prompts)
    image = torch.cat([stock_image(folder, p.first_frame) for p in prompts])
    text = policy.text([p.text for p in prompts])
    x = noise(2, 36, 1, 4, 6)
    stock = tiny_wan("i2v")
    expected = stock(x, torch.tensor([700.0] * 2), text, image, return_dict=False)[0]
    assert image.shape == (2, 5, 20) and stream.text.shape == (2, 5 + TEXT_TOKENS, 20)
    assert difference(policy.net.block(x, 700.0, stream.text, KVCache()), expected) < 1e-5
    other = stock(x, torch.tensor([700.0] * 2), text, image.flip(0), return_dict=False)[0]
    assert difference(other, expected) > 1e-3


def test_the_packed_replay_gives_the_log_probs_of_the_stream(folder):
    policy = wan_policy(folder, text_length=TEXT_TOKENS)
    prompts = drags(2, policy)
    kernel = Kernel("cps", 0.7)
    plans = [make_plan(0, 0, p.id, "trunk", len(policy.sizes) - 1, 3) for p in prompts]
    sampler = GroupSampler(policy, RolloutSettings("trunk", 3, "tangent", kernel))
    batch = ReplayBatch(tuple(sampler.rollout(prompts, plans, 0)[1]))
    again = batch.log_probs(kernel, batch.velocity(policy, policy.net))
    assert max(difference(a, b) for a, b in zip(again, batch.rollout_log_probs())) < 1e-5


@pytest.mark.parametrize(("lost", "named"), [
    ("image_encoder", "holds no image_encoder/"), ("image_processor", "holds no image_processor/"),
    ("image_encoder/model.safetensors", "cannot read the image encoder"),
])  # fmt: skip
def test_an_image_encoder_that_is_not_whole_is_named(folder, tmp_path, lost, named):
    home = shutil.copytree(folder, tmp_path / "wan")
    shutil.rmtree(home / lost) if (home / lost).is_dir() else (home / lost).unlink()
    with pytest.raises(WeightsError, match=named) as error:
        WanImage(home, torch.float32)(torch.zeros(1, 3, 32, 48))
    assert str(home) in str(error.value) and "\n" not in str(error.value)


def test_a_text_of_another_length_cannot_be_told_from_the_image_and_is_refused(folder):
    with pytest.raises(WeightsError, match=r"give policy\.wan\.text_length=512"):
        wan_policy(folder)


def test_a_first_frame_in_black_gives_other_features_than_one_in_white(folder):
    images = WanImage(folder, torch.float32)
    black, white = (images(torch.full((1, 3, 32, 48), v)) for v in (-1.0, 1.0))
    assert black.dtype == torch.float32 and np.isfinite(black.numpy()).all() and difference(black, white) > 1e-2
