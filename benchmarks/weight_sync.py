"""The learner's weights to a rollout worker on the same node, until they can be used, against a plain memory copy.

python -m benchmarks.weight_sync

Through Ray's object store, as the loop does it (`rl.pipeline.synchronise`: packed, sent, installed, both digests
compared); the adapters alone; and, beside it, a broadcast of torch.distributed between the same processes, in buckets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import figure, write
from benchmarks.whole_loop import timed
from policy.codec import ConvCodec
from policy.lora import LoraSettings
from policy.policy import DragPolicy, PolicySettings, build_transformer
from rl.fleet import Fleet, FleetSpec, closing, fetch, make_fleet
from rl.pipeline import Fleets, synchronise
from rl.ray_fleet import ray_session
from rl.weights import Weights, digest, install, pack

SHAPE = PolicySettings(size=64, frames=13, block=2, sigmas=(1.0, 0.8, 0.5, 0.0), window=None, sink=0,
                       drag_window=14.0, drag_sigma=8.0, codec_channels=16, codec_width=16)  # fmt: skip
LORA = LoraSettings(16, 16.0, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))

WAYS = {"object store": ("float32", False), "object store, bfloat16": ("bfloat16", False),
        "object store, adapters alone": ("float32", True)}  # fmt: skip

PAUSE_S, WARM = 1.2, 4  # Ray frees once a second what nobody holds: without a pause every sync is into fresh memory


class Holder:
    """Either end: a policy of `layers` layers of 64 x heads. What learner and rollout worker do with their weights."""

    def __init__(self, layers: int, heads: int, dtype: str, lora: bool) -> None:
        torch.set_num_threads(1)
        channels, width = SHAPE.codec_channels, 64 * heads
        transformer = build_transformer(channels, channels + 2, heads, 64, layers, 4 * width)
        self.policy = DragPolicy(SHAPE, transformer, ConvCodec(channels, SHAPE.codec_width))
        self.policy.net.to(getattr(torch, dtype)).requires_grad_(False)
        if lora:
            self.policy.add_lora(LORA)
        self.policy.gather()
        self.version = 0

    def cpu_seconds(self) -> float:
        """Of this process so far."""
        return time.process_time()

    def size(self) -> int:
        """Bytes."""
        return sum(p.nbytes for p in self.policy.state_dict().values())

    @torch.no_grad()
    def update(self) -> None:
        self.version += 1
        for p in self.policy.state_dict().values():
            p.add_(0.01)

    def weights(self, averaged: bool, version: int | None) -> Weights:
        return pack(self.policy.state_dict(), self.version, copy=False)

    def load_weights(self, weights: Weights) -> str:
        return install(self.policy, weights)

    def address(self) -> int:
        """Starts the store at which the broadcast's two ends meet."""
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def join(self, rank: int, port: int) -> None:
        store = self.store if rank == 0 else dist.TCPStore("127.0.0.1", port, is_master=False)
        self.group = dist.ProcessGroupGloo(store, rank, 2, timedelta(minutes=1))

    def broadcast(self, bucket_mb: int) -> str:
        """From rank 0, in flat buckets; returns the digest of what is then held."""
        state, buckets, size = self.policy.state_dict(), [[]], 0
        for p in state.values():
            if size and size + p.nbytes > bucket_mb * 2**20:
                buckets, size = [*buckets, []], 0
            buckets[-1].append(p)
            size += p.nbytes
        for bucket in buckets:
            flat = torch.cat([p.flatten() for p in bucket])
            self.group.broadcast(flat, 0).wait()
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.copy_(part.view_as(p))
        return digest({name: p.numpy() for name, p in state.items()})


def measure(layers: int, heads: int, repeats: int, ways: Sequence[str] = (*WAYS,)) -> list[dict[str, Any]]:
    """Medians; the copies are of as many bytes, taken in turn with what they are compared to. CPU time of a sync is
    that of both workers and of this process."""
    rows = []
    for name in ways:
        args = (layers, heads, *WAYS[name])
        ends = [make_fleet("ray", Holder, FleetSpec(end), args) for end in ("learner", "rollout")]
        with closing(*ends) as (learner, rollout):
            (size,) = fetch(learner.broadcast("size"))
            fleets = Fleets(rollout, None, learner)
            rows.append(_row(name, size, ends, lambda: synchronise(fleets), repeats))  # noqa: B023
            if name == "object store":
                (port,) = fetch(learner.broadcast("address"))
                joining = [fleet.submit_all("join", [(rank, port)]) for rank, fleet in enumerate(ends)]
                fetch([part for task in joining for part in task.result()])
                rows.append(_row("broadcast, gloo", size, ends, lambda: _broadcast(*ends), repeats))  # noqa: B023
    return rows


def _broadcast(*ends) -> None:
    held = fetch([part for task in [end.submit_all("broadcast", [(32,)]) for end in ends] for part in task.result()])
    if len(set(held)) != 1:
        raise ValueError(f"the two ends hold different weights: {held}")


def _row(name: str, size: int, ends: Sequence[Fleet], send: Callable[[], None], repeats: int) -> dict[str, Any]:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    total = lambda: time.process_time() + sum(fetch([end.broadcast("cpu_seconds")[0] for end in ends]))  # noqa: E731
    sent, copied = [], []
    for _ in range(repeats + WARM):
        fetch(ends[0].broadcast("update"))
        time.sleep(PAUSE_S)
        sent.append(timed(send, total))
        copied.append(timed(lambda: np.copyto(target, source), time.process_time))
    (cpu, wall), (copy_cpu, copy_wall) = (np.median(runs[WARM:], axis=0).tolist() for runs in (sent, copied))
    return {"way": name, "MB": size / 1e6, "sync_s": wall, "copy_s": copy_wall, "sync cpu_s": cpu,
            "copy cpu_s": copy_cpu, "GB/s": size / 1e9 / wall, "copy / sync": copy_wall / wall,
            "copy / sync, CPU": copy_cpu / cpu}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would lose against other work on the machine
    with ray_session("local", object_store_gb=2.0):
        rows = measure(5, 12, 9)
    about = (
        "From the learner's weights to a rollout worker on the same node that holds them, digests checked, against a "
        "plain copy of as many bytes in one process (numpy). Medians of 9, in turn."
    )
    share = figure("object store, share of a copy's bandwidth", rows[0]["copy / sync"], ">= 0.3")
    write("weight_sync", about, rows, [share])


if __name__ == "__main__":
    main()
