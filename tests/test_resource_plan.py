"""The formulas of rl/plan.py against what is measured: torch's allocator, DeepSpeed's state, torch's FLOP counter."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

import pytest
import torch
from tiny import SETTINGS, plans, prompts, tiny_policy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from wan_cases import SETTINGS as WAN_SETTINGS
from wan_cases import tiny_vae

from policy.attention import KVCache, packed_mask
from policy.causal import CausalWan
from policy.codec import ConvCodec
from policy.lora import LoraSettings
from policy.transition import Kernel
from policy.wan import WAN_1_3B
from policy.wan_codec import WanCodec
from rl.meta import codec_cost, meta_parts, meta_transformer, peak_bytes, trained_weights
from rl.plan import (
    BUCKET,
    CodecCost,
    Shape,
    Work,
    backward_bytes,
    block_flops,
    block_pass_bytes,
    estimate,
    inference_bytes,
    kv_bytes,
    learner_flops,
    learner_parts,
    packed_flops,
    packed_length,
    rollout_flops,
    rollout_parts,
    saved_bytes,
    total,
)
from rollout.group import GroupSampler, RolloutSettings

WITHIN = pytest.approx
FREE = CodecCost(0, 0, 0, 0)
SMALL = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 18, "out_channels": 8, "text_dim": 8,
         "freq_dim": 64, "ffn_dim": 384, "num_layers": 4, "rope_max_seq_len": 128}  # fmt: skip
WORK = Work("trunk", True, 4, 2, 2, 0, 1, 1, 0)


def shape(config=SMALL, **changed) -> Shape:
    """config: of the transformer; changed: fields of the shape."""
    model = meta_transformer(config)
    count, width = sum(p.numel() for p in model.parameters()), model.config.num_attention_heads
    known = {
        "layers": model.config.num_layers, "width": width * model.config.attention_head_dim,
        "ffn": model.config.ffn_dim, "text_dim": model.config.text_dim, "freq_dim": model.config.freq_dim,
        "inputs": 4 * model.config.in_channels, "outputs": 4 * model.config.out_channels, "tokens": 64,
        "text_tokens": 4, "sizes": (1, 2, 2, 2), "steps": 3, "window": None, "sink": 0, "weights": count,
        "trained": count, "full": True, "lora_inputs": 0, "bytes": 4, "checkpointing": False, "flex": False,
    }  # fmt: skip
    return Shape(**{**known, **changed})


def network(config=SMALL, window=None, dtype=torch.float32, device=None, least=1) -> CausalWan:
    with torch.device(device or "cpu"):
        model = meta_transformer(config) if device else type(meta_transformer(config)).from_config(config)
    torch.nn.Module.to(model, dtype)
    return CausalWan(model, window, least=least)


def allocated(call) -> tuple[int, int]:
    """Bytes that torch's allocator hands out during the call: the peak, and what is left of them."""
    gc.collect()  # what earlier calls left behind would go in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = profiler.profiler.kineto_results.events()
    sizes = [bytes for _, bytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    sums = torch.tensor(sizes).cumsum(0)
    del kept
    return sums.max().item(), sums[-1].item()


def counted(call) -> float:
    """FLOPs with attention spelt out as products of matrices, which the counter knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def packed_call(net: CausalWan, s: Shape, side: int, backward: bool):
    """One packed pass over all blocks, its state installed until its backward is done."""
    device, dtype = net.model.device, net.model.dtype
    blocks, known = list(range(1, len(s.sizes))), sum(s.sizes[:-1])
    mask, ids = packed_mask(s.sizes, blocks, known, s.window, s.sink)
    channels = net.model.config.in_channels
    x = torch.zeros(1, channels, len(ids), side, side, dtype=dtype, device=device)
    text = torch.zeros(1, s.text_tokens, s.text_dim, dtype=dtype, device=device)
    rows, columns = net._grid(x)

    def call():
        wide = mask.repeat_interleave(s.tokens, 0).repeat_interleave(s.tokens, 1)[None, None].to(device)
        t = torch.zeros(1, len(ids) * s.tokens, device=device)
        with net._installed(net._rotary(ids, rows, columns), wide), ExitStack() as stack:
            if not backward:
                stack.enter_context(torch.no_grad())
            v = net.model(x, t, text, return_dict=False)[0]
            if backward:
                v.float().square().mean().backward()

    return call


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "ffn", "side"), [(4, 384, 12), (8, 256, 12)])
def test_a_packed_pass_takes_the_memory_that_is_planned(dtype, checkpointing, heads, ffn, side):
    config = {**SMALL, "num_attention_heads": heads, "ffn_dim": ffn}
    s = shape(config, bytes=dtype.itemsize, checkpointing=checkpointing, tokens=(side // 2) ** 2)
    net = network(config, dtype=dtype)
    if checkpointing:
        net.model.enable_gradient_checkpointing()
    call, length = packed_call(net, s, side, backward=True), packed_length(s, "trunk")
    call()  # from now on the gradients are there
    planned = saved_bytes(s, length) + backward_bytes(s, length)
    peak, _ = allocated(call)
    assert peak == WITHIN(planned, rel=0.15)
    without, _ = allocated(packed_call(net, s, side, backward=False))
    assert without == WITHIN(inference_bytes(s, length), rel=0.15)
    other = replace(s, checkpointing=not checkpointing)
    assert peak != WITHIN(saved_bytes(other, length) + backward_bytes(other, length), rel=0.15)


def test_frozen_blocks_and_adapters_keep_what_is_planned():
    length, side = packed_length(shape(), "trunk"), 16
    for dtype in (torch.float32, torch.bfloat16):
        frozen = network(dtype=dtype)
        frozen.model.blocks.requires_grad_(False)
        s = shape(full=False, bytes=dtype.itemsize)
        peak, _ = allocated(packed_call(frozen, s, side, backward=True))
        assert peak == WITHIN(saved_bytes(s, length) + backward_bytes(s, length), rel=0.15)
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"]
    adapted = network(dtype=torch.bfloat16)
    adapted.requires_grad_(False)
    adapted.model.add_adapter(LoraConfig(r=2, target_modules=targets))
    for p in adapted.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    trained, full, inputs = trained_weights(meta_transformer(SMALL), (), LoraSettings(2, 4.0, tuple(targets)))
    assert trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad) and not full
    s = shape(bytes=2, full=False, trained=trained, lora_inputs=inputs)
    peak, _ = allocated(packed_call(adapted, s, side, backward=True))
    assert peak == WITHIN(saved_bytes(s, length) + backward_bytes(s, length), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "window", "cached"), [(1, 7, 6), (2, None, 6), (2, 4, 2)])
def test_a_streamed_block_takes_the_memory_that_is_planned(dtype, frames, window, cached):
    rows, s = 4, shape(bytes=dtype.itemsize, window=window)
    net = network(window=window, dtype=dtype, least=frames).requires_grad_(False)
    k = torch.zeros(rows, cached * s.tokens, 4, 16, dtype=dtype)
    cache = KVCache(tuple((k.clone(), k.clone()) for _ in range(s.layers)), tuple(range(cached)), cached)
    bytes = sum(part.untyped_storage().nbytes() for layer in cache.layers for part in layer)
    assert bytes == rows * kv_bytes(s, cached)
    forked = cache.rows(torch.arange(rows).repeat_interleave(3))
    assert sum(part.untyped_storage().nbytes() for layer in forked.layers for part in layer) == 3 * bytes
    x, text = torch.zeros(rows, 18, frames, 16, 16, dtype=dtype), torch.zeros(rows, 4, 8, dtype=dtype)
    with torch.no_grad():
        block, _ = allocated(lambda: net.block(x, 500.0, text, cache))
        append, _ = allocated(lambda: net.append(x, text, cache))
        after = net.append(x, text, cache)
    assert block == WITHIN(rows * block_pass_bytes(s, frames, cached), rel=0.15)
    kept = len(after.frames)
    assert kept == (cached + frames if window is None else window - frames)
    assert append == WITHIN(rows * block_pass_bytes(s, frames, cached, kept), rel=0.15)
    seen = sum(part.untyped_storage().nbytes() for layer in after.layers for part in layer)
    assert seen == rows * kv_bytes(s, kept)


def rollout_of(select: str, config: dict, work: Work, selections: list) -> tuple:
    """A rollout of as many prompts as there are selections, and what is planned for it."""
    policy = tiny_policy()
    policy = type(policy)(SETTINGS, type(meta_transformer(config)).from_config(config), policy.codec)
    policy.net.requires_grad_(False)
    with torch.device("meta"):
        codec = ConvCodec(SETTINGS.codec_channels, SETTINGS.codec_width).eval()
    cost = codec_cost(codec, torch.zeros(1, codec.channels, 2, 4, 4, device="meta"))
    with torch.no_grad():  # at this size most of the peak is the convolutions' own scratch memory, which is not planned
        cost = replace(cost, peak=allocated(lambda: policy.codec.decode(torch.zeros(1, codec.channels, 2, 4, 4)))[0])
    sampler = GroupSampler(policy, RolloutSettings(select, work.group, "tangent", Kernel("cps", 0.5, 4.0)))
    asked = prompts(len(selections))
    drawn = [replace(p, selected=s) for p, s in zip(plans(asked, select), selections)]
    return lambda: sampler.rollout(asked, drawn, 0), shape(config, tokens=4, text_tokens=1, sizes=SETTINGS.sizes), cost


BLOCKS = range(1, len(SETTINGS.sizes))
SELECTIONS = {  # every choice once, so that their mean is the expected one
    "trunk": [tuple((b, k) for b in BLOCKS) for k in (0, 1)],
    "video": [((b, k),) for b in BLOCKS for k in (0, 1)],
    "frame": [tuple((b, k) for b in BLOCKS) for k in (0, 1)],
    "all": [tuple((b, k) for b in BLOCKS for k in (0, 1))],
}


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_rollout_takes_the_memory_that_is_planned_where_all_its_prompts_select_the_same(select):
    config = {**SMALL, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 8}  # more than pictures and kernels take
    work = replace(WORK, select=select, group=6, prompts_per_task=4)
    last = ((BLOCKS[-2], 0),) if select == "video" else SELECTIONS[select][0]
    call, s, cost = rollout_of(select, config, work, [last] * 4)
    parts = [p for p in rollout_parts(s, cost, work) if p.name not in ("weights", "codec")]
    assert allocated(call)[0] == WITHIN(total(parts), rel=0.15)


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_rollout_computes_what_is_planned(select):
    work = replace(WORK, select=select)
    call, s, _ = rollout_of(select, {**SMALL, "num_layers": 2}, work, SELECTIONS[select])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    measured = sum(flops for name, flops in counts.items() if "conv" not in name)  # of codec and pictures
    assert measured == WITHIN(len(SELECTIONS[select]) * rollout_flops(s, FREE, work), rel=0.15)


def test_the_flops_of_a_pass_are_those_that_torch_counts():
    """On the 1.3B shape, two of its layers, without memory."""
    config = {**WAN_1_3B, "num_layers": 2}
    s = shape(config, tokens=1560, text_tokens=512, window=7, sizes=(1,) * 10)
    net = network(config, window=7, device="meta")
    k = torch.zeros(1, 6 * 1560, 12, 128, device="meta")
    cache = KVCache(((k, k), (k, k)), tuple(range(6)), 6)
    x, text = torch.zeros(1, 36, 1, 60, 104, device="meta"), torch.zeros(1, 512, 4096, device="meta")
    with torch.no_grad():
        assert counted(lambda: net.block(x, 700.0, text, cache)) == block_flops(s, 9)
    assert block_flops(replace(s, window=None), 9) > 1.1 * block_flops(s, 9)
    small = replace(s, tokens=64, sizes=(1, 2, 2))
    call = packed_call(net, small, 16, backward=False)
    assert counted(call) == sum(packed_flops(small, "trunk"))
    linear, attention = packed_flops(small, "trunk")
    both = counted(packed_call(net, small, 16, backward=True))
    assert both == WITHIN(3 * linear + 3.5 * attention, rel=0.15)
    assert learner_flops(small, WORK) == WITHIN(both + linear + attention, rel=0.15)
    assert packed_flops(replace(small, flex=True), "trunk")[1] < attention


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_learner_holds_what_is_planned_after_a_step(stage, tmp_path, monkeypatch):
    from test_learner import settings

    from rl.learner import Learner

    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 puts its own there for good
    config = {**SMALL, "num_attention_heads": 8, "ffn_dim": 1024}
    tiny = tiny_policy()
    type(tiny)(SETTINGS, type(meta_transformer(config)).from_config(config), tiny.codec).save(tmp_path)
    s = shape(config)

    def update():
        learner = Learner(str(tmp_path), None, Kernel("cps", 0.5, 4.0), settings(zero_stage=stage), 1)
        learner.join(0, learner.address())
        for p in learner.policy.net.parameters():  # weights that are mapped from their file are not allocated
            p.data = p.data.clone()
        x, text = torch.zeros(1, 18, 2, 4, 4), torch.zeros(1, 1, 8)
        learner.engine.backward(learner.engine(x[:, :, :1], x, torch.zeros(1, 2), text, (1, 2), [1]).square().sum())
        learner.engine.step()
        return learner

    held = median(allocated(update)[1] for _ in range(3))  # the profiler loses an event now and then
    parts = {p.name: p.bytes for p in learner_parts(s, replace(WORK, zero_stage=stage), 1)}
    names = ["weights", "reference", "averaged weights", "optimizer"]
    assert parts["gradient bucket"] == 4 * (BUCKET if stage else s.trained)
    if stage == 3:  # what it gathers and reduces into stays
        names += ["gathered weights", "gradients"]
        held -= parts["gradient bucket"]
    assert held == WITHIN(sum(parts[name] for name in names), rel=0.15)
    alone, shared = (learner_parts(s, replace(WORK, zero_stage=3), ranks) for ranks in (1, 8))
    assert {b.name for a, b in zip(alone, shared) if b.bytes < a.bytes} == {
        "weights", "averaged weights", "optimizer", "gradients", "optimizer step"}  # fmt: skip


@pytest.mark.parametrize("frames", [1, 2])
def test_a_codec_on_the_meta_device_costs_what_the_real_one_does(frames):
    def cost(device, rows):
        with torch.device(device):
            codec = ConvCodec(8, 32).eval().requires_grad_(False)
        return codec, torch.zeros(rows, 8, frames, 8, 8, device=device)

    codec, latents = cost("cpu", 1)
    planned = codec_cost(*cost("meta", 1))
    with torch.no_grad():
        assert peak_bytes(lambda: codec.decode(latents)) == planned.peak
        assert counted(lambda: codec.decode(latents)) == frames * planned.flops
    assert planned.weights == 4 * sum(p.numel() for p in codec.parameters()) and planned.state == 0


def test_the_autoencoder_of_wan_remembers_a_part_of_every_video():
    _, codec = meta_parts(None, replace(WAN_SETTINGS, codec_dtype="bfloat16", decode_rows=1))
    cost = codec_cost(codec, torch.zeros(1, 16, 1, 60, 104, device="meta"))
    assert cost.weights == 2 * 126_892_531 and cost.rows == 1
    assert 1.5 < cost.state / 2**30 < 2 < cost.peak / 2**30 < 4 and 13 < cost.flops / 1e12 < 14


@pytest.mark.parametrize("rows", [None, 1, 2])
@torch.no_grad()
def test_decoding_in_parts_takes_the_memory_that_is_planned(rows):
    codec, latents = WanCodec(tiny_vae(), rows).requires_grad_(False), torch.zeros(6, 16, 1, 6, 8)
    cost = codec_cost(codec, latents[:1])
    _, state = codec.decode(latents)
    assert peak_bytes(lambda: codec.decode(latents, state)) == WITHIN(cost.decode_bytes(6), rel=0.15)
    assert (cost.decode_bytes(6) < 0.9 * 6 * cost.peak) == (rows is not None)


def test_the_largest_group_fits_and_one_more_does_not():
    from rl.plan import GIB, Gpu

    s = shape(WAN_1_3B, tokens=1560, text_tokens=512, sizes=(1,) * 21, window=7, bytes=2, checkpointing=True, flex=True)
    assert s.weights == 1_418_996_800 + 20 * 4 * 1536
    gpu, work = Gpu(139 * GIB, 6 * GIB, 3e14), replace(WORK, prompts=32, prompts_per_task=1, zero_stage=2)
    codec = CodecCost(0.25 * GIB, 1.76 * GIB, 3.5 * GIB, 1.3e13)
    for gpus, share in ((1, None), (8, None), (32, 0.25)):
        best = estimate(s, codec, work, gpu, gpus, share).group
        assert best > 8
        for group, fits in ((best, True), (best + 1, False)):
            assert (estimate(s, codec, replace(work, group=group), gpu, gpus, share).memory <= gpu.memory) == fits
    one, many = (estimate(s, codec, work, gpu, gpus, None) for gpus in (1, 32))
    assert one.rollout_s == WITHIN(32 * many.rollout_s) and one.learner_s == WITHIN(32 * many.learner_s)
    assert estimate(s, codec, work, Gpu(20 * GIB, 6 * GIB, 3e14), 1, None).group == 0
