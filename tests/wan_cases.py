"""Tiny Wans of the real classes, with no weight of the transformer left at a value that would hide a mix-up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policy.lora import LoraSettings
from policy.policy import DragPolicy, PolicySource, load_policy
from policy.wan import WanSettings
from rollout.prompts import DragPrompt

# after policy has readied torchvision
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # isort: skip
from transformers import (  # isort: skip
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
KINDS = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24},
    "flf2v": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24, "pos_embed_seq_len": 514},
    "plain": {"cross_attn_norm": False, "in_channels": 4, "out_channels": 4, "patch_size": (1, 1, 1)},
}


def tiny_wan(kind: str = "t2v", seed: int = 0, **changed: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**SHAPE, **KINDS[kind], **changed}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@torch.no_grad()
def velocity(model: WanTransformer3DModel, control: float = 0.0) -> Tensor:
    """What the model makes of fixed noise in its first 16 channels; the channels after them hold `control`."""
    g = torch.Generator().manual_seed(7)
    x = torch.full((2, model.config.in_channels, 2, 4, 4), control)
    x[:, :16] = torch.randn(2, 16, 2, 4, 4, generator=g)
    text = torch.randn(2, 3, model.config.text_dim, generator=g)
    return model(x, torch.tensor([700.0, 40.0]), text, return_dict=False)[0]


def same(a: WanTransformer3DModel, b: WanTransformer3DModel) -> bool:
    """Bit for bit the same weights under the same names."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def write_image_encoder(folder: Path, dim: int = 20, seed: int = 0) -> None:
    """image_encoder/ and image_processor/ of a diffusers folder: CLIP's image tower, random, for 28 px pictures."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=dim, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**size).save_pretrained(folder / "image_processor")


FEW = {"z_dim": 4, "latents_mean": [-0.7, 0.1, 0.9, -0.2], "latents_std": [2.8, 1.4, 0.7, 1.1]}


def tiny_vae(seed: int = 0, **changed: object) -> AutoencoderKLWan:
    """A Wan autoencoder of the real class and strides, 8 in space and 4 in time. changed: as FEW, for 4 channels."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(**{"base_dim": 4, "num_res_blocks": 1, **changed}).eval()


def write_folder(folder: Path, **changed: object) -> Path:
    """A Wan in diffusers layout, every part tiny and random. changed: of `tiny_wan`."""
    tiny_wan(**changed).save_pretrained(folder / "transformer")
    if changed.get("kind") == "i2v":
        write_image_encoder(folder)
    tiny_vae().save_pretrained(folder / "vae")
    write_text_encoder(folder)
    return folder


SETTINGS = WanSettings(
    height=32, width=48, frames=13, block=1, sigmas=(1.0, 0.755, 0.522, 0.0), window=3, sink=1, features="splat",
    background="zeros", drag_sigma=6.0, drag_window=9.0, base=None, text_cache="unset", text_length=12, dtype="float32",
    codec_dtype="float32", decode_rows=None, attention="auto", gradient_checkpointing=False,
)  # fmt: skip


def wan_policy(folder: Path, lora: LoraSettings | None = None, **changed: object) -> DragPolicy:
    """The policy of a folder; changed: of SETTINGS."""
    settings = replace(SETTINGS, **{"text_cache": str(folder / "text_cache"), **changed})
    return load_policy(PolicySource(str(folder), settings, lora))


def drags(count: int, policy: DragPolicy) -> list[DragPrompt]:
    """Prompts with two points each that go in straight lines over a random picture."""
    (height, width), frames = (n * 8 for n in policy.latent_shape[1:]), policy.settings.frames
    prompts = []
    for i in range(count):
        rng = np.random.default_rng(i)
        ends = rng.uniform((4, 4), (width - 5, height - 5), (2, 2, 2))
        tracks = ends[0] + np.linspace(0, 1, frames)[:, None, None] * (ends[1] - ends[0])
        picture = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        text = ("a cat walks left", "a dog")[i % 2]
        prompts.append(DragPrompt(picture, text, tracks.astype(np.float32), np.ones((frames, 2), bool), f"drag/{i}"))
    return prompts


def write_text_encoder(folder: Path, dim: int = 8, seed: int = 0) -> None:
    """text_encoder/ and tokenizer/ of a diffusers folder: a random UMT5, and T5's kind of unigram tokenizer."""
    words = ["▁a", "▁cat", "▁dog", "▁walks", "▁left", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer([*special, *((w, -1.0 - i / 10) for i, w in enumerate(words))], extra_ids=2)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    shape = {"d_model": dim, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    config = UMT5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **shape)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
