"""The smallest policy with every part of the real one, and a sprite world of its size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from policy.codec import CodecState, ConvCodec
from policy.policy import DragPolicy, PolicySettings, build_transformer
from policy.transition import shifted_schedule
from rollout.plan import NoisePlan, make_plan
from rollout.prompts import DragPrompt
from rollout.sprites import SpriteWorld

SETTINGS = PolicySettings(size=32, frames=9, block=2, sigmas=shifted_schedule(3, 3.0), window=None, sink=0,
                          drag_window=7.0, drag_sigma=4.0, codec_channels=8, codec_width=16)  # fmt: skip
WORLD = SpriteWorld(size=SETTINGS.size, frames=SETTINGS.frames)
STEPS = len(SETTINGS.sigmas) - 1


def tiny_policy(seed: int = 0, **changed: object) -> DragPolicy:
    """Random weights, none of them zero: a fresh Wan starts with an idle output layer. changed: of SETTINGS."""
    settings = replace(SETTINGS, **changed)
    torch.manual_seed(seed)
    codec = ConvCodec(settings.codec_channels, settings.codec_width)
    transformer = build_transformer(
        settings.codec_channels, settings.codec_channels + 2, heads=2, head_dim=12, layers=2, ffn=32
    )
    with torch.no_grad():
        for p in (*codec.parameters(), *transformer.parameters()):
            p.add_(0.12 * torch.randn_like(p))
    return DragPolicy(settings, transformer, codec)


def prompts(count: int, first: int = 0) -> list[DragPrompt]:
    return [WORLD.prompt("train", first + i) for i in range(count)]


def plans(prompts: list[DragPrompt], select: str, seed: int = 0, iteration: int = 0) -> list[NoisePlan]:
    blocks = len(SETTINGS.sizes) - 1
    return [make_plan(seed, iteration, p.id, select, blocks, STEPS) for p in prompts]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


class PixelCodec:
    """A codec whose latents are the pixels themselves, so that a control can be compared with pictures."""

    channels, spatial_stride, temporal_stride = 3, 1, 1

    def encode(self, video: Tensor) -> Tensor:
        return video

    def decode(self, latents: Tensor, state: CodecState = None) -> tuple[Tensor, CodecState]:
        return latents, None
