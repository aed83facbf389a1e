"""How a drag enters Wan: the 20 channels that its image-to-video layout has beside the 16 of the noisy latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from policy.codec import Codec
from policy.control import Drag, heat_maps, moved_windows, without_points

FEATURES = ("splat", "moved_window")
BACKGROUNDS = ("zeros", "grey")


class WanControl:
    """[4 heat maps, one a video frame | features of the first frame, where the drag has them], per latent frame.

    Wan's image-to-video layout is [4 mask | 16 condition]: the mask is 1 in the given latent frame and 0 after it, the
    condition holds the latents of the first frame followed by grey. Here the zeros of the mask carry the drag as
    Gaussian heat maps, and the condition carries the first frame's features along it.

    features "splat": the feature under each point, read off the first latent frame bilinearly and laid over the
    background with the weight of the heat map (ATI, arXiv 2505.22944). "moved_window": the picture with the window
    around each point moved in pixels, encoded as an image. Latents are not shift-equivariant, so this tells more (in
    the small policy a tenth of the track error); it costs an encoding per latent frame.
    background, of "splat": "zeros", the mean latent, is what a widened T2V checkpoint may be taught on; "grey" is the
    condition that image-to-video checkpoints know, and costs the encoding of a whole clip at the start.
    A latent frame shows the drag at the last of its video frames. sigma: width of the heat map, window: half side of
    the moved window, px.
    """

    def __init__(self, codec: Codec, features: str, background: str, sigma: float, window: float) -> None:
        self.codec, self.features, self.background, self.sigma, self.window = codec, features, background, sigma, window
        self.channels = codec.temporal_stride + codec.channels

    def prepare(self, drag: Drag) -> Drag:
        length = drag.tracks.shape[1]
        first = drag.first_frame[:, :, None]
        if self.background == "grey":
            latents = self.codec.encode(F.pad(first, (0, 0, 0, 0, 0, length - 1)))
        else:
            latents = F.pad(self.codec.encode(first), (0, 0, 0, 0, 0, (length - 1) // self.codec.temporal_stride))
        filled = without_points(drag, self.window) if self.features == "moved_window" else None
        return replace(drag, background=latents, filled=filled)

    def encode(self, drag: Drag, frames: slice = slice(None)) -> Tensor:
        """float [B, 4 + C, f, h, w]: the control of the given latent frames; causal in the tracks."""
        drag = drag if drag.background is not None else self.prepare(drag)
        background, stride = drag.background[:, :, frames], self.codec.temporal_stride
        at = torch.arange(drag.background.shape[2], device=background.device)[frames]
        shown = (at[:, None] * stride + torch.arange(1 - stride, 1, device=at.device)).clamp_min(0)
        weight = heat_maps(
            drag.tracks[:, shown].flatten(1, 2),
            (drag.visible[:, shown] & drag.visible[:, :1, None]).flatten(1, 2),
            background.shape[-2:],
            self.codec.spatial_stride,
            self.sigma,
        ).unflatten(1, shown.shape)
        heat = weight.amax(3).transpose(1, 2)
        if self.features == "splat":
            features = self._splat(drag, weight[:, :, -1], background)
        else:
            features = self._moved(drag, at * stride)
        given = (at == 0)[:, None, None]
        return torch.cat((heat.where(~given, 1.0), features.where(~given, background)), 1)

    def _splat(self, drag: Drag, weight: Tensor, background: Tensor) -> Tensor:
        """weight [B, f, N, h, w] -> [B, C, f, h, w]. Where points overlap their features are averaged by weight."""
        stride, (h, w) = self.codec.spatial_stride, background.shape[-2:]
        cells = (drag.tracks[:, :1] - (stride - 1) / 2) / stride
        grid = cells * 2 / torch.tensor([w - 1, h - 1], device=cells.device) - 1
        own = F.grid_sample(drag.background[:, :, 0], grid, padding_mode="border", align_corners=True)[:, :, 0]
        mixed = torch.einsum("bcn,bfnhw->bcfhw", own, weight) / weight.sum(2)[:, None].clamp_min(1e-6)
        return background.lerp(mixed, weight.amax(2)[:, None])

    def _moved(self, drag: Drag, frames: Tensor) -> Tensor:
        """The pictures with the window moved, in the given video frames, each encoded by itself: [B, C, f, h, w]."""
        pictures, _ = moved_windows(drag, frames, self.window)
        latents = self.codec.encode(pictures.transpose(1, 2).flatten(0, 1)[:, :, None])
        return latents[:, :, 0].unflatten(0, (-1, len(frames))).transpose(1, 2)
