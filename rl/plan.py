"""What a training needs, before it is started: bytes on each GPU and floating-point operations per iteration.

Pure formulas of shapes; docs/plan.md derives them, tests/test_resource_plan.py compares them with what is measured.
b is the number of bytes of a weight, d the width, L the tokens of a pass, S the tokens of a latent frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from policy.attention import packed_mask, visible_from
from rl.shards import GATHERED

GIB = 2**30
MOST = 4096  # members: larger groups are not looked for
BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time (its default)


@dataclass(frozen=True)
class Shape:
    """A policy without its weights.

    inputs, outputs: numbers per token that go in and come out (channels times the patch). tokens: S. sizes: latent
    frames per block, block 0 is given. steps: denoising steps. window / sink: as in `CausalWan`. weights: how many;
    trained: of them, or of their adapters; lora_inputs: numbers per token and layer that the adapters read. full: the
    blocks' own weights are trained. bytes: b. flex: masks as `flex_attention` takes them, else dense ones.
    """

    layers: int
    width: int
    ffn: int
    text_dim: int
    freq_dim: int
    inputs: int
    outputs: int
    tokens: int
    text_tokens: int
    sizes: tuple[int, ...]
    steps: int
    window: int | None
    sink: int
    weights: int
    trained: int
    full: bool
    lora_inputs: int
    bytes: int
    checkpointing: bool
    flex: bool

    @property
    def lora(self) -> bool:
        return self.lora_inputs > 0

    def past(self, block: int) -> int:
        """Latent frames before the block that it sees."""
        start = sum(self.sizes[:block])
        end = torch.tensor(start + self.sizes[block])
        return int(visible_from(torch.arange(start), end, self.window, self.sink).sum())


@dataclass(frozen=True)
class CodecCost:
    """weights, state (of one video's stream), peak (of decoding one block of one video, its new state and pictures
    included) and pictures: bytes. flops: of decoding one latent frame. rows: videos decoded together, None: all.
    """

    weights: float
    state: float
    peak: float
    flops: float
    pictures: float = 0.0
    rows: int | None = None

    def decode_bytes(self, videos: int) -> float:
        """Peak of decoding one block of so many videos."""
        if self.rows is None or videos <= self.rows:
            return videos * self.peak
        return videos * (self.state + self.pictures) + self.rows * self.peak


@dataclass(frozen=True)
class Work:
    """What the configuration asks for: see conf/rollout and conf/learner."""

    select: str
    tangent: bool
    group: int
    prompts: int
    prompts_per_task: int
    horizon: int
    micro_batch: int
    updates: int
    zero_stage: int

    @property
    def branching(self) -> bool:
        return self.select in ("trunk", "video")


@dataclass(frozen=True)
class Part:
    """Bytes on one GPU. key: the setting that changes them. phase: parts of different phases are not there together."""

    role: str
    name: str
    bytes: float
    key: str
    phase: str = ""


def total(parts: Sequence[Part]) -> float:
    """What stays, and the largest phase of each role."""
    phases: dict[tuple[str, str], float] = {}
    for part in parts:
        phases[part.role, part.phase] = phases.get((part.role, part.phase), 0.0) + part.bytes
    roles = {role for role, _ in phases}
    return sum(
        phases.get((role, ""), 0.0) + max((v for (r, phase), v in phases.items() if r == role and phase), default=0.0)
        for role in roles
    )


# Memory of the rollout


def kv_bytes(s: Shape, frames: int) -> float:
    """Keys and values of `frames` latent frames of one video."""
    return 2.0 * s.bytes * s.layers * s.width * s.tokens * frames


def block_pass_bytes(s: Shape, frames: int, past: int, after: int | None = None) -> float:
    """Peak of `CausalWan.block` on one row of `frames` latent frames, beside the cache of `past` frames that it reads.

    after: that of `append`, which makes a new cache of so many frames.
    """
    b, e = s.bytes, float(frames * s.tokens * s.width)
    one_layer = kv_bytes(s, past + frames) / s.layers
    transient = (2 * b + 8) * e + max(2 * b * e + one_layer, 2 * b * e * s.ffn / s.width)
    if after is None:
        return transient
    evicted = one_layer / 2 if after < past + frames else 0.0  # keys or values of a layer, before they are
    return 2 * b * e * s.layers + max(transient, kv_bytes(s, after) + evicted)


def rollout_parts(s: Shape, codec: CodecCost, work: Work) -> list[Part]:
    """One rollout worker; its rows are the prompts of a task, or their members where every member is a video."""
    last = len(s.sizes) - 1
    frames, before, past = max(s.sizes), s.past(last - 1), s.past(last)
    prompts = work.prompts_per_task
    members = prompts * work.group
    rows = prompts if work.branching else members
    probes = rows * 2 * frames if work.tangent else 0
    twigs = members if work.branching else 0
    forks = twigs if work.select == "video" or work.horizon else 0  # those that outlive their block and need a past
    step = (rows + max(probes, twigs)) * block_pass_bytes(s, frames, past)
    grown = kv_bytes(s, past - before)  # the last context pass starts from a cache smaller by this
    append = max(rows, forks) * (block_pass_bytes(s, frames, before, past) - grown)
    actions = 1 if work.select == "video" else last * (s.steps - 1 if work.select == "all" else 1)
    latents = 4.0 * frames * s.tokens * s.outputs  # bytes of a block
    kept = actions * (2 + (2 * frames if work.tangent else 1)) * latents  # per action: states, directions, coordinates
    key = "rollout.group_size"
    return [
        Part("rollout", "weights", s.bytes * s.weights, "policy"),
        Part("rollout", "codec", codec.weights, "policy"),
        Part("rollout", "KV cache", rows * kv_bytes(s, past), "rollout.prompts_per_task" if work.branching else key),
        Part("rollout", "KV cache of the forks", forks * kv_bytes(s, past), key),
        Part("rollout", "codec memory", (2 * rows + twigs) * codec.state, key),
        Part("rollout", "replays", rows * kept, key),
        Part("rollout", "denoising pass", max(step, append), key, "pass"),
        Part("rollout", "decoding", codec.decode_bytes(rows + twigs), key, "decode"),
    ]


# Memory of the learner


def packed_frames(s: Shape, select: str, block: int | None = None) -> tuple[int, list[int]]:
    """Clean frames and noisy blocks of the packed pass; block: the selected one of `video` (None: the last)."""
    generated = list(range(1, len(s.sizes)))
    if select == "video":
        generated = [block or generated[-1]]
    elif select == "all":
        generated = [b for b in generated for _ in range(s.steps - 1)]
    return sum(s.sizes[: max(generated)]), generated


def packed_length(s: Shape, select: str) -> int:
    """L of the longest packed pass."""
    known, blocks = packed_frames(s, select)
    return s.tokens * (known + sum(s.sizes[b] for b in blocks))


def saved_bytes(s: Shape, length: int, rows: int = 1) -> float:
    """What one pass of `CausalWan.packed` keeps for its backward, until that begins."""
    b, d = s.bytes, s.width
    n = float(rows * length)
    whole = 20 if s.full else 17  # fp32: norms, modulation, gates
    own, hidden = (10, 2) if s.full else (7, 1)
    layer = n * (4 * whole * d + b * (own * d + hidden * s.ffn)) + _bias(s, length)
    layer += n * s.lora_inputs * 4 if b == 2 else 0.0  # adapters in fp32 read a copy
    outside = n * ((10 * b + 8) * d + b * s.freq_dim + 2 * b * s.inputs) + _mask(s, length)
    if s.checkpointing:
        return outside + n * 6 * b * d + s.layers * n * b * d + layer
    return outside + s.layers * layer


def backward_bytes(s: Shape, length: int, rows: int = 1) -> float:
    """What the backward needs on top at its peak."""
    recomputed = s.bytes * s.ffn if s.checkpointing else 0
    return rows * length * ((8 + 4 * s.bytes) * s.width + recomputed)


def inference_bytes(s: Shape, length: int, rows: int = 1) -> float:
    """Peak of one pass of `packed` without gradients: the reference."""
    n, b = float(rows * length), s.bytes
    attention, feed = 8 * b * n * s.width + _bias(s, length), 2 * b * n * s.ffn
    return n * (24 + 9 * b) * s.width + 2 * b * n * s.inputs + max(attention, feed) + _mask(s, length)


def _mask(s: Shape, length: int) -> float:
    return 0.0 if s.flex else float(length) ** 2


def _bias(s: Shape, length: int) -> float:
    """The dense mask as scaled_dot_product_attention adds it, made anew by every layer."""
    return 0.0 if s.flex else s.bytes * float(length) ** 2


def learner_parts(s: Shape, work: Work, ranks: int) -> list[Part]:
    """One rank of `rl.learner.Learner` under DeepSpeed's ZeRO."""
    stage, b = work.zero_stage, s.bytes
    sharded = [ranks if stage >= least else 1 for least in (1, 2, 3)]
    grad = 4 if s.lora else b
    master = 4 if stage >= 1 or (b == 2 and not s.lora) else 0
    length, rows = packed_length(s, work.select), work.micro_batch
    passes = max(backward_bytes(s, length, rows), inference_bytes(s, length, rows))
    bucket = grad * (BUCKET if stage else min(s.trained, BUCKET))
    adapters = 4 * s.trained if s.lora else 0
    whole = b * s.weights + adapters
    stays = "" if stage == 3 else "passes"
    micro = "learner.micro_batch or gradient checkpointing"
    return [
        Part("learner", "weights", whole / sharded[2], "learner.zero_stage"),
        Part("learner", "gathered weights", min(whole, b * GATHERED) if stage == 3 else 0, "learner.zero_stage"),
        Part("learner", "reference", 0 if s.lora else b * s.weights, "policy"),
        Part("learner", "averaged weights", 4 * (s.trained if s.lora else s.weights) / sharded[2], "policy"),
        Part("learner", "optimizer", (8 + master) * s.trained / sharded[0], "learner.zero_stage"),
        Part("learner", "gradients", grad * s.trained / sharded[1], "learner.zero_stage"),
        Part("learner", "kept for the backward", saved_bytes(s, length, rows), micro, "passes"),
        Part("learner", "backward, or reference", passes, micro, "passes"),
        Part("learner", "gradient bucket", bucket, "learner.zero_stage", stays),
        Part("learner", "optimizer step", 12 * s.trained / sharded[0], "learner.zero_stage", "step"),
    ]


