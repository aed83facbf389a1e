"""Make the tiny policy from nothing: the codec, the policy on true drags, then a short stage on drags that are ahead.

python -m jobs.pretrain out=outputs/base
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from jobs.cli import job
from jobs.config import settings_of
from policy.codec import ConvCodec, from_pixels
from policy.policy import DragPolicy, PolicySettings, build_transformer, load_policy
from policy.pretrain import FlowMatching, Report, fit_codec, fit_policy, psnr
from policy.transition import shifted_schedule
from rollout.seeds import seed_of
from rollout.sprites import SpriteWorld
from rollout.teaching import Teaching, example_batches, frame_batches


@dataclass
class CodecConfig:
    channels: int
    width: int
    steps: int
    lr: float
    jitter: float
    batch: int
    per_video: int


@dataclass
class TransformerConfig:
    heads: int
    head_dim: int
    layers: int
    ffn: int
    loud: float


@dataclass
class StageConfig:
    """What `policy.pretrain.FlowMatching` and `rollout.teaching.Teaching` say, for one stage."""

    steps: int
    lr: float
    muon_lr: float
    ema: float
    context_noise: float
    on_schedule: float
    batch: int
    pool: int
    fresh: int
    lag: float
    own_history: bool
    freeze: list[str]


@dataclass
class PretrainConfig:
    seed: int
    init: str | None
    out: str
    size: int
    frames: int
    block: int
    denoising_steps: int
    shift: float
    drag_window: float
    drag_sigma: float
    codec: CodecConfig
    transformer: TransformerConfig
    stages: dict[str, StageConfig]


@job("pretrain", PretrainConfig)
def main(config: PretrainConfig) -> None:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    record = (out / "pretrain.jsonl").open("w")
    world = SpriteWorld(config.size, config.frames)
    policy = load_policy(config.init) if config.init else make_policy(config, make_codec(config, world, record))
    for name, s in config.stages.items():
        batches = example_batches(policy, world, settings_of(Teaching, s), seed_of(config.seed, name))
        report, seed = reporter(record, name), seed_of(config.seed, name, "noise")
        fit_policy(policy, batches, settings_of(FlowMatching, s), report, seed)
        policy.save(out / name)
    policy.save(out)
    print(f"wrote {out}; measure it with: python -m jobs.evaluate policy.path={out}")


def make_policy(config: PretrainConfig, codec: ConvCodec) -> DragPolicy:
    settings = PolicySettings(
        size=config.size,
        frames=config.frames,
        block=config.block,
        sigmas=shifted_schedule(config.denoising_steps, config.shift),
        window=None,
        sink=0,
        drag_window=config.drag_window,
        drag_sigma=config.drag_sigma,
        codec_channels=config.codec.channels,
        codec_width=config.codec.width,
    )
    torch.manual_seed(seed_of(config.seed, "policy"))
    t, channels = config.transformer, config.codec.channels
    transformer = build_transformer(channels, channels + 2, t.heads, t.head_dim, t.layers, t.ffn)
    with torch.no_grad():
        # A loud constant channel: without one, layer norms hide how large a token is from all that comes after them.
        transformer.patch_embedding.bias[0] = t.loud
    return DragPolicy(settings, transformer, codec)


def make_codec(config: PretrainConfig, world: SpriteWorld, record: TextIO) -> ConvCodec:
    c, report = config.codec, reporter(record, "codec")
    torch.manual_seed(seed_of(config.seed, "codec"))
    codec = ConvCodec(c.channels, c.width)
    frames = frame_batches(world, c.batch, c.per_video, config.seed)
    fit_codec(codec, frames, c.steps, c.lr, c.jitter, report, seed_of(config.seed, "jitter"))
    truths = [world.truth(world.prompt("heldout", i)) for i in range(64)]
    video = torch.stack([from_pixels(torch.from_numpy(truth)) for truth in truths])
    with torch.no_grad():
        decoded, _ = codec.decode(codec.encode(video))
    report(c.steps, {"heldout_psnr": psnr(decoded, video)})
    return codec


def reporter(record: TextIO, stage: str) -> Report:
    """Prints a line and keeps it in pretrain.jsonl."""

    def report(step: int, values: dict[str, float]) -> None:
        line = {
            "stage": stage,
            "step": step,
            **{k: round(v, 5) for k, v in values.items()},
            "time": round(time.time(), 1),
        }
        print(" ".join(f"{k} {v}" for k, v in line.items() if k != "time"), flush=True)
        record.write(json.dumps(line) + "\n")
        record.flush()

    return report


if __name__ == "__main__":
    main()
