"""Grouped Self-Rollout with selective stochasticity.

`trunk` and `video`: one deterministic trajectory per prompt; groups of G fork off it after a selected step, so all that
lies before is computed once and the members of a group share one state. `frame` and `all`: G full videos, each with its
own states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from policy.explore import Subspace, cells_near, tangent_basis
from policy.policy import DragPolicy
from policy.transition import Kernel, place, transition
from rollout.plan import NoisePlan, make_plan
from rollout.prompts import DragPrompt
from rollout.records import Action, GroupRollout, Replay
from rollout.sampler import Sampler, Stream, state_rows
from rollout.seeds import seed_of

EXPLORES = ("tangent", "coarse", "white")


@dataclass
class Line:
    """One video in the making: a trunk, a twig of one, or a whole video of a group.

    prompt: index. members: whose noise it draws at selected steps; a twig draws none. last: the block it ends with.
    film: uint8 [t, H, W, 3] and history: latents [1, C, f, h, w], per finished block.
    """

    prompt: int
    members: range
    last: int
    film: list[np.ndarray]
    history: list[Tensor]
    actions: list[Action] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """A group in the making: its members' lines, and the blocks that have an advantage of their own."""

    name: str
    prompt: int
    blocks: range
    lines: list[Line]

    def rollout(self, prompts: Sequence[DragPrompt], sampler: Sampler, version: int) -> GroupRollout:
        shared, start = np.concatenate(self.lines[0].film[: self.blocks[0]]), self.blocks[0]
        members = np.stack([np.concatenate(line.film[start:]) for line in self.lines])
        blocks = {block: range(film.start, film.stop) for block in self.blocks for film in [sampler.video(block)]}
        return GroupRollout(self.name, prompts[self.prompt], shared, members, blocks, seed_of(self.name), version)


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
        if self.group_size < 2:
            raise ValueError("rollout.group_size must be at least 2: a group of one has no relative score")
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

    def plan(self, seed: int, iteration: int, prompt_id: str) -> NoisePlan:
        return make_plan(seed, iteration, prompt_id, self.settings.select, self.blocks - 1, len(self.sampler.levels))

    @torch.no_grad()
    def rollout(
        self, prompts: Sequence[DragPrompt], plans: Sequence[NoisePlan], version: int
    ) -> tuple[list[GroupRollout], list[Replay]]:
        """Groups for the rewards and replays for the learner; version: of the weights, recorded in both."""
        begun, first = self.sampler.begin(prompts)
        lines, groups = self._start(prompts, plans, first)
        actors, stream = lines, begun
        if not self.settings.branching:
            stream = begun.rows(_index([line.prompt for line in lines], first))
        while lines:
            stream, lines = self._block(stream, lines, groups, plans)
        # Copies: a slice would take the control of all prompts with it wherever the replay is sent.
        control, text = ([row.clone() for row in part.split(1)] for part in (begun.control, begun.text))
        replays = [
            Replay(torch.cat(line.history, 2), control[line.prompt], text[line.prompt], tuple(line.actions), version)
            for line in actors
        ]  # fmt: skip
        return [group.rollout(prompts, self.sampler, version) for group in groups], replays

    def _start(self, prompts, plans, first: Tensor) -> tuple[list[Line], list[Group]]:
        """One trunk per prompt; or all the videos of all groups."""
        members, pictures = self.settings.group_size, [prompt.first_frame[None] for prompt in prompts]
        if self.settings.branching:
            ends = [max(block for block, _ in plan.selected) for plan in plans]
            return [Line(i, range(members), end, [pictures[i]], [first[i : i + 1]]) for i, end in enumerate(ends)], []
        last, groups = self.blocks - 1, []
        for i, name in enumerate(self._group_ids(plans, None)):
            videos = [Line(i, range(g, g + 1), last, [pictures[i]], [first[i : i + 1]]) for g in range(members)]
            groups.append(Group(name, i, range(1, self.blocks), videos))
        return [line for group in groups for line in group.lines], groups

    def _block(
        self, stream: Stream, lines: list[Line], groups: list[Group], plans: Sequence[NoisePlan]
    ) -> tuple[Stream, list[Line]]:
        """Takes all lines through the next block, a pass per noise level; returns what goes on after it."""
        sampler, block, branching = self.sampler, stream.block, self.settings.branching
        x = sampler.initial(plans, block)
        x = x.index_select(0, _index([line.prompt for line in lines], x))
        parents = torch.arange(len(lines), device=x.device)
        for k, (s, _) in enumerate(sampler.levels):
            rows = [r for r, line in enumerate(lines) if line.members and k in plans[line.prompt].steps(block)]
            at = _index(rows, x)
            v, moved = self._velocities(stream, x, s, parents, at)
            after = sampler.advance(x, v, k, [plans[line.prompt] for line in lines], block)
            if rows:
                chosen = [lines[r] for r in rows]
                explored = self._explore(stream, parents[at], x[at], v[at], moved, after[at], k, chosen, plans)
                names = self._group_ids([plans[line.prompt] for line in chosen], block if branching else None)
                for line, action in zip(chosen, explored.actions(x[at], names, [line.members for line in chosen])):
                    line.actions.append(action)
                if branching:
                    forks = [Group(name, line.prompt, range(block, block + 1), self._twigs(line, block))
                             for name, line in zip(names, chosen)]  # fmt: skip
                    groups += forks
                    lines = lines + [twig for fork in forks for twig in fork.lines]
                    parents = torch.cat((parents, parents[at].repeat_interleave(self.settings.group_size)))
                    after = torch.cat((after, explored.states.flatten(0, 1)))
                else:
                    after[at] = explored.states[:, 0]
            x = after
        return self._finish(stream, lines, x, parents)

    def _twigs(self, trunk: Line, block: int) -> list[Line]:
        last = self.blocks - 1
        if self.settings.select == "trunk":
            last = min(block + self.settings.horizon, last)
        return [Line(trunk.prompt, range(0), last, list(trunk.film), []) for _ in range(self.settings.group_size)]

    def _finish(self, stream: Stream, lines: list[Line], x: Tensor, parents: Tensor) -> tuple[Stream, list[Line]]:
        """Films the clean block x and appends it to the lines that go on; a trunk ends unseen with its last fork."""
        sampler, block = self.sampler, stream.block
        going = [r for r, line in enumerate(lines) if block < line.last]
        ending = [r for r, line in enumerate(lines) if block == line.last]
        if self.settings.branching:
            ending = [r for r in ending if not lines[r].members]
        shown = _index(going + ending, x)
        state = state_rows(stream.codec_state, parents[shown])
        pixels, decoded = sampler.decode(replace(stream, codec_state=state), x[shown])
        for r, film in zip(going + ending, pixels):
            lines[r].film.append(film)
        if not going:
            return stream, []
        kept = shown[: len(going)]
        clean = x[kept]
        for r, latent in zip(going, clean.split(1)):
            lines[r].history.append(latent)
        if parents[kept].tolist() != list(range(len(stream.text))):
            stream = stream.rows(parents[kept])
        state = state_rows(decoded.codec_state, torch.arange(len(going), device=x.device))
        return sampler.append(replace(stream, codec_state=state), clean), [lines[r] for r in going]

    def _velocities(
        self, stream: Stream, x: Tensor, s: float, parents: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The network at all states x; for `tangent` also at those in `at` with moved drags, [n, D, C, f, h, w]."""
        control = self.sampler.control(stream).index_select(0, parents)
        if self.settings.explore != "tangent" or not len(at):
            return self.sampler.velocity(stream, x, s, control, parents), None
        moved = self._moved_control(stream, parents[at])
        wide = at.repeat_interleave(moved.shape[1])
        x_wide, parents_wide = torch.cat((x, x[wide])), torch.cat((parents, parents[wide]))
        v = self.sampler.velocity(stream, x_wide, s, torch.cat((control, moved.flatten(0, 1))), parents_wide)
        return v[: len(x)], v[len(x) :].unflatten(0, moved.shape[:2])

    def _moved_control(self, stream: Stream, rows: Tensor) -> Tensor:
        """The next block's control, the drag moved by a pixel along one axis in one frame: [n, 2 f, Cc, f, h, w]."""
        frames, video = self.sampler.frames[stream.block], self.sampler.video(stream.block)
        drag = stream.drag.rows(rows.repeat_interleave(2))
        tracks = drag.tracks.unflatten(0, (-1, 2)).clone()
        for axis in (0, 1):
            tracks[:, axis, video, :, axis] += 1.0
        moved = self.policy.control.encode(replace(drag, tracks=tracks.flatten(0, 1)), frames).unflatten(0, (-1, 2))
        control = self.sampler.control(stream)[rows]
        own = torch.eye(control.shape[2], dtype=torch.bool, device=control.device)[:, None, :, None, None]
        return torch.where(own, moved[:, :, None], control[:, None, None]).flatten(1, 2)

    def _explore(self, stream: Stream, parents: Tensor, x: Tensor, v: Tensor, moved: Tensor | None, after: Tensor,
                 step: int, lines: Sequence[Line], plans: Sequence[NoisePlan]) -> Explored:  # fmt: skip
        """Samples the selected transition of each line for its members; after: where the step leads unselected."""
        (s, s2), kernel = self.sampler.levels[step], self.settings.kernel
        if moved is None:
            subspace = self._cells(stream, parents)
        else:
            subspace = tangent_basis(v, moved, self._seen(stream, parents).repeat(1, 2))
        pair = 2 if self.settings.antithetic else 1
        noise = subspace.noise(
            [[plans[line.prompt].exploration(stream.block, step, g // pair) for g in line.members] for line in lines]
        )
        if self.settings.antithetic:
            sign = torch.tensor([[1.0 - 2 * (g % 2) for g in line.members] for line in lines], device=x.device)
            noise = noise * sign.view(*sign.shape, *[1] * (noise.ndim - 2))
        coordinates, logp = transition(kernel, subspace, x, v, s, s2, noise=noise)
        return Explored(stream.block, step, s, s2, subspace, coordinates, logp, place(subspace, after, coordinates))

    def _seen(self, stream: Stream, rows: Tensor) -> Tensor:
        """Whether any point can be seen in each latent frame of the next block, bool [n, f]."""
        visible = stream.drag.visible[rows, self.sampler.video(stream.block)].any(-1)
        return visible.unflatten(1, (self.policy.sizes[stream.block], -1)).any(-1)

    def _cells(self, stream: Stream, rows: Tensor) -> Subspace:
        # The last video frame of each latent frame: its drag is what the latent frame ends with.
        stop, stride = self.sampler.video(stream.block).stop, self.policy.codec.temporal_stride
        frames = slice(stop - 1 - stride * (self.policy.sizes[stream.block] - 1), stop, stride)
        channels, h, w = self.policy.latent_shape
        cell, radius = (self.settings.cell, self.settings.radius) if self.settings.explore == "coarse" else (1, 0.0)
        return cells_near(
            stream.drag.tracks[rows][:, frames],
            stream.drag.visible[rows][:, frames],
            (h, w),
            self.policy.codec.spatial_stride,
            cell,
            channels,
            radius,
        )

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


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=like.device)
