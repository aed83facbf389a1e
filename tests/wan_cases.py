"""Tiny Wan transformers of the real class, with no weight left at a value that would hide a mix-up."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from policy.causal import CausalWan  # noqa: F401  (readies torchvision for diffusers)

from diffusers import AutoencoderKLWan, WanTransformer3DModel  # isort: skip

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


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """A Wan autoencoder of the real class and strides (8 in space, 4 in time) with 4 channels."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[-0.7, 0.1, 0.9, -0.2], latents_std=[2.8, 1.4, 0.7, 1.1]
    ).eval()


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
