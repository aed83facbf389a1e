"""The drag-controlled video policy: transformer, codec, control and schedule as one thing that can be saved and
loaded.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from policy.causal import CausalWan, join_context
from policy.codec import Codec, ConvCodec
from policy.control import Control, Drag, MovedWindowControl
from policy.files import WeightsError, check_fit, read_weights
from policy.lora import LoraSettings, WithoutAdapter, add_lora, load_lora, lora_state
from policy.text import NoText, TextEncoder
from policy.transition import check_schedule
from policy.wan import WanSettings, read_parts
from policy.wan_formats import read_wan
from policy.wan_image import WanImage

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
        if self.block < 1 or self.sink < 0 or self.drag_sigma <= 0 or self.drag_window <= 0:
            raise ValueError(f"block={self.block} must be 1 or more, sink={self.sink} not negative, "
                             f"drag_sigma={self.drag_sigma} and drag_window={self.drag_window} above 0")  # fmt: skip
        if self.frames < 2 or (self.frames - 1) % self.block:
            raise ValueError(f"frames={self.frames} must be one given frame and whole blocks of block={self.block}")
        if self.window is not None and self.window < self.sink + self.block:
            raise ValueError(f"window={self.window} must hold the sink={self.sink} and a block={self.block}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Latent frames per block; block 0 is the given first frame."""
        return (1, *[self.block] * ((self.frames - 1) // self.block))


Settings = PolicySettings | WanSettings
ALIGNMENT = 64  # bytes, as PyTorch's own allocations


@dataclass(frozen=True)
class PolicySource:
    """Where a policy is read from, in whatever process.

    path: a folder written by `DragPolicy.save`; with `wan` given, what `policy.wan.read_parts` takes. lora: adapters
    that are trained in place of the transformer's weights.
    """

    path: str
    wan: WanSettings | None = None
    lora: LoraSettings | None = None

    def settings(self) -> Settings:
        return self.wan or read_settings(self.path)


class DragPolicy:
    """What rolls out and what is trained. `net` holds the trained weights; codec, control and texts are fixed.

    control, texts: those of the tiny policy where they are not given. images: of a transformer that reads features of
    the first frame beside the text.
    """

    def __init__(
        self,
        settings: Settings,
        transformer: WanTransformer3DModel,
        codec: Codec,
        control: Control | None = None,
        texts: TextEncoder | None = None,
        images: WanImage | None = None,
    ) -> None:
        check_schedule(settings.sigmas)
        positions = transformer.config.rope_max_seq_len
        if sum(settings.sizes) > positions:
            raise ValueError(f"frames={settings.frames} make more latent frames than the transformer's {positions}")
        self.settings, self.codec, self.lora = settings, codec.eval().requires_grad_(False), None
        self.borrows = False  # its weights lie in memory that is not its own
        attention = settings.attention if isinstance(settings, WanSettings) else "dense"
        self.net = CausalWan(transformer, settings.window, settings.sink, settings.block, attention)
        self.control = control or MovedWindowControl(codec, settings.drag_window, settings.drag_sigma)
        self.texts, self.images = texts or NoText(transformer.config.text_dim), images

    def to(self, device: str | torch.device) -> DragPolicy:
        self.net.to(device)
        self.codec.to(device)
        for encoder in filter(None, (self.texts, self.images)):
            encoder.device = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.net.model.device

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.settings.sizes

    @property
    def sigmas(self) -> tuple[float, ...]:
        return self.settings.sigmas

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size, stride = self.settings.size, self.codec.spatial_stride
        height, width = size if isinstance(size, tuple) else (size, size)
        return self.codec.channels, height // stride, width // stride

    def video_frames(self, latents: slice) -> slice:
        """The video frames that the latent frames start..stop - 1 hold."""
        stride = self.codec.temporal_stride
        start, stop = (max(0, 1 + (n - 1) * stride) for n in (latents.start, latents.stop))
        return slice(start, stop)

    def text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, text_dim]."""
        return self.texts(texts).to(self.device)

    def context(self, texts: Sequence[str], drag: Drag) -> Tensor:
        """What the cross-attention reads: the text, and the first frame too where the transformer asks for it."""
        if self.images is None:
            return self.text(texts)
        return join_context(self.text(texts), self.images(drag.first_frame))

    def first_latent(self, drag: Drag) -> Tensor:
        if drag.background is not None:
            return drag.background[:, :, :1]
        return self.codec.encode(drag.first_frame[:, :, None])

    def add_lora(self, settings: LoraSettings) -> None:
        """From now on the trained weights are adapters."""
        self.net.requires_grad_(False)
        add_lora(self.net.model, settings)
        self.lora = settings

    def reference(self) -> nn.Module:
        """`net` as it is now, for good: a copy, or the same weights without their adapters."""
        if self.lora:
            return WithoutAdapter(self.net)
        net, model = self.net, copy.deepcopy(self.net.model)
        return CausalWan(model, net.window, net.sink, net.least, net.attention).requires_grad_(False)

    def weights(self) -> dict[str, nn.Parameter]:
        """The trained weights under diffusers' own names; with LoRA the adapters under PEFT's."""
        weights = self.net.model.state_dict(keep_vars=True)
        return lora_state(self.net.model, weights) if self.lora else weights

    def state_dict(self) -> dict[str, Tensor]:
        """The values of `weights`, which share their memory."""
        return {name: p.detach() for name, p in self.weights().items()}

    def gather(self) -> None:
        """Lays the trained weights side by side in one block of the CPU's memory, which is sent faster than many."""
        weights = self.weights().values()
        rooms = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in weights]
        for p, room in zip(weights, torch.zeros(sum(rooms), dtype=torch.uint8).split(rooms)):
            p.data = room[: p.nbytes].view(p.dtype).view(p.shape).copy_(p.data)

    def borrow(self, state: Mapping[str, Tensor], source: str) -> None:
        """Computes from now on with the given tensors themselves, in whatever memory they lie: they are not to change,
        and this policy is not to be trained."""
        own = self.weights()
        check_fit(own, state, source)
        for name, p in own.items():
            p.data = state[name]
        self.borrows = True

    def load_state_dict(self, state: Mapping[str, Tensor], source: str = "the given weights") -> None:
        own = self.weights()
        check_fit(own, state, source)
        if self.borrows:
            for p in own.values():
                p.data = p.data.clone()
            self.borrows = False
        if self.lora:
            load_lora(self.net.model, state)
        else:
            self.net.model.load_state_dict(state)

    def save(self, path: Path) -> None:
        """Writes transformer/ (diffusers format), the codec and policy.json. ValueError with LoRA: export merges it."""
        if self.lora:
            raise ValueError("a policy with adapters is not saved whole; jobs.export merges them")
        path.mkdir(parents=True, exist_ok=True)
        self.net.model.save_pretrained(path / "transformer")
        self.codec.save(path)
        kind = {"kind": "wan"} if isinstance(self.settings, WanSettings) else {}
        (path / "policy.json").write_text(json.dumps(kind | asdict(self.settings), indent=2) + "\n")


