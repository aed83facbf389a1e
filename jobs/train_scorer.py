"""Train the degradation scorer on corrupted frames of the sprite world, and write its weights with a model card.

python -m jobs.train_scorer out=outputs/scorer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.cli import job
from rewards.corruptions import HELD_OUT, NEED_DEPARTURE, REACH, TRAINED, Scene
from rewards.degradation import DegradationModel, fit, save
from rollout.seeds import numpy_generator, seed_of
from rollout.sprites import SpriteWorld

FRAMES_PER_VIDEO = 12
KINDS = {**TRAINED, **HELD_OUT}
COARSE_GRAIN = 0.12
"""Of every other training scene: on a smooth background some corruptions hardly show, and would not be learnt."""
FAINT, FAINT_SHARE = ("hole", "warp"), 3.0
"""Kinds that hardly show, and how many times as often as the others they are taught."""
TEST_SCENES = range(1000, 1060)
"""Of split "heldout"; scenes below 1000 were looked at while the kinds and the tower were chosen."""


@dataclass
class TrainScorerConfig:
    seed: int
    out: str
    steps: int
    batch_size: int
    lr: float


@job("train_scorer", TrainScorerConfig)
def main(config: TrainScorerConfig) -> None:
    def report(step: int, metrics: dict[str, float]) -> None:
        print(f"step {step} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)

    train_scorer(config.steps, config.batch_size, config.lr, config.seed, config.out, report)
    print(f"wrote {config.out}; the card is {config.out}/MODEL_CARD.md")


def train_scorer(
    steps: int, batch_size: int, lr: float, seed: int, out: str | Path, report: Callable[[int, dict[str, float]], None]
) -> dict[str, tuple[float, float]]:
    """Trains on `batch_size` frames per step of split "pretrain", tests on "heldout", writes weights and card to `out`.

    Returns, by kind of corruption, Spearman's correlation of predicted and true level: over all scenes, and the mean
    inside a scene (what a group-relative advantage uses).
    """
    started = time.process_time()
    torch.manual_seed(seed_of(seed, "scorer"))
    model, world = DegradationModel(), SpriteWorld()
    worlds = (world, SpriteWorld(grain=COARSE_GRAIN))
    fit(model, batches(worlds, batch_size // FRAMES_PER_VIDEO, seed), steps, lr, report, seed)
    minutes = (time.process_time() - started) / 60
    save(model, out)
    table = {kind: rank_correlations(model, world, kind) for kind in KINDS}
    call = f"python -m jobs.train_scorer steps={steps} batch_size={batch_size} lr={lr} seed={seed}"
    Path(out, "MODEL_CARD.md").write_text(_card(call, minutes, model, table, extremes(model, world)))
    return table


def batches(worlds: Sequence[SpriteWorld], videos: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `rewards.degradation.fit` reads: videos of the worlds in turn.

    A frame is left clean (30 %), or gets one corruption (50 %) or two (20 %). The judged frame is a later frame of the
    first one's video: the object has moved, which is not degradation. Two levels a and b make 1 - (1 - a)(1 - b).
    """
    index = 0
    while True:
        firsts, frames, levels = [], [], []
        for _ in range(videos):
            world = worlds[index % len(worlds)]
            video, tracks, _ = world.sample("pretrain", index)
            rng = numpy_generator("scorer", seed, index)
            index += 1
            firsts.append(video[0])
            for t in rng.choice(len(video), FRAMES_PER_VIDEO, replace=False):
                frame, clean = video[t], 1.0
                scene = Scene(tracks[t], tracks[0])
                left = np.linalg.norm(tracks[t] - tracks[0], axis=-1).max() > REACH * world.size
                kinds = [kind for kind in TRAINED if left or kind not in NEED_DEPARTURE]
                share = np.array([FAINT_SHARE if kind in FAINT else 1.0 for kind in kinds])
                for kind in rng.choice(kinds, rng.choice(3, p=(0.3, 0.5, 0.2)), False, share / share.sum()):
                    level = rng.random() ** 1.3
                    frame = corrupted(frame, kind, level, rng, scene)
                    clean *= 1 - level
                frames.append(frame)
                levels.append(1 - clean)
        shape = (videos, FRAMES_PER_VIDEO)
        yield (
            torch.from_numpy(np.stack(firsts)),
            torch.from_numpy(np.stack(frames)).unflatten(0, shape),
            torch.tensor(levels, dtype=torch.float32).view(shape),
        )


