"""Pixels to latents and back: the codec protocol, and the small convolutional codec of the tiny policy."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CodecState = tuple[Tensor | None, ...] | None
"""What a streaming decoder remembers of the frames before, batch first; None at the start. Never changed in place."""


class Codec(Protocol):
    """Videos are float [B, 3, T, H, W] in -1..1, latents float [B, channels, F, h, w] of about unit variance.

    The first latent frame holds one video frame, each further one `temporal_stride` of them.
    """

    channels: int
    spatial_stride: int
    temporal_stride: int

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, state: CodecState = None) -> tuple[Tensor, CodecState]:
        """Decodes the next latent frames of a stream; returns their video frames and the state after them."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the weights into a policy's folder."""
        ...


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    padding = (kernel - stride + 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, padding_mode="replicate")


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), _conv(width, width), nn.SiLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvCodec(nn.Module):
    """A frame-wise convolutional codec with stride 8. All its kernels overlap, so blocks leave no seams.

    The encoder ends in a batch norm without parameters: after training, latents have mean 0 and variance 1.
    """

    spatial_stride = 8
    temporal_stride = 1

    def __init__(self, channels: int = 32, width: int = 64) -> None:
        super().__init__()
        self.channels, half = channels, width // 2
        self.encoder = nn.Sequential(
            _conv(3, half, 8, 4),
            ResidualBlock(half),
            nn.SiLU(),
            _conv(half, width, 4, 2),
            ResidualBlock(width),
            nn.SiLU(),
            _conv(width, channels),
            nn.BatchNorm2d(channels, affine=False, momentum=0.01),
        )
        self.decoder = nn.Sequential(
            _conv(channels, width),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, half, 4, stride=2, padding=1),
            ResidualBlock(half),
            nn.SiLU(),
            nn.ConvTranspose2d(half, 8, 8, stride=4, padding=2),
            nn.SiLU(),
            _conv(8, 3),
        )

    def encode(self, video: Tensor) -> Tensor:
        return self._framewise(self.encoder, video)

    def decode(self, latents: Tensor, state: CodecState = None) -> tuple[Tensor, CodecState]:
        return self._framewise(self.decoder, latents), None

    def _framewise(self, part: nn.Module, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        # Some frames at a time, whose activations stay in the cache of a CPU; a batch norm in training wants them all.
        pieces = [frames] if self.training else frames.split(64)
        return torch.cat([part(piece) for piece in pieces]).unflatten(0, (len(x), -1)).transpose(1, 2)

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "codec.safetensors")


def to_pixels(video: Tensor) -> Tensor:
    """float [..., 3, T, H, W] in about -1..1 -> uint8 [..., T, H, W, 3]. A frame with a non-finite value is all
    black.
    """
    frames = video.movedim(-4, -1)
    finite = frames.isfinite().flatten(-3).all(-1)[..., None, None, None]
    return torch.where(finite, frames, -1.0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_pixels(video: Tensor) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in -1..1."""
    return video.movedim(-1, -4).float().div(127.5).sub(1)
