"""What Wan's image-to-video transformers read of the first frame beside its latents: features of CLIP's image tower."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from policy.codec import to_pixels
from policy.files import WeightsError
from torchvision_cpu import ensure_torchvision

ensure_torchvision()


class WanImage:
    """folder: holds image_encoder/ and image_processor/ in diffusers layout; read when the first picture is.

    Raises WeightsError where there are none.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device("cpu")
        for part in ("image_encoder", "image_processor"):
            if not (self.folder / part).is_dir():
                raise WeightsError(
                    f"{folder} holds no {part}/, which an image-to-video Wan needs; give policy.wan.base"
                )

    @torch.no_grad()
    def __call__(self, first_frame: Tensor) -> Tensor:
        """float [B, 3, H, W] in -1..1 -> [B, tokens, image_dim], as diffusers' WanImageToVideoPipeline has them."""
        self._pipeline.image_encoder.to(self.device)
        pictures = list(to_pixels(first_frame[:, :, None])[:, 0].cpu().numpy())
        return self._pipeline.encode_image(pictures, self.device)

    @cached_property
    def _pipeline(self):
        """diffusers' pipeline with its image tower alone."""
        from diffusers import WanImageToVideoPipeline  # here, as it takes seconds that other Wans do not need
        from transformers import CLIPImageProcessor, CLIPVisionModel

        try:
            processor = CLIPImageProcessor.from_pretrained(self.folder / "image_processor", local_files_only=True)
            encoder, info = CLIPVisionModel.from_pretrained(
                self.folder / "image_encoder",
                dtype=self.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise WeightsError(f"cannot read the image encoder of {self.folder}: {reason}; restore it") from error
        if info["missing_keys"]:
            lost = sorted(info["missing_keys"])[0]
            raise WeightsError(f"{self.folder / 'image_encoder'} is not whole: {lost} is missing; restore it")
        return WanImageToVideoPipeline(
            None, None, None, None, image_processor=processor, image_encoder=encoder.eval().requires_grad_(False)
        )
