"""Texts to what the cross-attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class TextEncoder(Protocol):
    """device: where it computes; what it returns lies on the CPU."""

    device: torch.device

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, text_dim], one row of tokens per text; rows beyond a text's end are zero."""
        ...


class NoText:
    """For a policy that was never shown a text: zero embeddings [B, 1, text_dim], whatever the text."""

    def __init__(self, dim: int) -> None:
        self.dim, self.device = dim, torch.device("cpu")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.zeros(len(texts), 1, self.dim)
