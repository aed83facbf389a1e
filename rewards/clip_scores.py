"""Rewards on CLIP embeddings: the LAION aesthetic predictors, and adherence to the prompt. Weights are local files.

The embeddings are open_clip's, of unit length, of frames as CLIP saw them in its training: bicubic to the model's size,
the middle square of what is not square, CLIP's mean and deviation.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from rewards.contract import RewardBatch, RewardError, RewardOutput, over_scored
from torchvision_cpu import ensure_torchvision

BROKEN = (
    RuntimeError,
    ValueError,
    AttributeError,
    KeyError,
    EOFError,
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
)


class Clip:
    """An open_clip model for inference, in float32.

    weights: a folder in open_clip's format, `open_clip_config.json` and the weights, which says itself what it is (then
        `model` is None); or a file of weights, .safetensors or .pt, and `model`, the name of its architecture.
    The architecture is part of the weights in a way no file says: OpenAI's were trained with QuickGELU and need
    "ViT-L-14-quickgelu", not "ViT-L-14"; with the wrong one everything runs and every score is wrong.
    Raises RewardError where a file is missing or does not fit; there are never random weights, and no download.
    """

    def __init__(self, weights: str | Path, model: str | None = None, device: str = "cpu", batch: int = 64) -> None:
        ensure_torchvision()
        import open_clip  # here, because it takes seconds to import
        from open_clip.transform import PreprocessCfg, image_transform_v2

        weights = Path(weights).expanduser()
        described = weights / "open_clip_config.json"
        if not weights.exists():
            raise RewardError(f"no CLIP weights {weights}; nothing is downloaded, fetch them first")
        if weights.is_dir() and not described.is_file():
            raise RewardError(f"{weights} has no open_clip_config.json; name a file of weights, and its model")
        if weights.is_dir() != (model is None):
            raise RewardError(f"{weights}: a file needs model=<open_clip architecture>, a folder says its own")
        if model is not None and model not in open_clip.list_models():
            raise RewardError(f"open_clip has no model {model!r}; OpenAI's are ViT-L-14-quickgelu and the like")
        name, file = (f"local-dir:{weights}", None) if model is None else (model, str(weights))
        try:
            config = open_clip.get_model_config(name) if model else json.loads(described.read_text())["model_cfg"]
            self.model = open_clip.create_model(name, pretrained=file, require_pretrained=True, device=device)
        except BROKEN as error:
            problem = " ".join(str(error).split())[:200]
            raise RewardError(f"{weights}: the weights are damaged or not those of {name}: {problem}") from error
        self.model.eval().requires_grad_(False)
        self.quick_gelu, self.width = bool(config.get("quick_gelu")), config["embed_dim"]
        self.preprocess = image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)
        self.tokenize = open_clip.get_tokenizer(name)
        self.device, self.batch, self.name = device, batch, name

    @torch.inference_mode()
    def embed(self, frames: np.ndarray) -> Tensor:
        """uint8 [M, H, W, 3] -> float32 [M, width], of unit length."""
        pixels = torch.stack([self.preprocess(Image.fromarray(frame)) for frame in frames])
        parts = [self.model.encode_image(part.to(self.device)) for part in pixels.split(self.batch)]
        return normalize(torch.cat(parts).float(), dim=-1)

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """M texts -> float32 [M, width], of unit length; what exceeds the model's context is cut off."""
        return normalize(self.model.encode_text(self.tokenize(list(texts)).to(self.device)).float(), dim=-1)


class AestheticMlp(nn.Module):
    """The head of christophschuhmann/improved-aesthetic-predictor; without activations, as it was trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LaionAesthetic:
    """A tenth of LAION's aesthetic rating of every scored frame, cut to 0..1; so does VBench.

    The ratings that people gave, and the heads predict, are 1 to 10. Metric: rating, not scaled and not cut.
    head: v1, a linear layer (LAION-AI/aesthetic-predictor: sa_0_4_vit_l_14_linear.pth, sa_0_4_vit_b_32_linear.pth), or
        v2, a network (christophschuhmann/improved-aesthetic-predictor: sac+logos+ava1-l14-linearMSE.pth); which of
        them, the file tells.
    weights, model, device, batch: of Clip. The heads were trained on OpenAI's CLIP, so QuickGELU is insisted on.
    Raises RewardError where a file is missing or does not fit.
    """

    def __init__(
        self,
        head: str | Path,
        weights: str | Path,
        model: str | None = None,
        device: str = "cpu",
        batch: int = 64,
    ) -> None:
        head = Path(head).expanduser()
        if not head.is_file():
            raise RewardError(f"no aesthetic head {head}; nothing is downloaded, fetch it first")
        self.clip = Clip(weights, model, device, batch)
        if not self.clip.quick_gelu:
            raise RewardError(
                f"{self.clip.name}: the aesthetic heads were trained on OpenAI's CLIP, which has QuickGELU; "
                "take ViT-L-14-quickgelu or ViT-B-32-quickgelu"
            )
        self.head = load_head(head, self.clip.width).to(device)

    @torch.inference_mode()
    def __call__(self, batch: RewardBatch) -> RewardOutput:
        rating = np.full(batch.scored.shape, np.nan, np.float32)
        rating[batch.scored] = self.head(self.clip.embed(batch.video[batch.scored])).squeeze(-1).cpu().numpy()
        score = (rating / 10).clip(0, 1)
        return RewardOutput(over_scored(score, batch.scored), score, {"rating": over_scored(rating, batch.scored)})


class ClipScore:
    """2.5 max(cos, 0) of the embeddings of every scored frame and of its prompt, cut to 0..1; 2.5 is the factor of
    Hessel et al., "CLIPScore", EMNLP 2021, whose prefix "A photo depicts" is left to the prompt.

    Cosines lie between about 0 and 0.4 (ibid.), scores thus between 0 and 1; both depend on the model, so scores of two
    models do not compare. A clip without a prompt ("") is not scored. Metric: cosine.
    weights, model, device, batch: of Clip.
    """

    def __init__(self, weights: str | Path, model: str | None = None, device: str = "cpu", batch: int = 64) -> None:
        self.clip = Clip(weights, model, device, batch)

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        cosine = np.full(batch.scored.shape, np.nan, np.float32)
        told = np.array([bool(prompt.strip()) for prompt in batch.prompt])
        use = batch.scored & told[:, None]
        if use.any():
            texts, which = np.unique(batch.prompt, return_inverse=True)
            prompts = self.clip.embed_text(texts.tolist())[torch.from_numpy(which[np.nonzero(use)[0]])]
            cosine[use] = (self.clip.embed(batch.video[use]) * prompts).sum(-1).cpu().numpy()
        score = (2.5 * cosine).clip(0, 1)
        return RewardOutput(over_scored(score, batch.scored), score, {"cosine": over_scored(cosine, batch.scored)})


def load_head(file: Path, width: int) -> nn.Module:
    """The head that `file` holds (.safetensors, or .pth without pickled code), float32 [..., width] -> [..., 1]."""
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        head = nn.Linear(width, 1) if "weight" in state else AestheticMlp(width)
        head.load_state_dict(state, strict=True)
    except (*BROKEN, TypeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise RewardError(
            f"{file}: damaged, or no aesthetic head for embeddings of width {width}: {problem}"
        ) from error
    return head.eval().requires_grad_(False)