def corrupted(frame: np.ndarray, kind: str, level: float, rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """uint8 [H, W, 3] -> the same, corrupted."""
    changed = KINDS[kind](frame.astype(np.float32) / 255, level, rng, scene)
    return np.rint(changed.clip(0, 1) * 255).astype(np.uint8)


def levels_of(model: DegradationModel, first: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """first uint8 [H, W, 3], frames uint8 [K, H, W, 3] -> levels [K]."""
    row = torch.zeros(len(frames), dtype=torch.long)
    return model.judge(torch.from_numpy(first)[None], torch.from_numpy(frames), row).numpy()


def rank_correlations(model: DegradationModel, world: SpriteWorld, kind: str) -> tuple[float, float]:
    """Spearman's correlation of predicted and true level, 11 levels per scene: (over all, mean inside a scene)."""
    truth = np.linspace(0, 1, 11)
    predicted = []
    for index in TEST_SCENES:
        video, tracks, _ = world.sample("heldout", index)
        t = len(video) - 1 - (0 if kind in NEED_DEPARTURE else index % 8)
        scene = Scene(tracks[t], tracks[0])
        frames = [corrupted(video[t], kind, level, numpy_generator(kind, index), scene) for level in truth]
        predicted.append(levels_of(model, video[0], np.stack(frames)))
    inside = [_spearman(truth, row) for row in predicted]
    return _spearman(np.tile(truth, len(TEST_SCENES)), np.concatenate(predicted)), float(np.mean(inside))


def extremes(model: DegradationModel, world: SpriteWorld) -> dict[str, tuple[float, float]]:
    """Mean level of frames that need a sure answer, and its standard deviation inside a scene."""
    noise = np.random.default_rng(0).integers(0, 256, (1, world.size, world.size, 3), np.uint8)
    found: dict[str, list[np.ndarray]] = {}
    for index in TEST_SCENES:
        video, *_ = world.sample("heldout", index)
        cases = {
            "copy of the first frame": video[:1],
            "true frames (legitimate motion)": video[1:],
            "black": np.zeros_like(video[:1]),
            "grey": np.full_like(video[:1], 128),
            "white noise": noise,
        }
        for name, frames in cases.items():
            found.setdefault(name, []).append(levels_of(model, video[0], frames))
    return {name: (float(np.mean(rows)), float(np.mean([row.std() for row in rows]))) for name, rows in found.items()}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.searchsorted(np.sort(x), x, "left") + np.searchsorted(np.sort(x), x, "right") for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(b) > 0 else 0.0


def _card(call: str, minutes: float, model: DegradationModel, table: dict, sure: dict) -> str:
    def mean(kinds: dict) -> str:
        pooled, inside = np.mean([table[kind] for kind in kinds], 0)
        return f"| **mean** | **{pooled:.2f}** | **{inside:.2f}** |"

    def rows(kinds: dict) -> str:
        return "\n".join(
            [f"| {kind} | {table[kind][0]:.2f} | {table[kind][1]:.2f} |" for kind in kinds] + [mean(kinds)]
        )

    parameters = sum(p.numel() for p in model.parameters())
    return f"""# Degradation scorer

How much a frame has degraded against the first frame of its video, from 0 to 1. It measures degradation, not beauty,
and knows only the sprite world: retrain it, or take another scorer, for other pictures.

* Made by `{call}`, {minutes:.1f} minutes of one CPU thread.
* Data: `SpriteWorld()` and `SpriteWorld(grain={COARSE_GRAIN})` of `rollout/sprites.py` in turn, split "pretrain",
  corrupted by `rewards/corruptions.py`.
* Model: open_clip `ModifiedResNet` {model.config} and a head on [e_t, e_0, e_t - e_0]; {parameters} parameters, fp32.
* Licence: as the project; no third-party weights or data.

Spearman's correlation of predicted and true level, 11 levels per scene, on scenes {TEST_SCENES[0]} to {TEST_SCENES[-1]}
of split "heldout": over all scenes, and the mean inside a scene.

| trained kind | pooled | inside a scene |
|---|---|---|
{rows(TRAINED)}

| kind never seen in training | pooled | inside a scene |
|---|---|---|
{rows(HELD_OUT)}

| frames | mean level | sd inside a scene |
|---|---|---|
{chr(10).join(f"| {name} | {level:.2f} | {spread:.3f} |" for name, (level, spread) in sure.items())}

What it does not see:

* A static video: a copy of the first frame is as good as any. Use it behind a motion gate (`rewards/guards.py`).
* An object that was copied instead of moved, not even when trained on it. The term `Background` does.
"""


if __name__ == "__main__":
    main()
