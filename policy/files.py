"""Weights from a file: what is wrong with them, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class WeightsError(ValueError):
    """Weights that cannot be loaded; the message names the file and what to do."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A safetensors file; WeightsError naming it when it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot read weights {path}: {error}; restore the file or choose another") from error


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raises WeightsError naming the source and the first entry of `state` that `own` does not have in that shape."""
    wrong = [
        f"{k}: {list(state[k].shape)} given, {list(own[k].shape)} needed"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    lost, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if wrong or lost or unknown:
        what = wrong or [f"missing {k}" for k in lost] or [f"unknown {k}" for k in unknown]
        raise WeightsError(
            f"{source} does not fit this policy ({what[0]}; {len(wrong) + len(lost) + len(unknown)} in all); "
            "choose the policy=... that it was trained with"
        )