# Floating-point operations; a multiplication and an addition are two


def forward_flops(s: Shape, queries: int, pairs: int, times: int) -> tuple[float, float]:
    """Of one row, linear layers and attention. queries: tokens; pairs: of query and key tokens in the self-attention;
    times: how many times of noise are embedded (1 for a block, L for a packed pass).
    """
    d = s.width
    linear = s.layers * (queries * (12 * d * d + 4 * d * s.ffn) + s.text_tokens * 4 * d * d)
    linear += 2 * queries * d * (s.inputs + s.outputs)
    linear += 2 * s.text_tokens * (s.text_dim * d + d * d) + 2 * times * (s.freq_dim * d + 7 * d * d)
    return float(linear), 4.0 * s.layers * d * (pairs + queries * s.text_tokens)


def block_flops(s: Shape, block: int) -> float:
    """One pass of a block against its cache."""
    n = s.sizes[block] * s.tokens
    return sum(forward_flops(s, n, n * (s.past(block) * s.tokens + n), 1))


def rollout_flops(s: Shape, codec: CodecCost, work: Work) -> float:
    """Of one prompt: its passes, and the decoding of what the rewards see."""
    blocks = range(1, len(s.sizes))
    once = {b: block_flops(s, b) for b in range(len(s.sizes))}
    probes = {b: 2 * s.sizes[b] * once[b] if work.tangent else 0.0 for b in blocks}
    decode = {b: s.sizes[b] * codec.flops for b in blocks}
    whole = {b: (s.steps + 1) * once[b] + decode[b] for b in blocks}  # denoised, decoded and appended
    left = s.steps / 2  # mean number of steps after the selected one, which is never the last
    flops = once[0] + codec.flops
    if work.select == "trunk":
        for b in blocks:
            after = [c for c in blocks if b < c <= b + work.horizon]
            twig = left * once[b] + decode[b] + sum(whole[c] for c in after)
            flops += whole[b] + probes[b] + work.group * twig
        return flops
    if work.select == "video":
        for b in blocks:  # each is the selected one equally often
            trunk = sum(whole[c] for c in blocks if c < b) + s.steps * once[b] + probes[b]
            suffix = left * once[b] + decode[b] + sum(whole[c] for c in blocks if c > b)
            flops += (trunk + work.group * suffix) / len(blocks)
        return flops
    selected = s.steps - 1 if work.select == "all" else 1
    return flops + work.group * sum(whole[b] + selected * probes[b] for b in blocks)


