"""A causal, streaming Wan on diffusers' unmodified `WanTransformer3DModel`.

Only the self-attention processors are swapped (`set_processor`, public API); weights, configuration, state-dict keys
and loading stay diffusers' own. The same weights run in four ways, which agree to rounding:

    block()   one block of frames against a KV cache: the streaming rollout
    full()    all frames at once under a block-causal mask
    packed()  [clean | noisy blocks] in one pass: what every block's streamed step computed, for the learner
    model()   diffusers' own bidirectional forward

Inputs and velocities are float32 whatever the dtype of the weights; keys and values are kept in that of the weights.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from policy.attention import (
    ATTENTIONS,
    BlockMask,
    KVCache,
    StreamAttention,
    block_mask,
    causal_mask,
    dense_mask,
    packed_mask,
    uses_flex,
    visible_from,
)

from diffusers import WanTransformer3DModel  # isort: skip  (after policy.attention has readied torchvision)


class CausalWan(nn.Module):
    """window: latent frames that a block sees, itself and the sink included (None: all). sink: first frames always
    seen. least: frames of the smallest block after the first; the cache keeps what such a one may see. attention: of
    full() and packed(): dense masks, `flex_attention`, or auto (`uses_flex`). ValueError for another.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        window: int | None = None,
        sink: int = 0,
        least: int = 1,
        attention: str = "dense",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention} is none of {', '.join(ATTENTIONS)}")
        self.model, self.window, self.sink, self.least, self.attention = model, window, sink, least, attention
        self.processors = [StreamAttention() for _ in model.blocks]
        for layer, processor in zip(model.blocks, self.processors):
            layer.attn1.set_processor(processor)
        self._frame_mask = lru_cache(maxsize=32)(self._make_frame_mask)
        self._block_mask = lru_cache(maxsize=32)(self._make_block_mask)

    def block(
        self, x: Tensor, t: Tensor | float, text: Tensor, cache: KVCache, parents: Tensor | None = None
    ) -> Tensor:
        """Velocity of the next block. x [B, channels, f, h, w]; t: time in 0..1000, scalar or [B]; leaves the cache
        alone. parents int64 [B]: which row of the cache each x continues (None: its own), so that forks need no copy
        of it.
        """
        return self._stream(x, t, text, cache, parents=parents)[0]

    def append(self, x: Tensor, text: Tensor, cache: KVCache) -> KVCache:
        """The context pass: the cache after clean block x [B, channels, f, h, w], which holds what the next may see."""
        _, fresh = self._stream(x, 0.0, text, cache, keep=True)
        end, tokens = cache.next_frame + x.shape[2], math.prod(self._grid(x))
        frames = (*cache.frames, *range(cache.next_frame, end))
        kept = visible_from(torch.tensor(frames), torch.tensor(end + self.least), self.window, self.sink)
        index = None if kept.all() else kept.repeat_interleave(tokens).nonzero()[:, 0].to(x.device)

        def grown(past: Tensor | None, new: Tensor) -> Tensor:
            whole = new if past is None else torch.cat((past, new), 1)
            return whole if index is None else whole[:, index]

        past = cache.layers or [(None, None)] * len(fresh)
        layers = tuple((grown(pk, k), grown(pv, v)) for (pk, pv), (k, v) in zip(past, fresh))
        return KVCache(layers, tuple(f for f, keep in zip(frames, kept.tolist()) if keep), end)

    def full(self, x: Tensor, t: Tensor, text: Tensor, sizes: Sequence[int]) -> Tensor:
        """Velocity of all frames, block-causal. x [B, channels, F, h, w]; t [B, F] in 0..1000; sizes: frames per
        block.
        """
        return self._whole(x, t, text, tuple(sizes), (), x.shape[2])

    def packed(
        self, clean: Tensor, noisy: Tensor, t: Tensor, text: Tensor, sizes: Sequence[int], blocks: Sequence[int]
    ) -> Tensor:
        """Velocity of the noisy blocks, each given the clean frames before it, in one pass.

        clean [B, channels, K, h, w]: whole blocks from block 0 on, at least those before the last noisy one; noisy
        [B, channels, n, h, w]: the frames of `blocks`, one after the other; t [B, n] in 0..1000; sizes: frames per
        block. Returns [B, out_channels, n, h, w].
        """
        known = clean.shape[2]
        t = torch.cat((t.new_zeros(t.shape[0], known), t), 1)
        return self._whole(torch.cat((clean, noisy), 2), t, text, tuple(sizes), tuple(blocks), known)[:, :, known:]

    forward = packed

    def _whole(self, x: Tensor, t: Tensor, text: Tensor, *signature) -> Tensor:
        """One pass over all frames x; signature: of `_make_frame_mask`."""
        rows, columns = self._grid(x)
        tokens, (frames, ids) = rows * columns, self._frame_mask(*signature)
        if uses_flex(self.attention, x.device, self.model.config.attention_head_dim):
            mask = self._block_mask(signature, tokens, x.device)
        else:
            mask = dense_mask(frames.to(x.device), tokens)
        with self._installed(self._rotary(ids, rows, columns), mask):
            return self._velocity(x, t.repeat_interleave(tokens, 1), text)

    def _make_frame_mask(self, sizes: tuple[int, ...], blocks: tuple[int, ...], known: int) -> tuple[Tensor, Tensor]:
        """Which frames see which, and their ids; without noisy `blocks` the whole video is clean."""
        if blocks:
            return packed_mask(sizes, blocks, known, self.window, self.sink)
        return causal_mask(sizes, self.window, self.sink), torch.arange(known)

    def _make_block_mask(self, signature: tuple, tokens: int, device: torch.device) -> BlockMask:
        return block_mask(self._frame_mask(*signature)[0].to(device), tokens)

    def _stream(self, x: Tensor, t: Tensor | float, text: Tensor, cache: KVCache, keep: bool = False, parents=None):
        """The velocity, and what the processors kept."""
        rows, columns = self._grid(x)
        end = cache.next_frame + x.shape[2]
        if self.window is not None and cache.frames and x.shape[2] < self.least:
            raise ValueError(f"a block of {x.shape[2]} frames, but the cache was kept for {self.least} and more")
        seen = visible_from(torch.tensor(cache.frames), torch.tensor(end), self.window, self.sink)
        past = list(cache.layers)
        if not seen.all():  # a larger block than the cache was kept for sees less
            index = seen.repeat_interleave(rows * columns).nonzero()[:, 0].to(x.device)
            past = [(k[:, index], v[:, index]) for k, v in past]
        t = torch.as_tensor(t, device=x.device, dtype=torch.float32).expand(x.shape[0])
        with self._installed(
            self._rotary(torch.arange(cache.next_frame, end), rows, columns), None, past, keep, parents
        ):
            v = self._velocity(x, t, text)
            return v, [processor.fresh for processor in self.processors]

    def _velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        dtype, image = self.model.proj_out.weight.dtype, None
        if self.model.config.image_dim is not None:
            text, image = split_context(text.to(dtype), self.model.config.text_dim, self.model.config.image_dim)
        return self.model(x.to(dtype), t, text.to(dtype), image, return_dict=False)[0].float()

    def enable_gradient_checkpointing(self) -> None:
        """Keeps the input of each block alone for the backward pass, which computes the rest again."""

        def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
            processor = block.attn1.processor
            own = processor.rotary, processor.mask, processor.past

            # The backward pass must see the state of its own forward pass, not the one that is installed by then.
            def run(*inputs: Tensor) -> Tensor:
                held = vars(processor).copy()
                processor.rotary, processor.mask, processor.past = own
                try:
                    return block(*inputs)
                finally:
                    if held["rotary"] is not own[0]:
                        vars(processor).update(held)

            return checkpoint(run, *inputs, use_reentrant=False)

        self.model.enable_gradient_checkpointing(recomputed)

    @contextmanager
    def _installed(
        self,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        past: Sequence | None = None,
        keep: bool = False,
        parents: Tensor | None = None,
    ):
        for i, processor in enumerate(self.processors):
            processor.rotary, processor.mask, processor.past = rotary, mask, past[i] if past else None
            processor.keep, processor.parents = keep, parents
        try:
            yield
        finally:
            for processor in self.processors:
                processor.rotary = processor.mask = processor.past = processor.fresh = processor.parents = None
                processor.keep = False

    def _grid(self, x: Tensor) -> tuple[int, int]:
        _, patch_h, patch_w = self.model.config.patch_size
        return x.shape[3] // patch_h, x.shape[4] // patch_w

    def _rotary(self, frames: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Rotary tables [1, L, 1, head_dim] of absolute frame ids; the model's own rope starts every call at frame
        0.
        """
        rope = self.model.rope
        tables = []
        for table in (rope.freqs_cos, rope.freqs_sin):
            time, y, x = table.split([rope.t_dim, rope.h_dim, rope.w_dim], 1)
            f = len(frames)
            grid = (
                time[frames.to(table.device)].view(f, 1, 1, -1).expand(f, rows, columns, -1),
                y[:rows].view(1, rows, 1, -1).expand(f, rows, columns, -1),
                x[:columns].view(1, 1, columns, -1).expand(f, rows, columns, -1),
            )
            tables.append(torch.cat(grid, -1).reshape(1, f * rows * columns, 1, -1))
        return tables[0], tables[1]


TEXT_TOKENS = 512
"""Of a transformer that reads an image too: diffusers' cross-attention tells the two apart by this number."""


def join_context(text: Tensor, image: Tensor) -> Tensor:
    """Text [B, TEXT_TOKENS, text_dim] and image [B, n, image_dim] as one tensor of the wider of the two, image first,
    which the four ways of running take in place of a text.
    """
    width = max(text.shape[-1], image.shape[-1])
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in (image, text)], 1)


def split_context(context: Tensor, text_dim: int, image_dim: int) -> tuple[Tensor, Tensor]:
    """The text and the image of `join_context`."""
    return context[:, -TEXT_TOKENS:, :text_dim], context[:, :-TEXT_TOKENS, :image_dim]


def widen_input(model: WanTransformer3DModel, extra: int) -> WanTransformer3DModel:
    """Adds `extra` zero-initialised control channels to the patch embedding; the function computed is unchanged."""
    old = model.patch_embedding
    new = nn.Conv3d(old.in_channels + extra, old.out_channels, old.kernel_size, old.stride).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    model.patch_embedding = new
    model.register_to_config(in_channels=old.in_channels + extra)
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Weights whose names match a pattern (`*`, `?`) are not trained; ValueError where one matches none, or nothing is
    left.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        if not (found := fnmatch.filter(names, pattern)):
            raise ValueError(f"freeze: {pattern!r} matches no weight of the policy (say, {next(iter(names))!r})")
        for name in found:
            names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise ValueError("freeze leaves nothing to train; take a pattern out")
