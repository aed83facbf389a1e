"""What a configuration names and a worker makes in its own process: prompt sources and reward terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from rewards.contract import resolve
from rewards.terms import Term
from rollout.folder import FolderPrompts
from rollout.prompts import PromptSource
from rollout.sprites import SpriteWorld


def make_source(kind: str, path: str | None, world_seed: int, size: int, frames: int) -> PromptSource:
    if kind == "folder":
        return FolderPrompts(Path(path).resolve(), size, frames)
    return SpriteWorld(size, frames, seed=world_seed)


def make_terms(specs: dict[str, Any]) -> list[Term]:
    """fn is {_target_: class, ...} or the name of a function, "module:function" or "file.py:function"."""
    return [
        Term(name, resolve(t.fn) if isinstance(t.fn, str) else instantiate(t.fn), t.weight, t.role, t.floor)
        for name, t in specs.items()
    ]
