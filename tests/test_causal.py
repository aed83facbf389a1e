import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import difference, noise, tiny_policy
from torch.nn import functional as F

from policy.attention import (
    KVCache,
    causal_mask,
    compiled_attention,
    compiled_mask,
    dense_mask,
    packed_mask,
    token_mask,
    uses_flex,
)
from policy.causal import CausalWan, widen_input
from rl.meta import peak_bytes

LAYOUTS = [((1, 2, 2), None, 0), ((3, 3), None, 0), ((1, 2, 2, 2, 2), 4, 1), ((1, 2, 2, 2, 2), 6, 0), ((1,) * 5, 3, 1)]


def wan(window=None, sink=0, least=1, attention="dense"):
    return CausalWan(tiny_policy().net.model, window, sink, least, attention)


def stock(net):
    model = WanTransformer3DModel.from_config(net.model.config)
    model.load_state_dict(net.model.state_dict())
    return model


def inputs(net, sizes, batch=2):
    """Clean and noisy frames [B, C, F, 4, 4], a time per block [B, blocks], and text."""
    shape = batch, net.model.config.in_channels, sum(sizes), 4, 4
    times = 1000 * noise(batch, len(sizes), seed=2).sigmoid()
    return noise(*shape, seed=0), noise(*shape, seed=1), times, torch.zeros(batch, 1, 8)


def streamed(net, clean, noisy, t, text, sizes, seen=lambda cache: cache):
    """Velocities of the noisy blocks, each streamed after the clean ones before it; seen: what it gets of the cache."""
    cache, out = KVCache(), []
    for b, (x, y) in enumerate(zip(noisy.split(sizes, 2), clean.split(sizes, 2))):
        out.append(net.block(x, t[:, b], text, seen(cache)))
        cache = net.append(y, text, cache)
    return torch.cat(out, 2)


def per_frame(t, sizes):
    return t.repeat_interleave(torch.tensor(sizes), 1)


@pytest.mark.parametrize(("sizes", "window", "sink"), LAYOUTS)
@torch.no_grad()
def test_streamed_equals_block_causal_equals_packed(sizes, window, sink):
    net = wan(window, sink)
    clean, noisy, t, text = inputs(net, sizes)
    stream = streamed(net, clean, noisy, t, text, sizes)
    packed = net.packed(clean, noisy, per_frame(t, sizes), text, sizes, range(len(sizes)))
    assert difference(stream, packed) < 1e-5
    starts = [sum(sizes[:b]) for b in range(len(sizes) + 1)]
    for b, (start, end) in enumerate(pairwise(starts)):
        x = torch.cat((clean[:, :, :start], noisy[:, :, start:end]), 2)
        times = torch.cat((torch.zeros(len(t), start), t[:, b : b + 1].expand(-1, end - start)), 1)
        full = net.full(x, times, text, sizes[: b + 1])
        assert difference(stream[:, :, start:end], full[:, :, start:]) < 1e-5


LONG = (1, 2, 2, 2, 2)
BLOCKS = (4, 2, 4)


def passes(net):
    """The block-causal and the packed pass over 64 tokens a frame: L = 576 and 832, no multiples of flex's blocks."""
    channels, text = net.model.config.in_channels, torch.zeros(1, 1, 8)
    clean, noisy = noise(1, channels, 9, 16, 16), noise(1, channels, 6, 16, 16, seed=1)
    full = net.full(clean, torch.full((1, 9), 300.0), text, LONG)
    return full, net.packed(clean[:, :, :7], noisy, torch.full((1, 6), 700.0), text, LONG, BLOCKS)


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (4, 1), (5, 0)])
@torch.no_grad()
def test_flex_attention_computes_what_the_dense_mask_does(window, sink):
    net = wan(window, sink, attention="flex")
    other = 5 if window == 4 else 4
    for flex, dense, wrong in zip(passes(net), passes(wan(window, sink)), passes(wan(other, sink, attention="flex"))):
        assert difference(flex, dense) < 1e-5 < 1e-3 < difference(wrong, dense)
    passes(net)
    assert net._block_mask.cache_info()[:2] == (2, 2)  # hits and misses: a signature's mask is made once


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_attention_has_the_gradients_of_the_dense_mask(checkpointing, monkeypatch):
    # flex_attention has no kernel for the backward on a CPU and says so; its formula is there and is run here.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)

    def gradients(window, attention):
        net = wan(window, 1, attention=attention)
        if checkpointing:
            net.enable_gradient_checkpointing()
        sum(v.square().mean() for v in passes(net)).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    dense = gradients(4, "dense")
    assert difference(gradients(4, "flex"), dense) < 1e-5 * dense.abs().max()
    assert difference(gradients(5, "flex"), dense) > 1e-3 * dense.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@torch.no_grad()
