"""The drag-controlled video policy: transformer, codec, control and schedule as one thing that can be saved and
loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.causal import CausalWan
from policy.codec import ConvCodec
from policy.control import Drag, MovedWindowControl
from policy.files import WeightsError, check_fit, read_weights
from policy.transition import check_schedule
from policy.wan_formats import read_wan

from diffusers import WanTransformer3DModel  # isort: skip  (after policy.causal has readied torchvision)


@dataclass(frozen=True)
class PolicySettings:
    """size: side of the picture, px. block: latent frames generated together. frames: video frames T, the given first
    one included.

    sigmas: noise levels from 1 to 0. window / sink: latent frames a block sees (None: all). drag_window, drag_sigma:
    half side of the moved window and width of the heat map, px.
    """

    size: int
    frames: int
    block: int
    sigmas: tuple[float, ...]
    window: int | None
    sink: int
    drag_window: float
    drag_sigma: float
    codec_channels: int
    codec_width: int

    def __post_init__(self) -> None:
        if self.frames < 2 or (self.frames - 1) % self.block:
            raise ValueError(f"frames={self.frames} must be one given frame and whole blocks of block={self.block}")
        if self.window is not None and self.window < self.sink + self.block:
            raise ValueError(f"window={self.window} must hold the sink={self.sink} and a block={self.block}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Latent frames per block; block 0 is the given first frame."""
        return (1, *[self.block] * ((self.frames - 1) // self.block))


class DragPolicy:
    """What rolls out and what is trained. `net` holds the trained weights; codec and control are fixed."""

    def __init__(self, settings: PolicySettings, transformer: WanTransformer3DModel, codec: ConvCodec) -> None:
        check_schedule(settings.sigmas)
        self.settings, self.codec = settings, codec.eval().requires_grad_(False)
        self.net = CausalWan(transformer, settings.window, settings.sink)
        self.control = MovedWindowControl(codec, settings.drag_window, settings.drag_sigma)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.settings.sizes

    @property
    def sigmas(self) -> tuple[float, ...]:
        return self.settings.sigmas

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.settings.size // self.codec.spatial_stride
        return self.codec.channels, side, side

    def text(self, batch: int) -> Tensor:
        """The tiny policy has no text encoder: zero embeddings [B, 1, text_dim] that the stock cross-attention
        reads.
        """
        return torch.zeros(batch, 1, self.net.model.config.text_dim, device=self.net.model.device)

    def first_latent(self, drag: Drag) -> Tensor:
        return self.codec.encode(drag.first_frame[:, :, None])

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights under diffusers' own names."""
        return self.net.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], source: str = "the given weights") -> None:
        check_fit(self.net.model.state_dict(), state, source)
        self.net.model.load_state_dict(state)

    def save(self, path: Path) -> None:
        """Writes transformer/ (diffusers format), codec.safetensors and policy.json."""
        path.mkdir(parents=True, exist_ok=True)
        self.net.model.save_pretrained(path / "transformer")
        save_file(self.codec.state_dict(), path / "codec.safetensors")
        (path / "policy.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")


def load_policy(path: str | Path, weights: str | Path | None = None) -> DragPolicy:
    """A policy saved by `DragPolicy.save`, with its trained weights replaced by `weights` (a policy.safetensors) if
    given.

    Raises WeightsError when a file is missing, damaged, or of another shape.
    """
    path, settings = Path(path), read_settings(path)
    codec = ConvCodec(settings.codec_channels, settings.codec_width)
    state = read_weights(path / "codec.safetensors")
    check_fit(codec.state_dict(), state, str(path / "codec.safetensors"))
    codec.load_state_dict(state)
    transformer = read_wan(path / "transformer")
    transformer.register_to_config(_name_or_path="")  # as from_pretrained does, whose files these are to the byte
    policy = DragPolicy(settings, transformer, codec)
    if weights is not None:
        policy.load_state_dict(read_weights(weights), str(weights))
    return policy


def read_settings(path: str | Path) -> PolicySettings:
    """What kind of policy a folder holds, without its weights; WeightsError when it holds none."""
    file = Path(path) / "policy.json"
    try:
        raw = json.loads(file.read_text())
        return PolicySettings(**{**raw, "sigmas": tuple(raw["sigmas"])})
    except FileNotFoundError:
        raise WeightsError(f"{path} is no policy folder (no policy.json); give one written by jobs.pretrain") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} is damaged: {error}; restore it or choose another policy.path") from error


def build_transformer(
    channels: int,
    control_channels: int,
    heads: int,
    head_dim: int,
    layers: int,
    ffn: int,
    patch: Sequence[int] = (1, 2, 2),
) -> WanTransformer3DModel:
    """A fresh transformer of the tiny size; control channels come after the noise channels."""
    return WanTransformer3DModel(
        patch_size=tuple(patch),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels + control_channels,
        out_channels=channels,
        text_dim=8,
        freq_dim=64,
        ffn_dim=ffn,
        num_layers=layers,
        rope_max_seq_len=128,
    )
