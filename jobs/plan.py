"""What a training would need, before anything is started: memory per GPU, seconds per iteration, the largest group.

python -m jobs.plan policy=wan_1_3b rollout.group_size=16 gpus=[8,32]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from jobs.cli import ConfigError, job, require
from jobs.config import ClusterConfig, LearnerConfig, PolicyConfig, RolloutConfig, settings_of
from jobs.rules import learner_rules, rollout_rules
from policy.attention import uses_flex
from policy.lora import LoraSettings
from policy.policy import read_settings
from policy.wan import DTYPES, WanSettings
from rl.meta import codec_cost, meta_parts, trained_weights
from rl.plan import GIB, MOST, CodecCost, Estimate, Gpu, Shape, Work, estimate, total


@dataclass
class PlannedPolicy(PolicyConfig):
    """path: null = a Wan2.1 of 1.3B that is not there yet."""

    path: str | None


@dataclass
class GpuConfig:
    """reserve_gib: what the rewards, CUDA itself and fragmentation take."""

    memory_gib: float
    tflops: float
    efficiency: float
    reserve_gib: float


@dataclass
class PlanConfig:
    policy: PlannedPolicy
    rollout: RolloutConfig
    learner: LearnerConfig
    cluster: ClusterConfig
    gpus: list[int]
    gpu: GpuConfig
    learner_share: float | None


@job("plan", PlanConfig)
def main(config: PlanConfig) -> None:
    """Prints one column per number of GPUs; exit status 1 and one line where one of them does not fit."""
    check(config)
    work, g = work_of(config), config.gpu
    shape, codec = shape_of(config)
    gpu = Gpu(g.memory_gib * GIB, g.reserve_gib * GIB, g.tflops * 1e12 * g.efficiency)
    estimates = [estimate(shape, codec, work, gpu, n, config.learner_share) for n in config.gpus]
    Console(width=max(100, Console().width)).print(table(shape, work, g, estimates))
    for e in estimates:
        if e.memory > gpu.memory:
            raise ConfigError(refusal(e, work, g))


def check(c: PlanConfig) -> None:
    rules = [
        (c.gpus and min(c.gpus) >= 1, f"gpus={c.gpus} must be numbers of GPUs, like [1,8,32]"),
        (c.cluster.backend == "ray" or c.gpus == [1], f"cluster.backend={c.cluster.backend} is one process: gpus=[1]"),
        (0 < c.gpu.efficiency <= 1, f"gpu.efficiency={c.gpu.efficiency} must lie in (0, 1]"),
        (c.gpu.memory_gib > 0 and c.gpu.tflops > 0, "gpu.memory_gib and gpu.tflops must be above 0"),
        (c.learner_share is None or 0 < c.learner_share < 1, f"learner_share={c.learner_share} must lie in (0, 1)"),
        (c.policy.path or c.policy.wan, "policy.path is null and policy.wan too; give the policy's folder"),
        *rollout_rules(c.rollout),
        *learner_rules(c.learner),
    ]
    require(rules)


def work_of(c: PlanConfig) -> Work:
    r, l = c.rollout, c.learner
    return Work(
        select=r.select,
        tangent=r.explore == "tangent",
        group=r.group_size,
        prompts=r.prompts_per_iteration,
        prompts_per_task=r.prompts_per_task,
        horizon=r.horizon,
        micro_batch=l.micro_batch,
        updates=l.updates_per_rollout,
        zero_stage=l.zero_stage,
    )


def shape_of(c: PlanConfig) -> tuple[Shape, CodecCost]:
    """Of the policy that `jobs.train` would load; of its files the weights are not read."""
    s = settings_of(WanSettings, c.policy.wan) if c.policy.wan else read_settings(c.policy.path)
    lora = settings_of(LoraSettings, c.policy.lora) if c.policy.lora.rank else None
    wan = s if isinstance(s, WanSettings) else None
    model, codec = meta_parts(c.policy.path, s)
    dtype = torch.bfloat16 if c.learner.bf16 else DTYPES[wan.dtype] if wan else torch.float32
    count = sum(p.numel() for p in model.parameters())
    trained, full, lora_inputs = trained_weights(model, c.learner.freeze, lora)
    height, width = s.size if isinstance(s.size, tuple) else (s.size, s.size)
    latent = height // codec.spatial_stride, width // codec.spatial_stride
    t = model.config
    patch = math.prod(t.patch_size)
    shape = Shape(
        layers=t.num_layers,
        width=t.num_attention_heads * t.attention_head_dim,
        ffn=t.ffn_dim,
        text_dim=t.text_dim,
        freq_dim=t.freq_dim,
        inputs=t.in_channels * patch,
        outputs=t.out_channels * patch,
        tokens=math.prod(latent) // patch,
        text_tokens=wan.text_length if wan else 1,
        sizes=s.sizes,
        steps=len(s.sigmas) - 1,
        window=s.window,
        sink=s.sink,
        weights=count,
        trained=trained,
        full=full,
        lora_inputs=lora_inputs,
        bytes=dtype.itemsize,
        checkpointing=wan is not None and wan.gradient_checkpointing,
        flex=wan is not None and uses_flex(wan.attention, torch.device("cuda"), t.attention_head_dim),
    )
    return shape, codec_cost(codec, torch.empty(1, codec.channels, s.block, *latent, device="meta"))


def table(s: Shape, work: Work, gpu: GpuConfig, estimates: list[Estimate]) -> Table:
    counts = f"{s.weights / 1e6:,.1f} M weights, {s.trained / 1e6:,.1f} M trained, {s.tokens} tokens per latent frame"
    assumed = f"{gpu.memory_gib:g} GiB and {gpu.efficiency:.0%} of {gpu.tflops:g} TFLOP/s on each GPU"
    out = Table(
        title=f"GiB per GPU; {counts}; groups of {work.group} ({work.select})",
        caption=f"{assumed}. Rows with a star are not all there at the same time.",
    )
    for name in ("role", "what", *(f"{e.gpus} GPU{'s' * (e.gpus > 1)}" for e in estimates)):
        out.add_column(name, justify="left" if name in ("role", "what") else "right")
    for role in ("rollout", "learner"):
        columns = [[p for p in e.parts if p.role == role] for e in estimates]
        for row in zip(*columns):
            out.add_row(role, row[0].name + " *" * bool(row[0].phase), *(f"{p.bytes / GIB:.2f}" for p in row))
        out.add_row(role, "[bold]in all", *(f"[bold]{total(parts) / GIB:.2f}" for parts in columns), end_section=True)
    out.add_row("GPU", f"[bold]with {gpu.reserve_gib:g} reserved", *(f"[bold]{e.memory / GIB:.2f}" for e in estimates))
    groups = ("none" if not e.group else f"{e.group}{'+' * (e.group == MOST)}" for e in estimates)
    out.add_row("", "largest group that fits", *groups, end_section=True)
    out.add_row("time", "rollout workers, learner ranks", *(f"{e.workers}, {e.ranks}" for e in estimates))
    out.add_row("", "rollout, s", *(f"{e.rollout_s:.3g}" for e in estimates))
    out.add_row("", "learner, s", *(f"{e.learner_s:.3g}" for e in estimates))
    out.add_row("", "[bold]iteration, s", *(f"[bold]{e.rollout_s + e.learner_s:.3g}" for e in estimates))
    return out


def refusal(e: Estimate, work: Work, gpu: GpuConfig) -> str:
    need = f"{e.memory / GIB:.1f} GiB on each of {e.gpus} GPU{'s' * (e.gpus > 1)}, of gpu.memory_gib={gpu.memory_gib:g}"
    if e.group:
        return f"rollout.group_size={work.group} needs {need}; the largest group that fits is {e.group}"
    part = max(e.parts, key=lambda part: part.bytes)
    return f"no group fits: {need}; the most is the {part.role}'s {part.name}, which {part.key} changes"


if __name__ == "__main__":
    main()