def test_attention_and_mask_compile_to_the_same():
    """What runs on CUDA, compiled for the CPU: for one length, then for all."""
    g, graphs = torch.Generator().manual_seed(0), []
    for blocks in ((4,), (4, 4), (2, 3, 1)):
        frames, _ = packed_mask(LONG, blocks, 7, 4, 1)
        length = 24 * len(frames)
        q, k, v = torch.randn(3, 1, 2, length, 16, generator=g).unbind()
        mask = compiled_mask(token_mask(frames, 24), None, None, length, length, device="cpu")
        expected = F.scaled_dot_product_attention(q, k, v, dense_mask(frames, 24))
        assert difference(compiled_attention(q, k, v, block_mask=mask), expected) < 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2]


def test_auto_takes_flex_attention_where_it_is_compiled():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [uses_flex("auto", *of) for of in ((cpu, 128), (cuda, 128), (cuda, 12))] == [False, True, False]
    assert uses_flex("flex", cpu, 12) and not uses_flex("dense", cuda, 128)
    with pytest.raises(ValueError, match="attention=sparse is none of auto, flex, dense"):
        wan(attention="sparse")


@torch.no_grad()
def test_a_window_is_felt():
    sizes = (1, 2, 2, 2, 2)
    narrow, wide = wan(4, 1), wan()
    a, b = (streamed(net, *inputs(net, sizes), sizes) for net in (narrow, wide))
    assert difference(a[:, :, :3], b[:, :, :3]) < 1e-5
    assert difference(a[:, :, -2:], b[:, :, -2:]) > 1e-3


@torch.no_grad()
def test_packed_copies_of_one_block_at_several_levels_do_not_disturb_each_other():
    net, sizes, blocks = wan(), (1, 2, 2), (2, 1, 2, 2)
    clean, _, _, text = inputs(net, sizes)
    noisy, t = noise(2, net.model.config.in_channels, 8, 4, 4), torch.tensor([[900.0, 20, 500, 700]] * 2)
    together = net.packed(clean[:, :, :3], noisy, per_frame(t, (2, 2, 2, 2)), text, sizes, blocks)
    for j, block in enumerate(blocks):
        x = noisy[:, :, 2 * j : 2 * j + 2]
        alone = net.packed(clean[:, :, :3], x, t[:, j : j + 1].expand(-1, 2), text, sizes, [block])
        assert difference(together[:, :, 2 * j : 2 * j + 2], alone) < 1e-5


@pytest.mark.parametrize(
    "seen",
    [
        lambda cache: replace(cache, next_frame=cache.next_frame + 1),
        lambda cache: replace(cache, layers=tuple((0 * k, 0 * v) for k, v in cache.layers)),
        lambda cache: KVCache(next_frame=cache.next_frame),
    ],
    ids=["positions off by one frame", "history zeroed", "history forgotten"],
)
@torch.no_grad()
def test_a_wrong_history_shows(seen):
    net, sizes = wan(), (1, 2, 2)
    clean, noisy, t, text = inputs(net, sizes)
    packed = net.packed(clean, noisy, per_frame(t, sizes), text, sizes, range(3))
    assert difference(streamed(net, clean, noisy, t, text, sizes, seen)[:, :, 1:], packed[:, :, 1:]) > 1e-3


@torch.no_grad()
def test_block_causal_is_not_bidirectional():
    net, sizes = wan(), (1, 2, 2)
    _, x, t, text = inputs(net, sizes)
    times = per_frame(t, sizes)
    bidirectional = stock(net)(x, times.repeat_interleave(4, 1), text, return_dict=False)[0]
    causal = net.full(x, times, text, sizes)
    assert difference(causal, bidirectional) > 1e-3
    assert difference(net.full(x, times, text, (5,)), bidirectional) < 1e-5  # one block of all frames is bidirectional


@torch.no_grad()
def test_an_idle_processor_and_a_single_block_are_diffusers_own_model():
    net = wan()
    x, _, t, text = inputs(net, (3,))
    expected = stock(net)(x, t[:, 0], text, return_dict=False)[0]
    assert torch.equal(net.model(x, t[:, 0], text, return_dict=False)[0], expected)
    assert difference(net.block(x, t[:, 0], text, KVCache()), expected) < 1e-6
    with pytest.raises(RuntimeError):
        net.block(x[:, 1:], t[:, 0], text, KVCache())
    assert torch.equal(net.model(x, t[:, 0], text, return_dict=False)[0], expected)  # idle again after an error


def test_gradients_of_the_packed_pass_are_those_of_the_stream():
    net, sizes = wan(4, 1), (1, 2, 2, 2)
    clean, noisy, t, text = inputs(net, sizes)
    target = noise(2, net.model.config.out_channels, sum(sizes), 4, 4, seed=3)
    gradients = []
    for v in (streamed(net, clean, noisy, t, text, sizes),
              net.packed(clean, noisy, per_frame(t, sizes), text, sizes, range(4))):  # fmt: skip
        grads = torch.autograd.grad((v * target).sum(), list(net.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))
    assert difference(*gradients) < 1e-5 * gradients[0].norm()


