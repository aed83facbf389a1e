"""How a drag enters the policy: extra input channels beside the noisy latents, computed from the first frame and the
tracks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from policy.codec import Codec


@dataclass(frozen=True)
class Drag:
    """The first frame and the lines of a batch of prompts.

    first_frame float [B, 3, H, W] in -1..1; tracks float [B, T, N, 2] (x, y) px; visible bool [B, T, N], False for
    padding too. Once a control has prepared it, background: latents [B, C, F, h, w] that it lays under the drag;
    filled float [B, 3, H, W]: the first frame without what stands at the points.
    """

    first_frame: Tensor
    tracks: Tensor
    visible: Tensor
    background: Tensor | None = None
    filled: Tensor | None = None

    def rows(self, index: Tensor) -> Drag:
        parts = (self.first_frame, self.tracks, self.visible, self.background, self.filled)
        return Drag(*(None if part is None else part.index_select(0, index) for part in parts))


class Control(Protocol):
    """channels: of the input that follows the noisy latents."""

    channels: int

    def prepare(self, drag: Drag) -> Drag:
        """The drag with what follows from its first frame alone, so that it is computed once."""
        ...

    def encode(self, drag: Drag, frames: slice = slice(None)) -> Tensor:
        """float [B, channels, f, h, w]: the control of the given latent frames; causal in the tracks."""
        ...


class MovedWindowControl:
    """Wan's image-to-video layout in small: [heat map | known | features of the first frame, moved along the drag].

    A window around each dragged point is moved along the track IN PIXELS, pasted over the first frame, and the
    picture is then encoded: latents are not shift-equivariant, so moving them instead costs about ten times the track
    error. What the moved window leaves bare is filled from its surroundings and marked as not known. window: half
    side, px. sigma: width of the heat map, px.
    """

    def __init__(self, codec: Codec, window: float, sigma: float) -> None:
        self.codec, self.window, self.sigma = codec, window, sigma
        self.channels = codec.channels + 2

    def prepare(self, drag: Drag) -> Drag:
        return replace(drag, filled=without_points(drag, self.window))

    def encode(self, drag: Drag, frames: slice = slice(None)) -> Tensor:
        """float [B, channels, f, h, w]: the control of the given video frames (one latent each); causal in the
        tracks.
        """
        picture, known = moved_windows(drag, frames, self.window)
        features = self.codec.encode(picture)
        stride = self.codec.spatial_stride
        tracks, visible = drag.tracks[:, frames], drag.visible[:, frames]
        heat = heat_maps(tracks, visible, features.shape[-2:], stride, self.sigma).amax(2)
        return torch.cat((heat[:, None], F.avg_pool2d(known, stride)[:, None], features), 1)


def heat_maps(tracks: Tensor, visible: Tensor, size: Sequence[int], stride: int, sigma: float) -> Tensor:
    """A Gaussian of width sigma px and height 1 at every visible point, at the centres of h x w cells of stride px.

    tracks [B, f, N, 2] px, visible bool [B, f, N]; size: (h, w). Returns [B, f, N, h, w].
    """
    at = [torch.arange(n, device=tracks.device) * stride + (stride - 1) / 2 for n in size]
    y, x = torch.meshgrid(*at, indexing="ij")
    square = (x - tracks[..., 0, None, None]) ** 2 + (y - tracks[..., 1, None, None]) ** 2
    return torch.exp(-square / (2 * sigma**2)) * visible[..., None, None]


def moved_windows(drag: Drag, frames: slice | Tensor, window: float) -> tuple[Tensor, Tensor]:
    """The first frame with the windows around its points where the drag has them in the given video frames.

    window: half side, px. Returns pictures [B, 3, f, H, W] and which of their pixels are known, float [B, f, H, W].
    """
    first, start, now = drag.first_frame, drag.tracks[:, :1], drag.tracks[:, frames]
    filled = without_points(drag, window) if drag.filled is None else drag.filled
    f = now.shape[1]
    canvas = filled[:, :, None].expand(-1, -1, f, -1, -1)
    known = ~_left(drag, window).expand(-1, f, -1, -1)
    for n in range(now.shape[2]):
        here = _within(now[:, :, n], first.shape[-2:], window)
        here = here & (drag.visible[:, :1, n] & drag.visible[:, frames, n])[..., None, None]
        moved = shift_picture(first, now[:, :, n] - start[:, :, n])
        canvas = torch.where(here[:, None], moved, canvas)
        known = known | here
    return canvas, known.float()


def without_points(drag: Drag, window: float) -> Tensor:
    """The first frame [B, 3, H, W] with the windows around its points filled from their surroundings."""
    left = _left(drag, window)
    return torch.where(left, fill_from_around(drag.first_frame, left.float(), window), drag.first_frame)


def _left(drag: Drag, window: float) -> Tensor:
    """bool [B, 1, H, W]: what lies in the window of a point of the first frame."""
    within = _within(drag.tracks[:, :1], drag.first_frame.shape[-2:], window)
    return (within & drag.visible[:, :1, :, None, None]).any(2)


def _within(points: Tensor, size: Sequence[int], window: float) -> Tensor:
    """bool [..., H, W]: the pixels in the window around each point [..., 2]."""
    y, x = torch.meshgrid(*(torch.arange(n, device=points.device) for n in size), indexing="ij")
    far = torch.maximum((x - points[..., 0, None, None]).abs(), (y - points[..., 1, None, None]).abs())
    return far <= window


def fill_from_around(picture: Tensor, hole: Tensor, reach: float) -> Tensor:
    """Normalised box blur of the pixels outside the hole: a smooth guess of what lies behind. picture [B, 3, H, W],
    hole [B, 1, H, W].
    """
    side, keep = 2 * int(reach) + 1, 1 - hole

    def blur(z: Tensor) -> Tensor:
        for kernel in ((side, 1), (1, side)) * 2:
            z = F.pad(z, [kernel[1] // 2] * 2 + [kernel[0] // 2] * 2, mode="replicate")
            z = F.avg_pool2d(z, kernel, stride=1)
        return z

    return blur(picture * keep) / blur(keep).clamp_min(1e-4)


def shift_picture(picture: Tensor, offset: Tensor) -> Tensor:
    """picture [B, 3, H, W] moved by offset [B, f, 2] px (bicubic, edges repeated) -> [B, 3, f, H, W]."""
    (batch, _, height, width), frames = picture.shape, offset.shape[1]
    y, x = torch.meshgrid(
        torch.arange(height, device=picture.device), torch.arange(width, device=picture.device), indexing="ij"
    )
    source = torch.stack((x, y), -1) - offset[:, :, None, None]
    grid = source * 2 / torch.tensor([width - 1, height - 1], device=picture.device) - 1
    moved = F.grid_sample(
        picture.repeat_interleave(frames, 0),
        grid.flatten(0, 1),
        mode="bicubic",
        padding_mode="border",
        align_corners=True,
    )
    return moved.unflatten(0, (batch, frames)).transpose(1, 2)
