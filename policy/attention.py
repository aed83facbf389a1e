"""Self-attention for a causal Wan: the processor that diffusers' blocks are given, the KV cache, and the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchvision_cpu import ensure_torchvision

ensure_torchvision()

from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: E402

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KVCache:
    """Post-rotary keys and values of the clean frames that a block may see.

    layers: per transformer block (k, v), each [B, tokens, heads, head_dim]. frames: absolute indices of the cached
    latent frames. next_frame: the index that the next latent frame will have. A cache is never changed: appending and
    forking make new ones that share what they can.
    """

    layers: tuple[KeyValue, ...] = ()
    frames: tuple[int, ...] = ()
    next_frame: int = 0

    def rows(self, index: Tensor) -> KVCache:
        """The cache of the given batch rows; [0, 0, 1, 1] forks each of two prompts twice. The forks of a single row
        share its memory.
        """
        layers = tuple((rows_of(k, index), rows_of(v, index)) for k, v in self.layers)
        return KVCache(layers, self.frames, self.next_frame)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; of a single row a view."""
    return x.expand(len(index), *x.shape[1:]) if len(x) == 1 else x.index_select(0, index)


class StreamAttention:
    """diffusers' `WanAttnProcessor`, with rotary tables, mask and past keys and values set from outside.

    parents: which row of the past each row of the batch continues; None: its own. Forks share the memory of their past.
    keep: leave the new keys and values in `fresh`. For the context pass alone: anywhere else they are memory that lives
    as long as the pass, and with gradient checkpointing the graphs of all blocks.

    One instance a layer, without a layer index: torch.compile would specialise every block on it.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.rotary: KeyValue | None = None
        self.mask: Tensor | None = None
        self.past: KeyValue | None = None
        self.parents: Tensor | None = None
        self.keep, self.fresh = False, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        cos, sin = rotary_emb if self.rotary is None else self.rotary
        q = rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), cos, sin)
        k = rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), cos, sin)
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        self.fresh = (k, v) if self.keep else None
        if self.past is not None:
            k, v = joined(self.past[0], self.parents, k), joined(self.past[1], self.parents, v)
        x = dispatch_attention_fn(
            q, k, v, attn_mask=self.mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[1](attn.to_out[0](x.flatten(2, 3).type_as(q)))


def joined(past: Tensor, parents: Tensor | None, new: Tensor) -> Tensor:
    """The tokens of past[parents] (None: of the past as it is), then those of `new`: [B, L + l, heads, head_dim]."""
    if parents is None:
        return torch.cat((past, new), 1)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # one kernel of it; out= has no gradient
        return torch.cat((past.index_select(0, parents), new), 1)
    whole = new.new_empty(len(new), past.shape[1] + new.shape[1], *new.shape[2:])
    torch.index_select(past, 0, parents, out=whole[:, : past.shape[1]])  # past[parents] would write it all twice
    whole[:, past.shape[1] :] = new
    return whole


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of interleaved pairs, as Wan does it; x [B, L, heads, head_dim]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).type_as(x)


def visible_from(keys: Tensor, end: Tensor, window: int | None, sink: int) -> Tensor:
    """Which key frames a block that ends before frame `end` may see; the window counts the sink and the block
    itself.
    """
    seen = keys < end
    if window is not None:
        seen = seen & ((keys < sink) | (keys >= end - (window - sink)))
    return seen


def block_bounds(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First frame and end (exclusive) of the block that each frame belongs to, both int64 [sum(sizes)]."""
    counts = torch.tensor(sizes)
    ends = counts.cumsum(0)
    return (ends - counts).repeat_interleave(counts), ends.repeat_interleave(counts)


def causal_mask(sizes: Sequence[int], window: int | None, sink: int) -> Tensor:
    """bool [F, F]: block-causal attention between frames."""
    _, ends = block_bounds(sizes)
    return visible_from(torch.arange(len(ends))[None], ends[:, None], window, sink)


def packed_mask(
    sizes: Sequence[int], blocks: Sequence[int], known: int, window: int | None, sink: int
) -> tuple[Tensor, Tensor]:
    """Mask and frame ids of the packed sequence [`known` clean frames | one noisy copy of each block in `blocks`].

    A clean block sees clean blocks up to itself; a noisy copy sees the clean blocks before its own, and itself alone.
    The same block may stand in `blocks` several times (one copy per denoising step). Returns bool [L, L] and int64 [L]
    over frames.
    """
    starts, ends = block_bounds(sizes)
    ids = torch.arange(len(ends))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    noisy = torch.cat([torch.arange(offsets[b], offsets[b + 1]) for b in blocks])
    copy = torch.arange(len(blocks)).repeat_interleave(torch.tensor([sizes[b] for b in blocks]))
    clean_ids = ids[:known]
    context = visible_from(clean_ids[None], ends[noisy][:, None], window, sink) & (
        clean_ids[None] < starts[noisy][:, None]
    )
    clean = causal_mask(sizes, window, sink)[:known, :known]
    top = torch.cat((clean, torch.zeros(known, len(noisy), dtype=torch.bool)), 1)
    return torch.cat((top, torch.cat((context, copy[:, None] == copy[None]), 1))), torch.cat((clean_ids, noisy))
