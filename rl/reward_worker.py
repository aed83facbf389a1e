"""The reward worker: assembles clips from groups, scores them with its terms, and measures held-out films."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewards.battery import panned, static
from rewards.contract import RewardBatch, RewardError, as_output
from rewards.terms import SystemFault, Term, score
from rl.evaluation import measure
from rollout.prompts import DragPrompt
from rollout.records import Films, GroupRollout


@dataclass(frozen=True)
class GroupScores:
    """blocks: the frames of each block with an own advantage. frames: per term, float32 [G, T] over shared and own
    frames, NaN = not scored. metrics: per "term/metric", float32 [G]. faults: by term, the members [G] that it failed
    on."""

    group_id: str
    blocks: Mapping[int, range]
    frames: Mapping[str, np.ndarray]
    metrics: Mapping[str, np.ndarray]
    faults: Mapping[str, SystemFault]

    def block(self, term: str, block: int, reward_to_go: bool) -> np.ndarray:
        """float32 [G]: the mean over the scored frames of this block (reward_to_go: and of all later ones)."""
        own = self.blocks[block]
        frames = self.frames[term][:, own.start : None if reward_to_go else own.stop]
        scored = np.isfinite(frames)
        total = np.where(scored, frames, 0).sum(1)
        return np.where(scored.any(1), total / np.maximum(scored.sum(1), 1), np.nan).astype(np.float32)

    def joined(self, other: GroupScores) -> GroupScores:
        """The same group with the terms of both."""
        both = {name: {**getattr(self, name), **getattr(other, name)} for name in ("frames", "metrics", "faults")}
        return GroupScores(self.group_id, self.blocks, **both)

    def without(self, terms: Sequence[str], text: str) -> GroupScores:
        """The same group for terms that failed on all of it, for the reason in text."""
        like = next(iter(self.frames.values()))
        fault = SystemFault(np.ones(len(like), bool), text)
        nothing = dict.fromkeys(terms, np.full_like(like, np.nan))
        return GroupScores(self.group_id, self.blocks, nothing, {}, dict.fromkeys(terms, fault))


class RewardWorker:
    """terms: makes the reward terms in the worker's own process. batch_size: most clips a term is given at once."""

    def __init__(self, terms: Callable[[], Sequence[Term]], fps: float, batch_size: int | None = None) -> None:
        self.terms, self.fps, self.batch_size = terms(), fps, batch_size

    def dry_run(self, prompt: DragPrompt) -> None:
        """Every term on two clips of the prompt, one still and one that moves.

        Raises RewardError naming the first term that raises, answers wrongly, or has no score for either.
        """
        # The same drag, all of it visible and with a text: what every term can score.
        limit = np.float32(prompt.first_frame.shape[1::-1]) - 1
        prompt = replace(prompt, text=prompt.text or "an object", tracks=prompt.tracks.clip(0, limit),
                         visible=np.ones_like(prompt.visible))  # fmt: skip
        video = np.stack([static(prompt), panned(prompt)])
        scored = np.ones(video.shape[:2], bool)
        scored[:, 0] = False
        batch = reward_batch([prompt] * 2, video, scored, ["a", "b"], ["dry run"] * 2, [0, 0], self.fps, 0, "train")
        for term in self.terms:
            try:
                output = as_output(term.fn(batch), batch, term.name, term.range)
            except Exception as error:  # a user's reward may raise anything
                text = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
                raise RewardError(
                    f"rewards.{term.name} failed its dry run on two clips: {text}; mend it or leave it out with "
                    f"~rewards.{term.name}"
                ) from error
            if np.isnan(output.score).all():
                raise RewardError(
                    f"rewards.{term.name} gave none of the two clips of its dry run a score, where at least one number "
                    "was expected; None and NaN mean `not scored`"
                )

    def score(self, groups: Sequence[GroupRollout], step: int) -> list[GroupScores]:
        """Scores the groups, those of one clip length and number of points together; in another order."""
        alike: dict[tuple, list[GroupRollout]] = defaultdict(list)
        for group in groups:
            alike[len(group.shared), group.prompt.tracks.shape[1]].append(group)
        return [scores for same in alike.values() for scores in self._score(same, step)]

    def _score(self, groups: Sequence[GroupRollout], step: int) -> list[GroupScores]:
        members = len(groups[0].members)
        shared = np.stack([g.shared for g in groups]).repeat(members, 0)
        video = np.concatenate((shared, np.concatenate([g.members for g in groups])), 1)
        scored = np.zeros(video.shape[:2], bool)
        scored[:, shared.shape[1] :] = True
        prompts = [g.prompt for g in groups for _ in range(members)]
        names = [f"{g.group_id}/{m}" for g in groups for m in range(members)]
        batch = reward_batch(prompts, video, scored, names, [g.group_id for g in groups for _ in range(members)],
                             [g.seed for g in groups for _ in range(members)], self.fps, step, "train")  # fmt: skip
        outputs, faults = score(self.terms, batch, self.batch_size)
        frames, metrics = {}, {}
        for name, output in outputs.items():
            whole = np.where(scored, output.score[:, None], np.nan)
            frames[name] = whole if output.frame_score is None else output.frame_score
            metrics |= {f"{name}/{key}": value for key, value in output.metrics.items()}
        own = [slice(i * members, (i + 1) * members) for i in range(len(groups))]
        return [GroupScores(g.group_id, g.blocks, {k: v[rows] for k, v in frames.items()},
                            {k: v[rows] for k, v in metrics.items()},
                            {k: SystemFault(v.clips[rows], v.text) for k, v in faults.items() if v.clips[rows].any()})
                for g, rows in zip(groups, own)]  # fmt: skip

    def score_films(self, films: Films, split: str) -> dict[str, np.ndarray]:
        """Every term's score of whole videos, float32 [P] by "reward/<term>"; NaN where it has none."""
        found = {f"reward/{term.name}": np.full(len(films.prompts), np.nan, np.float32) for term in self.terms}
        for rows, batch in self._alike(films, split):
            for name, output in score(self.terms, batch, self.batch_size).outputs.items():
                found[f"reward/{name}"][rows] = output.score
        return found

    def measure(self, films: Films, split: str) -> dict[str, np.ndarray]:
        """What `rl.evaluation.measure` says of whole videos, float32 [P] each."""
        found: dict[str, np.ndarray] = defaultdict(lambda: np.full(len(films.prompts), np.nan, np.float32))
        for rows, batch in self._alike(films, split):
            for name, values in measure(batch).items():
                found[name][rows] = values
        return dict(found)

    def _alike(self, films: Films, split: str) -> Iterator[tuple[list[int], RewardBatch]]:
        """The films with equal numbers of points together: which they are, and the batch."""
        alike: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(films.prompts):
            alike[prompt.tracks.shape[1]].append(i)
        for rows in alike.values():
            video = films.videos[rows]
            scored = np.ones(video.shape[:2], bool)
            scored[:, 0] = False
            prompts = [films.prompts[i] for i in rows]
            truth = None if films.truths is None else films.truths[rows]
            names = [p.id for p in prompts]
            yield rows, reward_batch(prompts, video, scored, names, names, [0] * len(rows), self.fps, 0, split, truth)


def reward_batch(prompts: Sequence[DragPrompt], video: np.ndarray, scored: np.ndarray, sample_ids: Sequence[str],
                 group_ids: Sequence[str], seeds: Sequence[int], fps: float, step: int, split: str,
                 truth: np.ndarray | None = None) -> RewardBatch:  # fmt: skip
    """Clips [B, T, H, W, 3] of prompts with the same number of points as rewards see them."""
    frames = video.shape[1]
    tracks = np.stack([p.tracks[:frames] for p in prompts])
    return RewardBatch(
        video=video,
        scored=scored,
        first_frame=np.stack([p.first_frame for p in prompts]),
        target_tracks=tracks,
        target_visible=np.stack([p.visible[:frames] for p in prompts]),
        point_mask=np.ones((len(prompts), tracks.shape[2]), bool),
        prompt=tuple(p.text for p in prompts),
        group_id=tuple(group_ids),
        sample_id=tuple(sample_ids),
        seed=np.array(seeds, np.int64),
        fps=fps,
        step=step,
        split=split,
        truth=truth,
    )
