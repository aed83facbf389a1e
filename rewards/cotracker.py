"""CoTracker3 as a tracker: Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real
Videos", 2024.

Its code and weights are CC-BY-NC 4.0: they are not part of this project, and whoever uses them fetches them first.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.contract import RewardError

ENTRY = "cotracker3_offline"
WEIGHTS = "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth"


class CoTracker3:
    """The offline model, one video at a time; it needs no guess and sees the whole video, whichever frames are asked.

    repo: a folder with the hubconf.py of facebookresearch/co-tracker, or "facebookresearch/co-tracker:<commit>", 40 hex
        digits, whose copy lies in torch.hub's cache. checkpoint: the file scaled_offline.pth. Nothing is downloaded.
    device: of the model. least: a point is found where visibility times confidence reaches it; both are
        probabilities. iters: refinements. chunk: frames whose features are computed at once, which bounds the memory.
    support: support x support more points are followed over the whole picture, which steadies those asked for.

    Raises RewardError naming what is missing and how to get it, or what of the checkpoint does not fit.
    """

    def __init__(
        self,
        repo: str | Path,
        checkpoint: str | Path,
        device: str = "cpu",
        least: float = 0.5,
        iters: int = 6,
        chunk: int = 16,
        support: int = 6,
    ) -> None:
        self.device, self.least, self.iters, self.chunk, self.support = device, least, iters, chunk, support
        predictor = load_predictor(repo, checkpoint).to(device)
        self.model, self.shape = predictor.model, tuple(predictor.interp_shape)

    def track(
        self, video: np.ndarray, points: np.ndarray, frames: list[int], guess: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        positions, confidence = self.follow(video, points)
        found = confidence[frames] >= self.least
        return np.where(found[..., None], positions[frames], np.float32(np.nan)), found

    @torch.inference_mode()
    def follow(self, video: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [T, H, W, 3], (x, y) px in frame 0 [N, 2] -> positions float32 [T, N, 2] px, and visibility times
        confidence float32 [T, N] in 0..1; of the given frame the points themselves, and 1.
        """
        count, (height, width) = len(points), self.shape
        if not count:
            return np.zeros((len(video), 0, 2), np.float32), np.zeros((len(video), 0), np.float32)
        scale = torch.tensor([(width - 1) / (video.shape[2] - 1), (height - 1) / (video.shape[1] - 1)])
        queries = torch.cat([torch.from_numpy(np.float32(points)) * scale, self._support_points()])
        queries = torch.cat([torch.zeros(len(queries), 1), queries], 1)  # (frame, x, y)
        pixels = torch.tensor(video, device=self.device).movedim(-1, 1).float()
        pixels = F.interpolate(pixels, self.shape, mode="bilinear", align_corners=True)
        # One video per call: the model's reshapes fail on larger batches.
        tracks, visible, confidence, _ = self.model(
            video=pixels[None], queries=queries[None].to(self.device), iters=self.iters, fmaps_chunk_size=self.chunk
        )
        positions = (tracks[0, :, :count].cpu() / scale).numpy()
        sure = (visible * confidence)[0, :, :count].cpu().numpy()
        positions[0], sure[0] = points, 1
        return positions, sure

    def _support_points(self) -> Tensor:
        """(x, y) in the model's picture, [support^2, 2]."""
        height, width = self.shape
        x, y = (torch.linspace(side / 64, side - 1 - side / 64, self.support) for side in (width, height))
        return torch.cartesian_prod(x, y).reshape(-1, 2)


def load_predictor(repo: str | Path, checkpoint: str | Path) -> nn.Module:
    """The predictor of `repo` with the weights of `checkpoint`, in evaluation mode; the global random state stays."""
    folder, checkpoint = _folder_of(str(repo)), Path(checkpoint).expanduser()
    if not checkpoint.is_file():
        raise RewardError(f"CoTracker3: no checkpoint {checkpoint}; fetch it with `curl -L -o {checkpoint} {WEIGHTS}`")
    # Importing its modules reseeds torch globally, and building the model draws from that generator.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            predictor = torch.hub.load(str(folder), ENTRY, source="local", pretrained=False)
        except (RuntimeError, ImportError) as error:
            raise RewardError(f"CoTracker3: {folder}/hubconf.py has no usable {ENTRY}: {error}") from error
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        predictor.model.load_state_dict(state.get("model", state), strict=True)
    except (RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        problem = " ".join(str(error).split())[:200]
        raise RewardError(f"CoTracker3: {checkpoint} is damaged or of another model: {problem}") from error
    return predictor.eval().requires_grad_(False)


def _folder_of(repo: str) -> Path:
    """Where the code lies; RewardError with the command that puts it there if it does not."""
    name, colon, commit = repo.partition(":")
    if colon and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise RewardError(f"CoTracker3: repo={repo}: pin a commit of 40 hex digits, a branch or tag may change")
        folder = Path(torch.hub.get_dir()) / f"{name.replace('/', '_')}_{commit}"
    else:
        folder = Path(repo).expanduser()
        name, commit = "facebookresearch/co-tracker", "main"
    if not (folder / "hubconf.py").is_file():
        raise RewardError(
            f"CoTracker3: no {folder / 'hubconf.py'}; fetch it with "
            f"`git clone https://github.com/{name} {folder} && git -C {folder} checkout {commit}`"
        )
    return folder
