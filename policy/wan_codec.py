"""Wan's own video autoencoder as a `Codec`: diffusers' `AutoencoderKLWan`, streamed in both directions.

Its causal convolutions remember the frames before. diffusers keeps that memory inside the model and drops it at the
end of every call; here it is a value that goes in and comes out, so that a stream can be paused and forked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from policy.codec import CodecState
from policy.files import WeightsError
from torchvision_cpu import ensure_torchvision

ensure_torchvision()

from diffusers import AutoencoderKLWan  # noqa: E402


class WanCodec(nn.Module):
    """Latents are the mean of the posterior, normalised by the autoencoder's latents_mean and latents_std.

    The first video frame makes one latent frame and each further latent frame holds `temporal_stride` = 4 of them.
    Pixels and latents are float32 whatever the dtype of the weights. No tiling: its seams would move with the drag.
    decode_rows: rows of a batch that are decoded together, None: all; the rest of a batch waits, as decoding takes
    more memory than what it remembers.
    """

    def __init__(self, vae: AutoencoderKLWan, decode_rows: int | None = None) -> None:
        super().__init__()
        self.decode_rows = decode_rows
        config = vae.config
        self.vae, self.channels = vae.eval(), config.z_dim
        self.spatial_stride, self.temporal_stride = config.scale_factor_spatial, config.scale_factor_temporal
        shape = (1, config.z_dim, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(config.latents_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(config.latents_std).view(shape), persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        return torch.cat([self.encode_stream(part)[0] for part in video.split(self.decode_rows or len(video))])

    def encode_stream(self, video: Tensor, state: CodecState = None) -> tuple[Tensor, CodecState]:
        """Encodes the next video frames: one and then whole latent frames at the start (1 + 4 n), later 4 n.

        Raises ValueError for another number of frames.
        """
        first, stride = int(state is None), self.temporal_stride
        if video.shape[2] < 1 or (video.shape[2] - first) % stride:
            raise ValueError(f"cannot encode {video.shape[2]} frames: give {'1 + ' * first}a multiple of {stride}")
        memory = _opened(state, self.vae.encoder)
        chunks = [*video[:, :, :first].split(1, 2), *video[:, :, first:].split(stride, 2)]
        moments = [
            self.vae.encoder(chunk.to(self.vae.dtype), feat_cache=memory, feat_idx=[0])
            for chunk in chunks
            if chunk.shape[2]
        ]
        mode, _ = self.vae.quant_conv(torch.cat(moments, 2)).float().chunk(2, 1)
        return (mode - self.mean) / self.std, tuple(memory)

    def decode(self, latents: Tensor, state: CodecState = None) -> tuple[Tensor, CodecState]:
        if self.decode_rows is None or len(latents) <= self.decode_rows:
            return self._decode(latents, state)
        whole: list[Tensor | None] = []  # filled as the rows come: kept one by one they would be there twice
        for start in range(0, len(latents), self.decode_rows):
            own = slice(start, start + self.decode_rows)
            before = state and tuple(None if part is None else part[own] for part in state)
            frames, after = self._decode(latents[own], before)
            parts = (frames, *after)
            whole = whole or [None if p is None else p.new_empty(len(latents), *p.shape[1:]) for p in parts]
            for all_rows, part in zip(whole, parts):
                if part is not None:
                    all_rows[own] = part
            del frames, after, parts, part  # else they are there while the next rows are decoded
        return whole[0], tuple(whole[1:])

    def _decode(self, latents: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        memory = _opened(state, self.vae.decoder)
        z = self.vae.post_quant_conv((latents * self.std + self.mean).to(self.vae.dtype))
        frames = []
        for i, frame in enumerate(z.split(1, 2)):
            is_first = state is None and i == 0
            frames.append(self.vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=is_first))
        closed = tuple(part if isinstance(part, Tensor) else None for part in memory)
        return torch.cat(frames, 2).float().clamp(-1, 1), closed

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder / "vae")


def _opened(state: CodecState, part: nn.Module) -> list[Tensor | str | None]:
    """The list that diffusers' encoder and decoder fill, one entry a causal convolution; entries are replaced, their
    tensors are not changed.
    """
    if state is None:
        return [None] * sum(isinstance(m, nn.Conv3d) for m in part.modules())
    # A temporal upsampling that has seen the first frame alone holds "Rep" where others hold a tensor.
    return ["Rep" if held is None else held for held in state]


def read_codec(path: str | Path, dtype: torch.dtype = torch.float32, decode_rows: int | None = None) -> WanCodec:
    """The autoencoder of a folder in diffusers format; WeightsError naming it when it is missing, damaged or not
    Wan2.1's.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"{path} holds no autoencoder (no config.json); give the vae/ folder of a Wan in diffusers format"
        )
    try:
        vae, info = AutoencoderKLWan.from_pretrained(
            path, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(f"cannot read the autoencoder {path}: {reason}; restore it or choose another") from error
    # diffusers fills what a file lacks with random numbers and goes on.
    if strange := sorted((*info["missing_keys"], *info["unexpected_keys"])):
        raise WeightsError(f"{path} is not whole: {strange[0]} is missing or unknown; restore it or choose another")
    if vae.config.patch_size is not None or vae.config.is_residual:
        raise WeightsError(f"{path} is the autoencoder of Wan2.2; choose one of Wan2.1")
    return WanCodec(vae, decode_rows).requires_grad_(False)
