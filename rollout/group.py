"""Grouped Self-Rollout with selective stochasticity.

`trunk` and `video`: one deterministic trajectory per prompt; groups of G fork off it after a selected step, so all that
lies before is computed once and the members of a group share one state. `frame` and `all`: G full videos, each with its
own states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from policy.explore import Basis, Subspace, cells_near, tangent_basis
from policy.policy import DragPolicy
from policy.transition import Kernel, place, transition
from rollout.plan import NoisePlan
from rollout.prompts import DragPrompt
from rollout.records import Action, GroupRollout, Replay
from rollout.sampler import Sampler, Stream
from rollout.seeds import seed_of

EXPLORES = ("tangent", "coarse", "white")


@dataclass(frozen=True)
class RolloutSettings:
    """select: trunk|video|frame|all. explore: tangent|coarse|white.

    cell, radius: of `coarse` (latent pixels; px, 0 = everywhere). horizon: blocks that a twig of `trunk` finishes
    beyond its own. antithetic: members come in pairs (z, -z). renoise: unselected steps draw fresh noise that the
    group shares.
    """

    select: str
    group_size: int
    explore: str
    kernel: Kernel
    horizon: int = 0
    cell: int = 4
    radius: float = 0.0
    antithetic: bool = False
    renoise: bool = False

    def __post_init__(self) -> None:
        if self.explore not in EXPLORES:
            raise ValueError(f"rollout.explore={self.explore!r} is none of {', '.join(EXPLORES)}")
        if self.antithetic and self.group_size % 2:
            raise ValueError(f"rollout.antithetic needs an even rollout.group_size, not {self.group_size}")

    @property
    def branching(self) -> bool:
        return self.select in ("trunk", "video")


class GroupSampler:
    """Rolls out a batch of prompts under their plans."""

    def __init__(self, policy: DragPolicy, settings: RolloutSettings) -> None:
        self.policy, self.settings = policy, settings
        self.sampler = Sampler(policy, settings.renoise)
        self.blocks = len(self.sampler.frames)

    @torch.no_grad()
    def rollout(
        self, prompts: Sequence[DragPrompt], plans: Sequence[NoisePlan], version: int
    ) -> tuple[list[GroupRollout], list[Replay]]:
        """Groups for the rewards and replays for the learner; version: of the weights, recorded in the groups."""
        roll = self._branches if self.settings.branching else self._full_videos
        return roll(prompts, plans, version)

    def _branches(self, prompts, plans, version) -> tuple[list[GroupRollout], list[Replay]]:
        sampler = self.sampler
        stream, first = sampler.begin(prompts)
        latents, pixels = [first], np.stack([p.first_frame for p in prompts])[:, None]
        groups: list[GroupRollout] = []
        actions: list[list[Action]] = [[] for _ in prompts]
        last = max(block for plan in plans for block, _ in plan.selected)
        for block in range(1, last + 1):
            x = sampler.initial(plans, block)
            for k, (s, _) in enumerate(sampler.levels):
                v = sampler.velocity(stream, x, s)
                rows = [i for i, plan in enumerate(plans) if k in plan.steps(block)]
                if rows:
                    at = torch.tensor(rows, device=x.device)
                    forked = self._fork(stream.rows(at), x[at], v[at], k, [plans[i] for i in rows])
                    for i, (frames, action) in zip(rows, forked):
                        actions[i].append(action)
                        starts = {block: pixels.shape[1]}
                        groups.append(_group(action.group_id, prompts[i], pixels[i], frames, starts, version))
                x = sampler.advance(x, v, k, plans, block)
            if block < last:
                latents.append(x)
                frames, stream = sampler.decode(stream, x)
                pixels = np.concatenate((pixels, frames), 1)
                stream = sampler.append(stream, x)
        return groups, _replays(torch.cat(latents, 2), stream, actions)

    def _fork(self, stream: Stream, x: Tensor, v: Tensor, step: int, plans) -> list[tuple]:
        """Per row of the shared states x [P, C, f, h, w]: its G twigs' frames [G, t, H, W, 3] and the action."""
        sampler, members = self.sampler, self.settings.group_size
        explored = self._explore(stream, x, v, step, plans, [range(members)] * len(plans))
        wide_plans = [plan for plan in plans for _ in range(members)]
        twig = stream.rows(torch.arange(len(plans), device=x.device).repeat_interleave(members))
        end = (
            self.blocks
            if self.settings.select == "video"
            else min(stream.block + 1 + self.settings.horizon, self.blocks)
        )
        z = sampler.finish(twig, explored.states.flatten(0, 1), step + 1, wide_plans)
        pixels, twig = sampler.decode(twig, z)
        while twig.block + 1 < end:
            twig = sampler.append(twig, z)
            z = sampler.finish(twig, sampler.initial(wide_plans, twig.block), 0, wide_plans)
            frames, twig = sampler.decode(twig, z)
            pixels = np.concatenate((pixels, frames), 1)
        actions = explored.actions(x, self._group_ids(plans, stream.block), [range(members)] * len(plans))
        return list(zip(pixels.reshape(len(plans), members, *pixels.shape[1:]), actions))

    def _full_videos(self, prompts, plans, version) -> tuple[list[GroupRollout], list[Replay]]:
        sampler, members = self.sampler, self.settings.group_size
        wide_plans = [plan for plan in plans for _ in range(members)]
        own = [range(g, g + 1) for _ in plans for g in range(members)]
        stream, first = sampler.begin(prompts)
        wide = torch.arange(len(plans), device=first.device).repeat_interleave(members)
        stream, latents, pixels = stream.rows(wide), [first[wide]], []
        actions: list[list[Action]] = [[] for _ in wide_plans]
        for block in range(1, self.blocks):
            x = sampler.initial(wide_plans, block)
            for k, (s, _) in enumerate(sampler.levels):
                v = sampler.velocity(stream, x, s)
                moved = sampler.advance(x, v, k, wide_plans, block)
                rows = [i for i, plan in enumerate(wide_plans) if k in plan.steps(block)]
                if rows:
                    at = torch.tensor(rows, device=x.device)
                    chosen, members_of = [wide_plans[i] for i in rows], [own[i] for i in rows]
                    explored = self._explore(stream.rows(at), x[at], v[at], k, chosen, members_of)
                    moved[at] = explored.states[:, 0]
                    for i, action in zip(rows, explored.actions(x[at], self._group_ids(chosen, None), members_of)):
                        actions[i].append(action)
                x = moved
            frames, stream = sampler.decode(stream, x)
            pixels.append(frames)
            if block + 1 < self.blocks:
                latents.append(x)
                stream = sampler.append(stream, x)
        videos = np.concatenate(pixels, 1)
        videos = videos.reshape(len(plans), members, *videos.shape[1:])
        starts = {block: sampler.video(block).start for block in range(1, self.blocks)}
        groups = [
            _group(name, prompt, prompt.first_frame[None], videos[i], starts, version)
            for i, (name, prompt) in enumerate(zip(self._group_ids(plans, None), prompts))
        ]
        return groups, _replays(torch.cat(latents, 2), stream, actions)

    def _explore(self, stream: Stream, x: Tensor, v: Tensor, step: int, plans, members: Sequence[range]) -> Explored:
        """Samples the selected transition of each row for its members."""
        (s, s2), kernel = self.sampler.levels[step], self.settings.kernel
        subspace = self._subspace(stream, x, v, s)
        pair = 2 if self.settings.antithetic else 1
        noise = subspace.noise(
            [[plan.exploration(stream.block, step, g // pair) for g in own] for plan, own in zip(plans, members)]
        )
        if self.settings.antithetic:
            sign = torch.tensor([[1.0 - 2 * (g % 2) for g in own] for own in members], device=x.device)
            noise = noise * sign.view(*sign.shape, *[1] * (noise.ndim - 2))
        coordinates, logp = transition(kernel, subspace, x, v, s, s2, noise=noise)
        states = place(kernel, subspace, x, v, s, s2, coordinates)
        return Explored(stream.block, step, s, s2, subspace, coordinates, logp, states)

    def _subspace(self, stream: Stream, x: Tensor, v: Tensor, s: float) -> Subspace:
        if self.settings.explore == "tangent":
            return self._tangent(stream, x, v, s)
        # The last video frame of each latent frame: its drag is what the latent frame ends with.
        stop, stride = self.sampler.video(stream.block).stop, self.policy.codec.temporal_stride
        frames = slice(stop - 1 - stride * (self.policy.sizes[stream.block] - 1), stop, stride)
        channels, h, w = self.policy.latent_shape
        cell, radius = (self.settings.cell, self.settings.radius) if self.settings.explore == "coarse" else (1, 0.0)
        return cells_near(
            stream.drag.tracks[:, frames],
            stream.drag.visible[:, frames],
            (h, w),
            self.policy.codec.spatial_stride,
            cell,
            channels,
            radius,
        )

    def _tangent(self, stream: Stream, x: Tensor, v: Tensor, s: float) -> Basis:
        """One pass of 2 f rows per state: the prediction with the drag moved by a pixel, per axis and latent frame."""
        frames, video = self.sampler.frames[stream.block], self.sampler.video(stream.block)
        controls = []
        for axis in (0, 1):
            tracks = stream.drag.tracks.clone()
            tracks[:, video, :, axis] += 1.0
            moved = self.policy.control.encode(replace(stream.drag, tracks=tracks), frames)
            for f in range(frames.stop - frames.start):
                control = stream.control[:, :, frames].clone()
                control[:, :, f] = moved[:, :, f]
                controls.append(control)
        control = torch.stack(controls, 1)
        wide = torch.arange(len(x), device=x.device).repeat_interleave(control.shape[1])
        shifted = self.sampler.velocity(stream.rows(wide), x[wide], s, control.flatten(0, 1))
        return tangent_basis(v, shifted.unflatten(0, control.shape[:2]))

    def _group_ids(self, plans: Sequence[NoisePlan], block: int | None) -> list[str]:
        suffix = "" if block is None else f"/block{block}"
        return ["/".join(str(part) for part in plan.key) + suffix for plan in plans]


@dataclass(frozen=True)
class Explored:
    """A sampled transition of P rows: coordinates [P, M, ...], logp [P, M], states after it [P, M, C, f, h, w]."""

    block: int
    step: int
    s: float
    s2: float
    subspace: Subspace
    coordinates: Tensor
    logp: Tensor
    states: Tensor

    def actions(self, x: Tensor, group_ids: Sequence[str], members: Sequence[range]) -> list[Action]:
        """One action per row; x [P, C, f, h, w] is the state before."""
        rows = [torch.tensor([i], device=x.device) for i in range(len(x))]
        return [
            Action(
                name,
                tuple(own),
                self.block,
                self.step,
                self.s,
                self.s2,
                x[i],
                self.subspace.rows(i),
                self.coordinates[i],
                self.logp[i],
            )
            for name, own, i in zip(group_ids, members, rows)
        ]


def _replays(history: Tensor, stream: Stream, actions: Sequence[Sequence[Action]]) -> list[Replay]:
    rows = [slice(i, i + 1) for i in range(len(actions))]
    return [Replay(history[i], stream.control[i], stream.text[i], tuple(taken)) for i, taken in zip(rows, actions)]


def _group(name, prompt, shared, members, starts, version) -> GroupRollout:
    return GroupRollout(name, prompt, shared, members, starts, seed_of(name), version)
