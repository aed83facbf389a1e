"""Sizes of models that are not there: torch's meta device has shapes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from policy.causal import freeze
from policy.codec import Codec, ConvCodec
from policy.lora import LoraSettings
from policy.policy import PolicySettings, Settings
from policy.wan import DTYPES, WAN_1_3B, make_control, vae_folder
from policy.wan_codec import WanCodec
from policy.wan_formats import read_architecture
from rl.plan import CodecCost

from diffusers import AutoencoderKLWan, WanTransformer3DModel  # isort: skip  (after policy.causal has readied torchvision)


def meta_transformer(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """The transformer of a config.json, without memory. Raises ValueError where the config describes none."""
    try:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(dict(config))
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"transformer: {str(error).splitlines()[0]}; give the keys of its config.json") from error


def meta_parts(path: str | None, s: Settings) -> tuple[WanTransformer3DModel, Codec]:
    """Transformer and codec as `load_policy` has them, without memory; path None: a Wan2.1 of 1.3B.

    Raises ValueError naming what is missing or describes none.
    """
    if isinstance(s, PolicySettings):
        with torch.device("meta"):
            codec = ConvCodec(s.codec_channels, s.codec_width).eval()
        return meta_transformer(read_architecture(path)), codec
    config = {} if path is None else AutoencoderKLWan.load_config(vae_folder(Path(path), s), local_files_only=True)
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
        codec = WanCodec(nn.Module.to(vae, DTYPES[s.codec_dtype]), s.decode_rows)  # diffusers' own `to` warns
    channels = codec.channels + make_control(codec, s).channels
    return meta_transformer(WAN_1_3B if path is None else read_architecture(path, channels)), codec


def trained_weights(
    model: WanTransformer3DModel, patterns: Sequence[str], lora: LoraSettings | None
) -> tuple[int, bool, int]:
    """How many weights are trained (those of the adapters, or the model's own but for the frozen `patterns`), whether
    the blocks' own are, and how many numbers per token and layer the adapters read.
    """
    if lora:
        linear = {name: m for name, m in model.blocks[0].named_modules() if isinstance(m, nn.Linear)}
        adapted = {name: m for name, m in linear.items() if name.endswith(lora.targets)}
        if not adapted:
            raise ValueError(
                f"policy.lora.targets={list(lora.targets)} names no linear layer (say, {next(iter(linear))})"
            )
        count = sum(lora.rank * (m.in_features + m.out_features) for m in adapted.values()) * len(model.blocks)
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
        pictures, state = codec.decode(latents, state)
    held = sum(part.untyped_storage().nbytes() for part in state or () if isinstance(part, torch.Tensor))
    weights = sum(p.numel() * p.element_size() for p in codec.parameters())
    flops, rows = counter.get_total_flops() / latents.shape[2], getattr(codec, "decode_rows", None)
    return CodecCost(weights, held, peak, flops, pictures.untyped_storage().nbytes(), rows)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of the storages that the call creates and that are alive together, on any device."""
    with _Storages() as storages:
        call()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Sizes of the storages made under it; those that operations read and it has not seen made are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for read in tree_leaves((args, kwargs)):
            if isinstance(read, torch.Tensor):
                self._add(read.untyped_storage(), 0)
        result = operation(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._add(made.untyped_storage(), made.untyped_storage().nbytes())
        return result

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)
