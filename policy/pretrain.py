"""Supervised training: of the tiny policy's codec, and of a policy by packed flow matching.

Pure functions over iterators of batches; where the videos come from is the caller's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from policy.causal import freeze
from policy.codec import ConvCodec
from policy.policy import DragPolicy

Report = Callable[[int, dict[str, float]], None]


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit_codec(
    codec: ConvCodec, frames: Iterator[Tensor], steps: int, lr: float, jitter: float, report: Report, seed: int
) -> None:
    """Trains encoder and decoder on batches of frames, float [B, 3, 1, H, W] in -1..1.

    Loss: L1 + 4 MSE + L1 of the spatial gradients (sharpness). `jitter` is the standard deviation of the noise added to
    the unit-variance latents, so that small errors of the policy decode to small errors in the picture.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=lr, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    codec.train()
    started = time.process_time()
    for step in range(steps):
        x = next(frames)
        z = codec.encode(x)
        y, _ = codec.decode(z + jitter * torch.randn(z.shape, generator=generator))
        error = y - x
        loss = error.abs().mean() + 4 * error.square().mean() + _gradients(error)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            report(step, {"loss": loss.item(), "psnr": psnr(y, x), "cpu_s": time.process_time() - started})
    codec.eval()


def _gradients(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1..1."""
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


@dataclass(frozen=True)
class FlowMatching:
    """lr: of AdamW; muon_lr: of Muon. ema: decay of the average of the weights that training ends with.

    context_noise: largest standard deviation of the noise on the history, which half of the videos get. on_schedule:
    share of the blocks denoised at a level of the few-step schedule; the others at s = 3u / (1 + 2u), u uniform.
    freeze: patterns of weights that are not trained.
    """

    steps: int
    lr: float
    muon_lr: float
    ema: float
    context_noise: float
    on_schedule: float
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """latents [B, C, F, h, w] of true videos; control [B, Cc, F, h, w]; history like latents, what the network is shown
    of the frames before a block; text [B, L, text_dim].
    """

    latents: Tensor
    control: Tensor
    history: Tensor
    text: Tensor


class Levels(Protocol):
    """As `FlowMatching` says them."""

    on_schedule: float
    context_noise: float


def flow_loss(
    forward: Callable[..., Tensor], policy: DragPolicy, example: Example, how: Levels, generator: torch.Generator
) -> Tensor:
    """Mean square error of the velocity, every block at a level of its own, in one packed pass.

    forward: `CausalWan.packed`, or something that wraps it. generator: on the CPU, so that the noise is the same
    wherever the network is.
    """
    latents, device, blocks = example.latents, example.latents.device, range(1, len(policy.sizes))
    batch, levels = len(latents), torch.tensor(policy.sigmas[:-1])
    u = torch.rand(batch, len(blocks), generator=generator)
    s = 3 * u / (1 + 2 * u)
    listed = levels[torch.randint(len(levels), s.shape, generator=generator)]
    s = torch.where(torch.rand(s.shape, generator=generator) < how.on_schedule, listed, s)
    s = s.repeat_interleave(torch.tensor(policy.sizes[1:]), 1).to(device)
    noise = torch.randn(latents[:, :, 1:].shape, generator=generator).to(device)
    noisy = latents[:, :, 1:].lerp(noise, s[:, None, :, None, None])
    half = torch.rand(batch, generator=generator) < 0.5
    shaken = (how.context_noise * torch.rand(batch, generator=generator) * half).to(device)
    grain = torch.randn(latents.shape, generator=generator).to(device)
    history = example.history + shaken[:, None, None, None, None] * grain
    history[:, :, 0] = latents[:, :, 0]
    clean = torch.cat((history, example.control), 1)
    v = forward(clean, torch.cat((noisy, example.control[:, :, 1:]), 1), s * 1000, example.text, policy.sizes, blocks)
    return (v - (noise - latents[:, :, 1:])).square().mean()


def fit_policy(
    policy: DragPolicy,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    settings: FlowMatching,
    report: Report,
    seed: int,
) -> None:
    """Flow matching, packed: every block is denoised at its own level, given the history before it.

    batches: (latents [B, C, F, h, w], control [B, Cc, F, h, w], history like latents: the latents themselves for
    teacher forcing, the policy's own for what it will meet in use). Noise on the history makes the policy bear with
    the flaws of its own frames. Block matrices train with Muon (arXiv 2502.16982), all other weights with AdamW.
    """
    generator = torch.Generator().manual_seed(seed)
    net = policy.net
    net.requires_grad_(True)
    freeze(net.model, settings.freeze)
    matrices = [p for p in net.model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if all(p is not q for q in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.01),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: cosine(step, settings.steps)) for o in optimizers]
    averaged = [p.detach().clone() for p in net.parameters()]
    started = time.process_time()
    for step in range(settings.steps):
        latents, control, history = next(batches)
        text = policy.text([""] * len(latents))
        loss = flow_loss(net, policy, Example(latents, control, history, text), settings, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in net.parameters()], 1 - decay)
        if step % 50 == 0 or step == settings.steps - 1:
            report(step, {"loss": loss.item(), "cpu_s": time.process_time() - started})
    with torch.no_grad():
        for p, mean in zip(net.parameters(), averaged):
            p.copy_(mean)
