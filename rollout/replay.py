"""Re-evaluating the actions of a rollout: one packed pass over [clean history | state of every action]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from policy.explore import Subspace
from policy.policy import DragPolicy
from policy.transition import Kernel, transition
from rollout.records import Action, Replay

Forward = Callable[..., Tensor]
"""`CausalWan.packed`, or something that wraps it (an engine that shards or accumulates)."""


@dataclass(frozen=True)
class ReplayBatch:
    """R replays of one signature. What is said of their actions has A rows, replay by replay; all generated blocks hold
    as many frames.
    """

    replays: tuple[Replay, ...]

    def __post_init__(self) -> None:
        if len({r.signature for r in self.replays}) != 1:
            raise ValueError("replays of different signatures cannot be batched")

    @property
    def actions(self) -> list[Action]:
        return [a for r in self.replays for a in r.actions]

    def velocity(self, policy: DragPolicy, forward: Forward) -> Tensor:
        """The network at every action's state, [A, C, f, h, w], where the replays lie."""
        history = torch.cat([r.history for r in self.replays])
        control = torch.cat([r.control for r in self.replays])
        blocks = [a.block for a in self.replays[0].actions]
        starts = torch.tensor((0, *policy.sizes)).cumsum(0).tolist()
        at = [range(starts[b], starts[b + 1]) for b in blocks]
        clean = torch.cat((history, control[:, :, : history.shape[2]]), 1)
        states = torch.cat([torch.cat([a.x for a in r.actions], 2) for r in self.replays])
        noisy = torch.cat((states, control[:, :, [f for frames in at for f in frames]]), 1)
        t = torch.tensor(
            [[a.s * 1000 for a, frames in zip(r.actions, at) for _ in frames] for r in self.replays],
        )
        text = torch.cat([r.text for r in self.replays])
        v = forward(*(part.to(policy.device) for part in (clean, noisy, t, text)), policy.sizes, blocks)
        return v.float().to(history.device).unflatten(2, (len(blocks), -1)).transpose(1, 2).flatten(0, 1)

    def log_probs(self, kernel: Kernel, velocity: Tensor) -> Tensor:
        """Log-probs of what was sampled, [A, M]; the members of an action share one velocity."""

        def score(rows, s, s2, subspace, x, coordinates) -> Tensor:
            return transition(kernel, subspace, x, velocity[rows], s, s2, coordinates=coordinates)[1]

        return self._by_step(score)

    def drift(self, kernel: Kernel, velocity: Tensor, old: Tensor) -> Tensor:
        """How far the mean has moved since `old`: |mu - mu_old|^2 / (2 std^2), mean over the coordinates, [A, 1]."""

        def moved(rows, s, s2, subspace, x, _) -> Tensor:
            (mean, std), (old_mean, _) = (kernel.inside(x, v[rows], s, s2) for v in (velocity, old))
            return subspace.mean_square(subspace.project(mean - old_mean).unsqueeze(1)) / (2 * std**2)

        return self._by_step(moved)

    def rollout_log_probs(self) -> Tensor:
        return torch.cat([a.logp for a in self.actions])

    def _by_step(self, function: Callable[..., Tensor]) -> Tensor:
        """function(rows, s, s', subspace, x, coordinates) of all actions of a step at once, rows in their own order."""
        actions, steps = self.actions, {}
        for i, action in enumerate(actions):
            steps.setdefault((action.s, action.s2), []).append(i)
        parts = []
        for (s, s2), rows in steps.items():
            taken = [actions[i] for i in rows]
            x, coordinates = torch.cat([a.x for a in taken]), torch.cat([a.coordinates for a in taken])
            parts.append(function(rows, s, s2, stack([a.subspace for a in taken]), x, coordinates))
        return torch.cat(parts)[torch.tensor([i for rows in steps.values() for i in rows]).argsort()]


def stack(subspaces: Sequence[Subspace]) -> Subspace:
    """Subspaces of one kind as one with all their rows."""
    first = subspaces[0]
    tensors = {f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)}
    return replace(first, **{name: torch.cat([getattr(s, name) for s in subspaces]) for name in tensors})


def batches(replays: Sequence[Replay], size: int) -> list[list[int]]:
    """Indices of the replays, grouped by signature into batches of at most `size`, in order."""
    by_signature: dict[tuple, list[int]] = {}
    for i, replay in enumerate(replays):
        by_signature.setdefault(replay.signature, []).append(i)
    return [same[i : i + size] for same in by_signature.values() for i in range(0, len(same), size)]


def in_parts(batches: Sequence[list[int]], count: int) -> list[list[int]]:
    """The same in `count` batches: the largest are halved until there are as many. ValueError where they hold fewer."""
    parts = list(batches)
    while len(parts) < count:
        i = max(range(len(parts)), key=lambda i: len(parts[i]))
        if len(parts[i]) == 1:
            raise ValueError(f"{len(parts)} replays cannot be learnt from in {count} passes")
        middle = len(parts[i]) // 2
        parts[i : i + 1] = parts[i][:middle], parts[i][middle:]
    return parts
