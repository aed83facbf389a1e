"""What a rollout leaves behind: clips for the rewards, replays for the learner."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from policy.explore import Subspace
from rollout.prompts import DragPrompt


@dataclass(frozen=True)
class GroupRollout:
    """The videos of one group. Frames that the members share are stored once.

    shared uint8 [T0, H, W, 3]: from the given first frame on; members uint8 [G, T1, H, W, 3]: each member's own
    frames, those that its noise could change. blocks: which of the T0+T1 frames are those of each block that has an own
    advantage. seed: of the group's exploration noise, for rewards that draw.
    """

    group_id: str
    prompt: DragPrompt
    shared: np.ndarray
    members: np.ndarray
    blocks: dict[int, range]
    seed: int
    version: int


@dataclass(frozen=True)
class Action:
    """A selected transition at one state, taken by the members that share this state. All tensors fp32.

    x [1, C, f, h, w]: the state x_s; coordinates [1, M, ...]: what the M members sampled in the subspace; logp [1,
    M]: the log-prob that the rollout computed. members: which members of the group `group_id` these are; block: whose
    advantage is theirs.
    """

    group_id: str
    members: tuple[int, ...]
    block: int
    step: int
    s: float
    s2: float
    x: Tensor
    subspace: Subspace
    coordinates: Tensor
    logp: Tensor


@dataclass(frozen=True)
class Replay:
    """All actions that were taken along one history, so that ONE packed pass re-evaluates them.

    history [1, C, K, h, w]: clean latents of the blocks before the last action; control [1, Cc, F, h, w]: of the
    whole video; text [1, L, D]: of `DragPolicy.context`. version: of the weights that took them.
    """

    history: Tensor
    control: Tensor
    text: Tensor
    actions: tuple[Action, ...]
    version: int

    @property
    def signature(self) -> tuple:
        """Replays of one signature can be batched: same frames, same blocks, same exploration coordinates."""
        return (self.history.shape, tuple((a.block, a.coordinates.shape[1:]) for a in self.actions))


@dataclass(frozen=True)
class Films:
    """Whole videos uint8 [P, T, H, W, 3] of P prompts, and the true ones where they are known (same shape, else
    None).
    """

    prompts: tuple[DragPrompt, ...]
    videos: np.ndarray
    truths: np.ndarray | None


def on_cpu(record: Any) -> Any:
    """The record with every tensor in it on the CPU, from where the object store takes it."""
    if isinstance(record, Tensor):
        return record.cpu()
    if isinstance(record, tuple):
        return tuple(on_cpu(part) for part in record)
    if is_dataclass(record):
        return replace(record, **{f.name: on_cpu(getattr(record, f.name)) for f in fields(record)})
    return record