@torch.no_grad()
def test_a_fork_runs_like_its_original_and_leaves_it_as_it_was():
    net, sizes = wan(), (1, 2, 2)
    clean, noisy, _, text = inputs(net, sizes)
    cache = net.append(clean[:, :, :1], text, KVCache())
    before = [k.clone() for k, _ in cache.layers]
    forked = cache.rows(torch.tensor([0, 0, 1, 1]))
    twigs = torch.cat((clean, noisy))[[0, 2, 1, 3], :, 1:3]
    after = net.append(twigs, torch.zeros(4, 1, 8), forked)
    assert all(torch.equal(k, old) for (k, _), old in zip(cache.layers, before))
    assert cache.frames == (0,) and after.frames == (0, 1, 2)
    alone = net.append(clean[1:, :, 1:3], text[1:], cache.rows(torch.tensor([1])))
    assert difference(after.layers[-1][1][2:3], alone.layers[-1][1]) < 1e-5


def cached(net, sizes):
    """The cache after each block."""
    cache = KVCache()
    for block in inputs(net, sizes)[0].split(sizes, 2):
        cache = net.append(block, torch.zeros(2, 1, 8), cache)
        yield cache


@pytest.mark.parametrize(("window", "sink"), [(4, 1), (5, 0), (3, 1), (2, 0)])
@torch.no_grad()
def test_the_cache_holds_what_the_next_block_may_see_and_no_more(window, sink):
    sizes = (1, 2, 2, 2, 2)
    mask = causal_mask(sizes, window, sink)
    for cache, _ in zip(cached(wan(window, sink, least=2), sizes), sizes[:-1]):
        seen = mask[cache.next_frame, : cache.next_frame]
        assert list(cache.frames) == seen.nonzero()[:, 0].tolist()
        assert cache.layers[0][0].shape[1] == 4 * len(cache.frames) <= 4 * (window - 2)


@torch.no_grad()
def test_a_block_reads_the_cache_as_it_is_once_the_window_is_full():
    sizes, x = (1, 2, 2, 2), noise(2, 18, 2, 4, 4)

    def pass_of(net, cache):
        return lambda: net.block(x, 500.0, torch.zeros(2, 1, 8), cache)

    *_, kept = cached(wan(4, 1, least=2), sizes)
    *_, longer = cached(wan(4, 1, least=1), sizes)
    assert kept.frames == (0, 6) and longer.frames == (0, 5, 6)
    reads_all = peak_bytes(pass_of(wan(), kept))
    assert peak_bytes(pass_of(wan(4, 1, least=2), kept)) == reads_all < peak_bytes(pass_of(wan(4, 1), longer))
    assert torch.equal(pass_of(wan(4, 1, least=2), kept)(), pass_of(wan(4, 1), longer)())
    with pytest.raises(ValueError, match="a block of 1 frames, but the cache was kept for 2 and more"):
        wan(4, 1, least=2).block(x[:, :, :1], 500.0, torch.zeros(2, 1, 8), kept)


def test_new_control_channels_change_nothing_until_they_are_trained():
    model = stock(wan())
    x = noise(1, model.config.in_channels, 3, 4, 4)
    with torch.no_grad():
        before = model(x, torch.tensor([300.0]), torch.zeros(1, 1, 8), return_dict=False)[0]
        wide = widen_input(model, 5)
        x = torch.cat((x, noise(1, 5, 3, 4, 4, seed=1)), 1)
        assert difference(wide(x, torch.tensor([300.0]), torch.zeros(1, 1, 8), return_dict=False)[0], before) < 1e-6
    assert wide.config.in_channels == x.shape[1]


@st.composite
def layouts(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    sink = draw(st.integers(0, 2))
    window = draw(st.none() | st.integers(sink + max(sizes), sink + 9))
    return sizes, window, sink


def may_see(sizes, window, sink, query_block, key):
    end = sum(sizes[: query_block + 1])
    return key < end and (window is None or key < sink or end - key <= window - sink)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layouts(), st.data())
def test_masks_follow_their_definition(layout, data):
    sizes, window, sink = layout
    block_of = [b for b, size in enumerate(sizes) for _ in range(size)]
    causal = causal_mask(sizes, window, sink)
    expected = [[may_see(*layout, b, key) for key in range(len(block_of))] for b in block_of]
    assert causal.tolist() == expected

    blocks = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=4))
    known = sum(sizes[: data.draw(st.integers(max(blocks), len(sizes)))])
    tokens = [(None, frame) for frame in range(known)]
    tokens += [(copy, f) for copy, b in enumerate(blocks) for f in range(len(block_of)) if block_of[f] == b]

    def sees(query, key):
        (copy, frame), (other, seen) = query, key
        if copy is None:
            return other is None and may_see(*layout, block_of[frame], seen)
        if other is not None:
            return other == copy
        return block_of[seen] < block_of[frame] and may_see(*layout, block_of[frame], seen)

    mask, ids = packed_mask(sizes, blocks, known, window, sink)
    assert ids.tolist() == [frame for _, frame in tokens]
    assert mask.tolist() == [[sees(q, k) for k in tokens] for q in tokens]
