"""A learned reward for picture quality: how much a frame has degraded against the given first frame.

It measures degradation, not beauty. A small open_clip image tower embeds both frames; a head reads the level, 0
(clean) to 1 (ruined), from [e_t, e_0, e_t - e_0]. Trained by `jobs/train_scorer.py` on `rewards/corruptions.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewards.contract import RewardBatch, RewardError, RewardOutput, over_scored
from torchvision_cpu import ensure_torchvision

SHIPPED = Path(__file__).parent / "weights" / "degradation"
TOWER = {"layers": [1, 1, 1, 1], "output_dim": 64, "heads": 4, "image_size": 64, "width": 4}
MIRRORINGS = ((), (-3,), (-2,), (-3, -2))


class DegradationModel(nn.Module):
    """open_clip's ModifiedResNet, 0.1 M parameters, with a head for the level. `tower`: the arguments of the former.

    A convolutional tower because blur, noise and seams are local: after 90 s of training its rank correlation with
    the true level inside a scene is 0.86, that of the Vision Transformer of this size and speed 0.52.
    """

    def __init__(self, **tower: object) -> None:
        super().__init__()
        ensure_torchvision()
        from open_clip.modified_resnet import ModifiedResNet  # here, because open_clip takes seconds to import

        self.config = {**TOWER, **tower}
        self.tower = ModifiedResNet(**self.config)
        width = self.config["output_dim"]
        self.head = nn.Sequential(nn.Linear(3 * width, 64), nn.GELU(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 1))

    def embed(self, frames: Tensor) -> Tensor:
        """uint8 [..., S, S, 3] -> [..., output_dim], of length sqrt(output_dim)."""
        x = frames.flatten(0, -4).movedim(-1, 1).float().div(127.5).sub(1)
        e = nn.functional.normalize(self.tower(x), dim=-1) * math.sqrt(self.config["output_dim"])
        return e.unflatten(0, frames.shape[:-3])

    def level(self, first: Tensor, frame: Tensor) -> Tensor:
        """Embeddings of the first frame and of the judged ones, both [..., output_dim] -> level [...], not clipped."""
        first = first.expand_as(frame)
        return self.head(torch.cat((frame, first, frame - first), -1)).squeeze(-1)

    @torch.inference_mode()
    def judge(self, first: Tensor, frame: Tensor, row: Tensor) -> Tensor:
        """The level of each frame in 0..1, float32 [M], averaged over four mirrorings: that almost halves its noise.

        first: uint8 [U, S, S, 3]. frame: uint8 [M, S, S, 3]. row: int64 [M], which of `first` each frame belongs to.
        """
        levels = []
        for dims in MIRRORINGS:
            embedded = torch.cat([self.embed(chunk.flip(dims)) for chunk in frame.split(256)])
            levels.append(self.level(self.embed(first.flip(dims))[row], embedded))
        return torch.stack(levels).mean(0).clamp(0, 1)


def fit(
    model: DegradationModel,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    steps: int,
    lr: float,
    report: Callable[[int, dict[str, float]], None],
    seed: int,
) -> None:
    """Smooth-L1 regression of the level with AdamW under a half cosine.

    batches: (first uint8 [V, S, S, 3], frame uint8 [V, K, S, S, 3], level float32 [V, K]), K judged frames per video.
    Each batch is turned by a random multiple of 90 degrees and mirrored or not, first and judged frames alike.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
    )
    started, mean = time.process_time(), 0.0
    model.train()
    for step in range(steps):
        first, frame, level = next(batches)
        turns, mirror = torch.randint(4, (2,), generator=generator).tolist()
        first, frame = (x.rot90(turns, (-3, -2)).flip([-2] * (mirror % 2)) for x in (first, frame))
        predicted = model.level(model.embed(first)[:, None], model.embed(frame))
        loss = nn.functional.smooth_l1_loss(predicted, level, beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        if step % 100 == 0 or step == steps - 1:
            report(step, {"loss": mean, "cpu_s": time.process_time() - started})
    model.eval()


def save(model: DegradationModel, folder: str | Path) -> None:
    """Writes `model.safetensors` and `config.json` into the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")


def load(folder: str | Path) -> DegradationModel:
    """The model that `save` wrote, for inference. Raises RewardError naming what is missing or does not fit."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise RewardError(
                f"no degradation scorer: {folder / name} is missing; make one with `python -m jobs.train_scorer`"
            )
    try:
        model = DegradationModel(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[-1].strip()
        raise RewardError(f"{folder}: the weights are broken or do not fit config.json: {problem}") from error
    return model.eval().requires_grad_(False)


class Degradation:
    """1 - level of every scored frame against the given first frame; the first frame of a group is embedded once.

    weights: a folder with `config.json` and `model.safetensors`. Frames of another size are resized to the tower's.
    """

    def __init__(self, weights: str | Path = SHIPPED) -> None:
        self.model = load(weights)

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        _, clip, group = np.unique(batch.group_id, return_index=True, return_inverse=True)
        row = torch.from_numpy(group[np.nonzero(batch.scored)[0]])
        level = self.model.judge(self._pixels(batch.first_frame[clip]), self._pixels(batch.video[batch.scored]), row)
        score = np.full(batch.scored.shape, np.nan, np.float32)
        score[batch.scored] = 1 - level.numpy()
        return RewardOutput(over_scored(score, batch.scored), score)

    def _pixels(self, frames: np.ndarray) -> Tensor:
        """uint8 [M, H, W, 3] -> [M, S, S, 3]."""
        size = self.model.config["image_size"]
        if frames.shape[1:3] != (size, size):
            frames = np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames])
        return torch.from_numpy(frames)
