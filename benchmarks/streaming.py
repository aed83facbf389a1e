"""How fast a policy of Wan's shape streams and trains. Random weights: the shape sets the speed.

python -m benchmarks.streaming
python -m benchmarks.streaming tiny

The first takes a GPU: the 1.3B shape at 480x832, 3 steps, one latent frame per block. The second is the same code in
seconds, anywhere. Prints a table; that of the first goes to benchmarks/results/streaming.{json,md}.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import table, write
from policy.policy import DragPolicy
from policy.text import NoText
from policy.transition import Kernel
from policy.wan import DTYPES, WAN_1_3B, WanSettings, make_control
from policy.wan_codec import WanCodec
from rollout.group import GroupSampler, RolloutSettings
from rollout.plan import NoisePlan
from rollout.prompts import DragPrompt
from rollout.replay import ReplayBatch
from rollout.sampler import Sampler

from diffusers import AutoencoderKLWan, WanTransformer3DModel  # isort: skip  (after policy has readied torchvision)

WAN = WanSettings(
    height=480, width=832, frames=81, block=1, sigmas=(1.0, 0.755, 0.522, 0.0), window=7, sink=1, features="splat",
    background="zeros", drag_sigma=20.0, drag_window=48.0, base=None, text_cache="", text_length=512,
    dtype="bfloat16", codec_dtype="bfloat16", decode_rows=1, attention="auto",
    gradient_checkpointing=True,
)  # fmt: skip
SHAPES: dict[str, tuple[WanSettings, dict[str, Any], dict[str, Any]]] = {
    "1.3b": (WAN, WAN_1_3B, {}),
    "tiny": (
        replace(WAN, height=32, width=48, frames=21, window=3, text_length=8, dtype="float32", codec_dtype="float32"),
        {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "in_channels": 36,
         "text_dim": 8, "freq_dim": 16},
        {"base_dim": 4, "num_res_blocks": 1},
    ),
}  # fmt: skip


def random_policy(shape: str, device: str) -> DragPolicy:
    """A policy of that shape with random weights, made where it will run."""
    settings, transformer, vae = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**transformer).to(DTYPES[settings.dtype])
        codec = WanCodec(AutoencoderKLWan(**vae).to(DTYPES[settings.codec_dtype]), settings.decode_rows)
    policy = DragPolicy(settings, model, codec, make_control(codec, settings), NoText(model.config.text_dim)).to(device)
    policy.net.enable_gradient_checkpointing()
    return policy


def random_prompt(settings: WanSettings, index: int) -> DragPrompt:
    rng = np.random.default_rng(index)
    picture = rng.integers(0, 256, (settings.height, settings.width, 3), np.uint8)
    start, end = rng.uniform(0.2, 0.8, (2, 2)) * (settings.width, settings.height)
    way = np.linspace(start, end, settings.frames, dtype=np.float32)[:, None]
    return DragPrompt(picture, "", way, np.ones(way.shape[:2], bool), f"random/{index}")


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def stream(policy: DragPolicy, device: str, index: int) -> list[float]:
    """Seconds from the prompt to the pixels of the first generated block, then from block to block."""
    sampler, prompt = Sampler(policy), random_prompt(policy.settings, index)
    plan, took, last = [NoisePlan((0, "generate", prompt.id), ())], [], now(device)
    state, _ = sampler.begin([prompt])
    while state.block < len(sampler.frames):
        block = sampler.finish(state, sampler.initial(plan, state.block), plan)
        _, state = sampler.decode(state, block)
        took.append(now(device) - last)
        last = now(device)
        state = sampler.append(state, block)  # in the time of the next block, which waits for it
    return took


def train_step(
    policy: DragPolicy, reference: torch.nn.Module, device: str, members: int, index: int
) -> dict[str, float]:
    """Seconds of the rollout of one prompt with `trunk`, of the learner's passes over it (policy, reference, backward),
    and of both: an iteration but for rewards and optimizer.
    """
    settings = RolloutSettings("trunk", members, "tangent", Kernel("cps", 0.5, 4.0))
    prompt, begin = random_prompt(policy.settings, index), now(device)
    sampler = GroupSampler(policy, settings)
    _, replays = sampler.rollout([prompt], [sampler.plan(0, index, prompt.id)], 0)
    rolled = now(device)
    batch = ReplayBatch(tuple(replays))
    sum(logp.mean() for logp in batch.log_probs(settings.kernel, batch.velocity(policy, policy.net))).backward()
    with torch.no_grad():
        batch.velocity(policy, reference)
    policy.net.zero_grad()
    learnt = now(device)
    return {"rollout_s": rolled - begin, "learn_s": learnt - rolled, "iteration_s": learnt - begin}


def measure(shape: str, videos: int = 5, members: int = 8) -> list[dict[str, Any]]:
    """Percentiles of what was timed, and how many frames a second that is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = random_policy(shape, device)
    stream(policy, device, 0)  # kernels are chosen and memory is taken in the first one
    runs = [stream(policy, device, i) for i in range(1, videos + 1)]
    blocks = np.array([took for run in runs for took in run[1:]])
    reference = policy.reference()
    train_step(policy, reference, device, members, 0)
    steps = [train_step(policy, reference, device, members, i) for i in range(1, 4)]
    frames = policy.codec.temporal_stride * policy.settings.block
    found = {"first_frame_s": np.array([run[0] for run in runs]), "block_s": blocks}
    found |= {name: np.array([step[name] for step in steps]) for name in steps[0]}
    found["pixel frames per s"] = frames / blocks
    return [{"shape": shape, "what": name, "p50": float(np.median(values)), "p95": float(np.percentile(values, 95))}
            for name, values in found.items()]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    shape = sys.argv[1] if len(sys.argv) > 1 else "1.3b"
    if shape not in SHAPES or (shape == "1.3b" and not torch.cuda.is_available()):
        raise SystemExit(f"{shape}: the 1.3b shape takes a GPU, tiny runs anywhere")
    rows = measure(shape)
    if shape == "1.3b":
        about = "Random weights; the rollout of one prompt and the learner's passes over it with `trunk`, groups of 8."
        write("streaming", about, rows, machine=torch.cuda.get_device_name())
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
