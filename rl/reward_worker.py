"""The reward worker: assembles clips from groups, scores them with every term, and measures held-out films."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.contract import RewardBatch, RewardError
from rewards.terms import Term, score
from rl.evaluation import measure
from rollout.prompts import DragPrompt
from rollout.records import Films, GroupRollout


@dataclass(frozen=True)
class GroupScores:
    """starts: first own frame of each block with an own advantage. frames: per term, float32 [G, T] over shared and own
    frames, NaN = not scored. metrics: per "term/metric", float32 [G]. faults: by term, what it raised."""

    group_id: str
    starts: Mapping[int, int]
    frames: Mapping[str, np.ndarray]
    metrics: Mapping[str, np.ndarray]
    faults: Mapping[str, str]

    def block(self, term: str, block: int, reward_to_go: bool) -> np.ndarray:
        """float32 [G]: the mean over the scored frames of this block (reward_to_go: and of all later ones)."""
        start = self.starts[block]
        end = None if reward_to_go else min((s for s in self.starts.values() if s > start), default=None)
        frames = self.frames[term][:, start:end]
        scored = np.isfinite(frames)
        total = np.where(scored, frames, 0).sum(1)
        return np.where(scored.any(1), total / np.maximum(scored.sum(1), 1), np.nan).astype(np.float32)


class RewardWorker:
    """terms: makes the reward terms in the worker's own process."""

    def __init__(self, terms: Callable[[], Sequence[Term]], fps: float) -> None:
        self.terms, self.fps = terms(), fps

    def dry_run(self, prompt: DragPrompt) -> None:
        """Every term on two still clips of the prompt; RewardError naming the term that raises or answers wrongly."""
        video = np.broadcast_to(prompt.first_frame, (2, len(prompt.tracks), *prompt.first_frame.shape)).copy()
        scored = np.ones(video.shape[:2], bool)
        scored[:, 0] = False
        batch = reward_batch([prompt] * 2, video, scored, ["a", "b"], ["dry run"] * 2, [0, 0], self.fps, 0, "train")
        for name, text in score(self.terms, batch).system_faults.items():
            raise RewardError(
                f"rewards.{name} failed on a still clip: {text}; mend it or leave it out with ~rewards.{name}"
            )

    def score(self, groups: Sequence[GroupRollout], step: int) -> list[GroupScores]:
        """Scores the groups, those of one clip length and number of points together."""
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
        outputs, faults = score(self.terms, batch)
        frames, metrics = {}, {}
        for name, output in outputs.items():
            whole = np.where(scored, output.score[:, None], np.nan)
            frames[name] = whole if output.frame_score is None else output.frame_score
            metrics |= {f"{name}/{key}": value for key, value in output.metrics.items()}
        own = [slice(i * members, (i + 1) * members) for i in range(len(groups))]
        return [GroupScores(g.group_id, g.starts, {k: v[rows] for k, v in frames.items()},
                            {k: v[rows] for k, v in metrics.items()}, faults)
                for g, rows in zip(groups, own)]  # fmt: skip

    def measure(self, films: Films, split: str) -> dict[str, np.ndarray]:
        """Per metric, float32 [P]: every term's score of the whole video, and what `rl.evaluation.measure` adds."""
        alike: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(films.prompts):
            alike[prompt.tracks.shape[1]].append(i)
        found: dict[str, np.ndarray] = defaultdict(lambda: np.full(len(films.prompts), np.nan, np.float32))
        for rows in alike.values():
            video = films.videos[rows]
            scored = np.ones(video.shape[:2], bool)
            scored[:, 0] = False
            prompts = [films.prompts[i] for i in rows]
            truth = None if films.truths is None else films.truths[rows]
            names = [p.id for p in prompts]
            batch = reward_batch(prompts, video, scored, names, names, [0] * len(rows), self.fps, 0, split, truth)
            for name, output in score(self.terms, batch).outputs.items():
                found[f"reward/{name}"][rows] = output.score
            for name, values in measure(batch).items():
                found[name][rows] = values
        return dict(found)


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
