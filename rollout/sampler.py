"""Streaming generation of a batch of prompts: the process that is deployed, and therefore the process that is
trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from policy.attention import KVCache, rows_of
from policy.codec import CodecState, from_pixels, to_pixels
from policy.control import Drag
from policy.policy import DragPolicy
from policy.transition import ode_step
from rollout.plan import NoisePlan
from rollout.prompts import DragPrompt


def collate(prompts: Sequence[DragPrompt], device: torch.device | str = "cpu") -> Drag:
    """Prompts as one batch; prompts with fewer points are padded with invisible ones."""
    points = max(p.tracks.shape[1] for p in prompts)

    def pad(array: np.ndarray) -> Tensor:
        missing = points - array.shape[1]
        return torch.from_numpy(np.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)))

    first = torch.from_numpy(np.stack([p.first_frame for p in prompts])[:, None])
    return Drag(
        from_pixels(first)[:, :, 0].to(device),
        torch.stack([pad(p.tracks) for p in prompts]).float().to(device),
        torch.stack([pad(p.visible) for p in prompts]).to(device),
    )


@dataclass(frozen=True)
class Stream:
    """A batch of videos in the making; never changed, so a stream can be forked by `rows`.

    drag: None where only latents are wanted. control [B, Cc, F, h, w]; text: of `DragPolicy.context`; cache: keys and
    values of the finished frames; codec_state: of the frames decoded so far; block: the next one.
    """

    drag: Drag | None
    control: Tensor
    text: Tensor
    cache: KVCache
    codec_state: CodecState
    block: int

    def rows(self, index: Tensor) -> Stream:
        text, cache, control = rows_of(self.text, index), self.cache.rows(index), rows_of(self.control, index)
        return Stream(self.drag.rows(index), control, text, cache, state_rows(self.codec_state, index), self.block)


def state_rows(state: CodecState, index: Tensor) -> CodecState:
    return state and tuple(None if part is None else rows_of(part, index) for part in state)


class Sampler:
    """Block by block: N denoising steps against the cache, then one context pass on the finished block (Self-Rollout).

    renoise: unselected steps draw fresh noise (for a student trained on renoised inputs) in place of the ODE step.
    """

    def __init__(self, policy: DragPolicy, renoise: bool = False) -> None:
        self.policy, self.renoise = policy, renoise
        starts = np.cumsum((0, *policy.sizes))
        self.frames = [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]
        self.levels = list(zip(policy.sigmas, policy.sigmas[1:]))

    def video(self, block: int) -> slice:
        """The video frames of a block."""
        return self.policy.video_frames(self.frames[block])

    def begin(self, prompts: Sequence[DragPrompt]) -> tuple[Stream, Tensor]:
        """The stream after its given first frame, and that frame's latent [B, C, 1, h, w]."""
        policy = self.policy
        drag = policy.control.prepare(collate(prompts, policy.device))
        first = policy.first_latent(drag)
        _, codec_state = policy.codec.decode(first, None)
        text = policy.context([p.text for p in prompts], drag)
        stream = Stream(drag, policy.control.encode(drag), text, KVCache(), codec_state, 0)
        return self.append(stream, first), first

    def initial(self, plans: Sequence[NoisePlan], block: int) -> Tensor:
        shape = self._shape(block)
        return torch.stack([p.initial(block, shape) for p in plans]).to(self.policy.device)

    def control(self, stream: Stream) -> Tensor:
        """Of the stream's next block, [B, Cc, f, h, w]."""
        return stream.control[:, :, self.frames[stream.block]]

    def velocity(
        self, stream: Stream, x: Tensor, s: float, control: Tensor | None = None, parents: Tensor | None = None
    ) -> Tensor:
        """The network at states x [R, C, f, h, w] of the stream's next block, at noise level s.

        control [R, Cc, f, h, w]: None = the stream's. parents int64 [R]: the rows of the stream that the states
        continue, which are not copied; None = each its own.
        """
        text = stream.text if parents is None else rows_of(stream.text, parents)
        control = self.control(stream) if control is None else control
        return self.policy.net.block(torch.cat((x, control), 1), s * 1000, text, stream.cache, parents)

    def advance(self, x: Tensor, v: Tensor, step: int, plans: Sequence[NoisePlan], block: int) -> Tensor:
        """An unselected step."""
        s, s2 = self.levels[step]
        if not self.renoise or s2 == 0:
            return ode_step(x, v, s, s2)
        noise = torch.stack([p.renoise(block, step, self._shape(block)) for p in plans]).to(x)
        return (1 - s2) * (x - s * v) + s2 * noise

    def finish(self, stream: Stream, x: Tensor, plans: Sequence[NoisePlan]) -> Tensor:
        """Denoises x, the initial noise of the next block, to the clean block."""
        for k, (s, _) in enumerate(self.levels):
            x = self.advance(x, self.velocity(stream, x, s), k, plans, stream.block)
        return x

    def append(self, stream: Stream, block: Tensor) -> Stream:
        """The context pass on a finished block [B, C, f, h, w]; nothing attends to the last one, which has none."""
        if stream.block == len(self.frames) - 1:
            return replace(stream, block=stream.block + 1)
        x = torch.cat((block, self.control(stream)), 1)
        cache = self.policy.net.append(x, stream.text, stream.cache)
        return replace(stream, cache=cache, block=stream.block + 1)

    def decode(self, stream: Stream, block: Tensor) -> tuple[np.ndarray, Stream]:
        """Pixels uint8 [B, t, H, W, 3] of the next block, and the stream with its decoder moved on."""
        video, state = self.policy.codec.decode(block, stream.codec_state)
        return to_pixels(video).cpu().numpy(), replace(stream, codec_state=state)

    @torch.no_grad()
    def generate(self, prompts: Sequence[DragPrompt], plans: Sequence[NoisePlan]) -> np.ndarray:
        """Whole videos uint8 [B, T, H, W, 3] without exploration: what evaluation and deployment do."""
        stream, _ = self.begin(prompts)
        video = [np.stack([p.first_frame for p in prompts])[:, None]]
        while stream.block < len(self.frames):
            x = self.finish(stream, self.initial(plans, stream.block), plans)
            pixels, stream = self.decode(stream, x)
            video.append(pixels)
            stream = self.append(stream, x)
        return np.concatenate(video, 1)

    def _shape(self, block: int) -> tuple[int, ...]:
        channels, h, w = self.policy.latent_shape
        return channels, self.policy.sizes[block], h, w