def packed_flops(s: Shape, select: str, block: int | None = None) -> tuple[float, float]:
    """One packed pass of one replay: linear layers and attention. A dense mask is computed whole."""
    known, blocks = packed_frames(s, select, block)
    mask, _ = packed_mask(s.sizes, blocks, known, s.window, s.sink)
    length = s.tokens * len(mask)
    pairs = s.tokens**2 * (int(mask.sum()) if s.flex else mask.numel())
    return forward_flops(s, length, pairs, length)


def learner_flops(s: Shape, work: Work) -> float:
    """Of one prompt: policy, reference and backward; the latter costs two more operations per weight and a half more
    for the attention, which is computed again (FlashAttention-2, arXiv 2307.08691). Frozen weights need no gradient.
    """
    chosen = list(range(1, len(s.sizes))) if work.select == "video" else [None]
    replays = 1 if work.branching else work.group
    flops = 0.0
    for block in chosen:
        linear, attention = packed_flops(s, work.select, block)
        share = 0.0 if s.lora else s.trained / s.weights
        again = linear + attention if s.checkpointing else 0.0
        flops += 2 * (linear + attention) + (1 + share) * linear + 2.5 * attention + again
    return work.updates * replays * flops / len(chosen)


# The cluster


@dataclass(frozen=True)
class Gpu:
    """memory, reserve (rewards, CUDA itself, fragmentation): bytes. flops: that are sustained, per second."""

    memory: float
    reserve: float
    flops: float


