"""How a drag enters the policy: extra input channels beside the noisy latents, computed from the first frame and the
tracks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from policy.codec import Codec


@dataclass(frozen=True)
class Drag:
    """The first frame and the lines of a batch of prompts.

    first_frame float [B, 3, H, W] in -1..1; tracks float [B, T, N, 2] (x, y) px; visible bool [B, T, N], False for
    padding too.
    """

    first_frame: Tensor
    tracks: Tensor
    visible: Tensor

    def rows(self, index: Tensor) -> Drag:
        return Drag(self.first_frame[index], self.tracks[index], self.visible[index])


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

    def encode(self, drag: Drag, frames: slice = slice(None)) -> Tensor:
        """float [B, channels, f, h, w]: the control of the given video frames (one latent each); causal in the
        tracks.
        """
        picture, known = self._canvas(drag, frames)
        features = self.codec.encode(picture)
        h, w = features.shape[-2:]
        stride = self.codec.spatial_stride
        at = [torch.arange(n, device=features.device) * stride + (stride - 1) / 2 for n in (h, w)]
        y, x = torch.meshgrid(*at, indexing="ij")
        tracks, visible = drag.tracks[:, frames], drag.visible[:, frames]
        square = (x - tracks[..., 0, None, None]) ** 2 + (y - tracks[..., 1, None, None]) ** 2
        heat = (torch.exp(-square / (2 * self.sigma**2)) * visible[..., None, None]).amax(2)
        return torch.cat((heat[:, None], F.avg_pool2d(known, stride)[:, None], features), 1)

    def _canvas(self, drag: Drag, frames: slice) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, f, H, W] with the windows pasted, and which of their pixels are known, float [B, f, H, W]."""
        first, (height, width) = drag.first_frame, drag.first_frame.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(height, device=first.device), torch.arange(width, device=first.device), indexing="ij"
        )
        start, now = drag.tracks[:, :1], drag.tracks[:, frames]
        active = drag.visible[:, :1]

        def within(points: Tensor) -> Tensor:
            far = torch.maximum((x - points[..., 0, None, None]).abs(), (y - points[..., 1, None, None]).abs())
            return far <= self.window

        left = (within(start) & active[..., None, None]).any(2)
        filled = torch.where(left, fill_from_around(first, left.float(), self.window), first)
        f = now.shape[1]
        canvas = filled[:, :, None].expand(-1, -1, f, -1, -1)
        known = ~left.expand(-1, f, -1, -1)
        for n in range(now.shape[2]):
            here = within(now[:, :, n]) & (active[..., n] & drag.visible[:, frames, n])[..., None, None]
            moved = shift_picture(first, now[:, :, n] - start[:, :, n])
            canvas = torch.where(here[:, None], moved, canvas)
            known = known | here
        return canvas, known.float()


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
