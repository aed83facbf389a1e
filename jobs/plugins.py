"""What a configuration names and a worker makes in its own process: prompt sources and reward terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jobs.config import TermConfig
from rewards.contract import RewardError, resolve
from rewards.terms import Term
from rollout.folder import FolderPrompts
from rollout.prompts import PromptSource
from rollout.sprites import SpriteWorld
from rollout.tables import TablePrompts


def make_source(kind: str, path: str | None, world_seed: int, size: int | tuple[int, int], frames: int) -> PromptSource:
    if kind == "folder":
        return FolderPrompts(Path(path).resolve(), size, frames)
    if kind == "table":
        return TablePrompts(Path(path).resolve(), size, frames, world_seed)
    return SpriteWorld(size, frames, seed=world_seed)


def make_terms(specs: Mapping[str, Mapping[str, Any]]) -> list[Term]:
    """The reward terms of the configuration; see `read_terms`."""
    return [
        Term(name, resolve(t.fn) if isinstance(t.fn, str) else instantiate(t.fn), t.weight, t.role, t.floor)
        for name, t in read_terms(specs).items()
    ]


def read_terms(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, TermConfig]:
    """Checks every entry against TermConfig; RewardError naming the key that is unknown or wrong.

    Paths of files become absolute, so that a worker elsewhere finds them too.
    """
    terms = {}
    for name, spec in specs.items():
        try:
            term = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TermConfig), spec))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise RewardError(f"rewards.{name}: {str(error).splitlines()[0]}") from error
        file, _, function = term.fn.rpartition(":") if isinstance(term.fn, str) else ("", "", "")
        terms[name] = replace(term, fn=f"{Path(file).resolve()}:{function}") if file.endswith(".py") else term
    return terms
