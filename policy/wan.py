"""A policy on Wan2.1: which parts it is made of, and where they are read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from policy.attention import ATTENTIONS
from policy.causal import TEXT_TOKENS
from policy.control import Control
from policy.files import WeightsError
from policy.text import TextEncoder
from policy.transition import check_schedule
from policy.wan_codec import WanCodec, read_codec
from policy.wan_control import BACKGROUNDS, FEATURES, WanControl
from policy.wan_formats import read_wan
from policy.wan_image import WanImage
from policy.wan_text import WanText

from diffusers import WanTransformer3DModel  # isort: skip  (after policy.wan_codec has readied torchvision)

WAN_1_3B = {
    "num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096,
    "freq_dim": 256, "in_channels": 36, "out_channels": 16,
}  # fmt: skip
"""config.json of Wan2.1 T2V 1.3B with the control channels: noise 16, heat maps 4, features of the first frame 16."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STRIDE, TEMPORAL_STRIDE, PATCH = 8, 4, 2


@dataclass(frozen=True)
class WanSettings:
    """height, width: of the picture, px. frames: video frames T, the given first one included. block: latent frames
    generated together; a latent frame after the first holds 4 video frames.

    sigmas: noise levels from 1 to 0. window / sink: latent frames a block sees, itself included (None: all), and first
    frames always seen. features, background, drag_sigma, drag_window: of `WanControl`. base: the folder in diffusers
    layout whose vae/, text_encoder/, tokenizer/ and image_encoder/ are used (None: the policy's own). text_cache:
    folder of text embeddings; text_length: tokens. dtype: of the transformer and the encoders of text and image,
    codec_dtype: of the autoencoder. decode_rows: videos that it encodes or decodes at a time (None: all).
    attention: of the learner's pass, see `CausalWan`. gradient_checkpointing: keep one activation per block and compute
    the rest again. Raises ValueError naming the key.
    """

    height: int
    width: int
    frames: int
    block: int
    sigmas: tuple[float, ...]
    window: int | None
    sink: int
    features: str
    background: str
    drag_sigma: float
    drag_window: float
    base: str | None
    text_cache: str
    text_length: int
    dtype: str
    codec_dtype: str
    decode_rows: int | None
    attention: str
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        check_schedule(self.sigmas)
        side, step = STRIDE * PATCH, TEMPORAL_STRIDE * max(1, self.block)
        rules = [
            (self.block >= 1, f"block={self.block} must be 1 or more"),
            (self.sink >= 0, f"sink={self.sink} must not be negative"),
            (self.drag_sigma > 0, f"drag_sigma={self.drag_sigma} (px) must be above 0"),
            (self.drag_window > 0, f"drag_window={self.drag_window} (px) must be above 0"),
            (self.text_length >= 1, f"text_length={self.text_length} must be 1 or more"),
            (self.height % side == 0, f"height={self.height} must be a multiple of {side}"),
            (self.width % side == 0, f"width={self.width} must be a multiple of {side}"),
            (
                self.frames > 1 and (self.frames - 1) % step == 0,
                f"frames={self.frames} must be one given frame and whole blocks of {step} (block={self.block})",
            ),
            (
                self.window is None or self.window >= self.sink + self.block,
                f"window={self.window} must hold the sink={self.sink} and a block={self.block}",
            ),
            (self.features in FEATURES, f"features={self.features} is none of {', '.join(FEATURES)}"),
            (self.background in BACKGROUNDS, f"background={self.background} is none of {', '.join(BACKGROUNDS)}"),
            (self.dtype in DTYPES, f"dtype={self.dtype} is none of {', '.join(DTYPES)}"),
            (self.codec_dtype in DTYPES, f"codec_dtype={self.codec_dtype} is none of {', '.join(DTYPES)}"),
            (self.decode_rows is None or self.decode_rows >= 1, f"decode_rows={self.decode_rows} must be 1 or more"),
            (self.attention in ATTENTIONS, f"attention={self.attention} is none of {', '.join(ATTENTIONS)}"),
        ]
        for holds, message in rules:
            if not holds:
                raise ValueError(f"policy.wan.{message}")

    @property
    def size(self) -> int | tuple[int, int]:
        """Side of a square picture, else (height, width), px."""
        return self.height if self.height == self.width else (self.height, self.width)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Latent frames per block; block 0 is the given first frame."""
        return (1, *[self.block] * ((self.frames - 1) // (TEMPORAL_STRIDE * self.block)))


Parts = tuple[WanTransformer3DModel, WanCodec, Control, TextEncoder, WanImage | None]


def read_parts(path: Path, s: WanSettings) -> Parts:
    """The parts of a Wan, as `DragPolicy` takes them.

    path: a folder in diffusers layout, or weights in any format of `policy.wan_formats`. A T2V transformer is given
    the control channels, zero-initialised; an I2V one of 36 channels is taken as it is. Raises WeightsError naming
    what is missing, damaged, or does not go together.
    """
    base, vae = Path(s.base or path), vae_folder(path, s)
    codec = read_codec(vae, DTYPES[s.codec_dtype], s.decode_rows)
    control = make_control(codec, s)
    transformer = read_wan(path, DTYPES[s.dtype], codec.channels + control.channels)
    config = transformer.config
    if config.out_channels != codec.channels:
        raise WeightsError(f"{path} makes {config.out_channels} channels, but {vae} reads {codec.channels}")
    if config.pos_embed_seq_len is not None:
        raise WeightsError(f"{path} reads a last frame too; choose a Wan that goes on from the first")
    if config.image_dim is not None and s.text_length != TEXT_TOKENS:
        raise WeightsError(f"{path} reads an image too; give policy.wan.text_length={TEXT_TOKENS}")
    images = None if config.image_dim is None else WanImage(base, DTYPES[s.dtype])
    return transformer, codec, control, read_texts(path, s, config.text_dim), images


def vae_folder(path: Path, s: WanSettings) -> Path:
    """Where the autoencoder is; WeightsError where there is none."""
    base = Path(s.base or path)
    vae = path / "vae" if (path / "vae").is_dir() else base / "vae"
    if not vae.is_dir():
        raise WeightsError(f"{base} holds no vae/; give policy.wan.base, a folder of Wan2.1 in diffusers layout")
    return vae


def make_control(codec: WanCodec, s: WanSettings) -> WanControl:
    return WanControl(codec, s.features, s.background, s.drag_sigma, s.drag_window)


def read_texts(path: str | Path, s: WanSettings, dim: int | None = None, device: str = "cpu") -> WanText:
    """The text embeddings of a Wan. dim: what its transformer reads, where that is to be checked."""
    return WanText(s.text_cache, s.text_length, dim, s.base or path, DTYPES[s.dtype], device)
