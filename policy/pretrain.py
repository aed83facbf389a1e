"""Supervised training of the tiny policy's parts: the codec, then the policy by packed flow matching.

Pure functions over iterators of batches; where the videos come from is the caller's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from policy.codec import ConvCodec

Report = Callable[[int, dict[str, float]], None]


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit_codec(codec: ConvCodec, frames: Iterator[Tensor], steps: int, lr: float, jitter: float, report: Report,
              seed: int) -> None:  # fmt: skip
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
