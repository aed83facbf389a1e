"""Re-evaluating the actions of a rollout: one packed pass over [clean history | state of every action]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.policy import DragPolicy
from policy.transition import Kernel, transition
from rollout.records import Action, Replay

Forward = Callable[..., Tensor]
"""`CausalWan.packed`, or something that wraps it (an engine that shards or accumulates)."""


@dataclass(frozen=True)
class ReplayBatch:
    """R replays of one signature. actions[j][r] is action j of replay r."""

    replays: tuple[Replay, ...]

    def __post_init__(self) -> None:
        if len({r.signature for r in self.replays}) != 1:
            raise ValueError("replays of different signatures cannot be batched")

    @property
    def actions(self) -> list[tuple[Action, ...]]:
        return list(zip(*(r.actions for r in self.replays)))

    def velocity(self, policy: DragPolicy, forward: Forward) -> list[Tensor]:
        """The network at every action's state, list over actions of [R, C, f, h, w], where the replays lie."""
        history = torch.cat([r.history for r in self.replays])
        control = torch.cat([r.control for r in self.replays])
        first = self.replays[0]
        blocks = [a.block for a in first.actions]
        starts = torch.tensor((0, *policy.sizes)).cumsum(0).tolist()
        at = [range(starts[b], starts[b + 1]) for b in blocks]
        clean = torch.cat((history, control[:, :, : history.shape[2]]), 1)
        states = torch.cat([torch.cat([a.x for a in actions]) for actions in self.actions], 2)
        noisy = torch.cat((states, control[:, :, [f for frames in at for f in frames]]), 1)
        t = torch.tensor(
            [[a.s * 1000 for a, frames in zip(r.actions, at) for _ in frames] for r in self.replays],
        )
        text = torch.cat([r.text for r in self.replays])
        v = forward(*(part.to(policy.device) for part in (clean, noisy, t, text)), policy.sizes, blocks)
        return list(v.float().to(history.device).split([len(frames) for frames in at], 2))

    def log_probs(self, kernel: Kernel, velocity: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs of what was sampled, list over actions of [R, M]; the members of an action share one velocity."""
        scored = []
        for actions, v in zip(self.actions, velocity):
            rows = [
                transition(kernel, a.subspace, a.x, v[r : r + 1], a.s, a.s2, coordinates=a.coordinates)[1]
                for r, a in enumerate(actions)
            ]
            scored.append(torch.cat(rows))
        return scored

    def rollout_log_probs(self) -> list[Tensor]:
        return [torch.cat([a.logp for a in actions]) for actions in self.actions]


def batches(replays: Sequence[Replay], size: int) -> list[list[int]]:
    """Indices of the replays, grouped by signature into batches of at most `size`, in order."""
    by_signature: dict[tuple, list[int]] = {}
    for i, replay in enumerate(replays):
        by_signature.setdefault(replay.signature, []).append(i)
    return [same[i : i + size] for same in by_signature.values() for i in range(0, len(same), size)]