def load_policy(source: str | Path | PolicySource, weights: str | Path | None = None) -> DragPolicy:
    """A policy from a folder saved by `DragPolicy.save` or from a `PolicySource`, with its trained weights replaced by
    `weights` (a policy.safetensors) if given.

    Raises WeightsError when a file is missing, damaged, or of another shape.
    """
    source = source if isinstance(source, PolicySource) else PolicySource(str(source))
    path, settings = Path(source.path), source.settings()
    if isinstance(settings, WanSettings):
        policy = DragPolicy(settings, *read_parts(path, settings))
        if settings.gradient_checkpointing:
            policy.net.enable_gradient_checkpointing()
    else:
        policy = _read_tiny(path, settings)
    if source.lora:
        policy.add_lora(source.lora)
    if weights is not None:
        policy.load_state_dict(read_weights(weights), str(weights))
    return policy


def _read_tiny(path: Path, settings: PolicySettings) -> DragPolicy:
    codec = ConvCodec(settings.codec_channels, settings.codec_width)
    state = read_weights(path / "codec.safetensors")
    check_fit(codec.state_dict(), state, str(path / "codec.safetensors"))
    codec.load_state_dict(state)
    transformer = read_wan(path / "transformer")
    transformer.register_to_config(_name_or_path="")  # as from_pretrained does, whose files these are to the byte
    return DragPolicy(settings, transformer, codec)


def read_settings(path: str | Path) -> Settings:
    """What kind of policy a folder holds, without its weights; WeightsError when it holds none."""
    file = Path(path) / "policy.json"
    try:
        raw = json.loads(file.read_text())
        kind = WanSettings if raw.pop("kind", "tiny") == "wan" else PolicySettings
        return kind(**{**raw, "sigmas": tuple(raw["sigmas"])})
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