@dataclass(frozen=True)
class Estimate:
    """gpus: in all; workers and ranks: those with something to do. memory: bytes on the fullest GPU. Seconds are those
    of an iteration. group: the largest that fits, 0 if none does.
    """

    gpus: int
    workers: int
    ranks: int
    parts: tuple[Part, ...]
    memory: float
    rollout_s: float
    learner_s: float
    group: int


def estimate(s: Shape, codec: CodecCost, work: Work, gpu: Gpu, gpus: int, learner_share: float | None) -> Estimate:
    """On every GPU a rollout worker and a learner rank, or with `learner_share` that share of them for the learner."""
    learners = max(1, round(learner_share * gpus)) if learner_share and gpus > 1 else gpus
    together = learners == gpus
    tasks = work.prompts // work.prompts_per_task
    workers = min(gpus if together else gpus - learners, tasks)
    ranks = max(r for r in range(1, learners + 1) if tasks % r == 0)

    def parts(work: Work) -> tuple[Part, ...]:
        return (*rollout_parts(s, codec, work), *learner_parts(s, work, ranks))

    def memory(work: Work) -> float:
        roles = [total([p for p in parts(work) if p.role == role]) for role in ("rollout", "learner")]
        return gpu.reserve + (sum(roles) if together else max(roles))

    group = 0
    if memory(replace(work, group=2)) <= gpu.memory:
        low, high = 2, MOST  # memory does not fall with the group
        while low < high:
            middle = (low + high + 1) // 2
            fits = memory(replace(work, group=middle)) <= gpu.memory
            low, high = (middle, high) if fits else (low, middle - 1)
        group = low
    waves = -(-tasks // workers)
    rollout_s = waves * work.prompts_per_task * rollout_flops(s, codec, work) / gpu.flops
    learner_s = work.prompts / ranks * learner_flops(s, work) / gpu.flops
    return Estimate(gpus, workers, ranks, parts(work), memory(work), rollout_s, learner_s, group)
