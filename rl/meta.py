"""Sizes of models that are not there: torch's meta device has shapes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from policy.causal import freeze
from policy.codec import Codec, CodecState
from rl.plan import CodecCost

from diffusers import AutoencoderKLWan, WanTransformer3DModel  # isort: skip  (after policy.causal has readied torchvision)


def meta_transformer(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """The transformer of a config.json, without memory. Raises ValueError where the config describes none."""
    try:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(dict(config))
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"transformer: {str(error).splitlines()[0]}; give the keys of its config.json") from error


def trained_weights(
    model: WanTransformer3DModel, patterns: Sequence[str], rank: int, targets: Sequence[str]
) -> tuple[int, bool, int]:
    """How many weights are trained (adapters of that rank on the linear layers whose names end in a target, or with
    rank 0 the model's own but for the frozen `patterns`), whether the blocks' own are, and how many numbers per token
    and layer the adapters read.
    """
    if rank:
        linear = {name: m for name, m in model.blocks[0].named_modules() if isinstance(m, nn.Linear)}
        adapted = {name: m for name, m in linear.items() if name.endswith(tuple(targets))}
        if not adapted:
            raise ValueError(f"lora.targets={list(targets)} names no linear layer (say, {next(iter(linear))})")
        count = sum(rank * (m.in_features + m.out_features) for m in adapted.values()) * len(model.blocks)
        text = ("attn2.to_k", "attn2.to_v")  # read the text, which is short
        return count, False, sum(m.in_features for name, m in adapted.items() if name not in text)
    freeze(model, patterns)
    full = any(m.weight.requires_grad for m in model.blocks.modules() if isinstance(m, nn.Linear))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), full, 0


def codec_cost(codec: Codec, latents: torch.Tensor) -> CodecCost:
    """Of decoding one block of a stream; codec and latents [1, C, f, h, w] on the meta device."""
    with torch.no_grad():
        _, state = codec.decode(latents)
        _, state = codec.decode(latents, state)
        with FlopCounterMode(display=False) as counter:
            peak = peak_bytes(lambda: codec.decode(latents, state))
    held = sum(part.untyped_storage().nbytes() for part in state or () if isinstance(part, torch.Tensor))
    weights = sum(p.numel() * p.element_size() for p in codec.parameters())
    return CodecCost(weights, held, peak, counter.get_total_flops() / latents.shape[2])


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of the storages that the call creates and that are alive together, on any device."""
    with _Storages() as storages:
        call()
    return storages.peak


class _Storages(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)


class StreamedWan(nn.Module):
    """`AutoencoderKLWan` of Wan2.1, decoded one latent frame at a time with the memory of its causal convolutions."""

    channels, spatial_stride, temporal_stride = 16, 8, 4

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = AutoencoderKLWan()
        nn.Module.to(self.vae, dtype)  # diffusers' own `to` warns

    def decode(self, latents: torch.Tensor, state: CodecState = None) -> tuple[torch.Tensor, CodecState]:
        count = sum(isinstance(m, nn.Conv3d) for m in self.vae.decoder.modules())
        memory = ["Rep" if part is None else part for part in state] if state else [None] * count
        frames = []
        for i, frame in enumerate(self.vae.post_quant_conv(latents).split(1, 2)):
            is_first = state is None and i == 0
            frames.append(self.vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=is_first))
        return torch.cat(frames, 2), tuple(part if isinstance(part, torch.Tensor) else None for part in memory)
