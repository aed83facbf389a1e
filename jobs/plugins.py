"""What a configuration names and a worker makes in its own process: prompt sources and reward terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jobs.config import RewardRoleConfig, TermConfig
from rewards.contract import RewardBatch, RewardError, read_source, resolve
from rewards.terms import Term
from rl.judges import SHARED
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


def make_terms(specs: Mapping[str, Mapping[str, Any]], sources: Mapping[str, str | None] | None = None) -> list[Term]:
    """The reward terms of the configuration; see `read_terms`.

    sources: by term the text of its file (`read_sources`), for a process that cannot read it. Raises RewardError naming
    the term that cannot be made, whatever its constructor raised.
    """
    return [
        Term(name, _make(name, t, (sources or {}).get(name)), t.weight, t.role, t.floor, tuple(t.range))
        for name, t in read_terms(specs).items()
    ]


def _make(name: str, term: TermConfig, source: str | None) -> Callable[[RewardBatch], Any]:
    try:
        if not isinstance(term.fn, str):
            return instantiate(term.fn)
        fn = resolve(term.fn, source)
        if isinstance(fn, type):
            return fn(**term.args)
        return partial(fn, **term.args) if term.args else fn
    except Exception as error:  # a user's constructor may raise anything
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        text = str(cause) if isinstance(cause, RewardError) else f"{type(cause).__name__}: {cause}"
        raise RewardError(f"rewards.{name} cannot be made: {' '.join(text.split())}") from error


def read_sources(terms: Mapping[str, TermConfig]) -> dict[str, str | None]:
    """By term the text of the file that `fn` names, None where it names none; RewardError where it is missing."""
    return {name: read_source(term.fn) if isinstance(term.fn, str) else None for name, term in terms.items()}


def read_terms(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, TermConfig]:
    """Checks every entry against TermConfig; RewardError naming the key that is unknown or wrong.

    Paths of files become absolute.
    """
    terms = {}
    for name, spec in specs.items():
        try:
            term = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TermConfig), spec))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise RewardError(f"rewards.{name}: {str(error).splitlines()[0]}") from error
        if term.args and not isinstance(term.fn, str):
            raise RewardError(f"rewards.{name}.args goes with a function or class named by a string, not with _target_")
        if len(term.range) != 2:
            raise RewardError(f"rewards.{name}.range must be [worst, best], not {term.range}")
        Term(name, None, term.weight, term.role, term.floor, tuple(term.range))  # raises what it will in a worker
        file, _, function = term.fn.rpartition(":") if isinstance(term.fn, str) else ("", "", "")
        terms[name] = (
            replace(term, fn=f"{Path(file).expanduser().resolve()}:{function}") if file.endswith(".py") else term
        )
    return terms


def read_fleets(
    terms: Mapping[str, TermConfig], shared: RewardRoleConfig
) -> dict[str, tuple[list[str], RewardRoleConfig]]:
    """The fleets that judge: by name the terms in each, and its settings; always SHARED, which has those of `shared`.

    Raises RewardError naming the setting that is unknown, wrong, or given differently by terms of one fleet.
    """
    members: dict[str, list[str]] = {SHARED: []}
    for name, term in terms.items():
        members.setdefault(term.fleet or f"rewards.{name}", []).append(name)
    fleets = {}
    for fleet, names in members.items():
        settings = OmegaConf.structured(shared)
        given: dict[str, Any] = {}
        for name in names:
            for key, value in terms[name].worker.items():
                if fleet == SHARED:
                    raise RewardError(f"rewards.{name}.worker: the fleet {SHARED!r} is that of cluster.{SHARED}; set "
                                      f"rewards.{name}.fleet=null for one of its own")  # fmt: skip
                if given.setdefault(key, value) != value:
                    raise RewardError(
                        f"rewards.{name}.worker.{key}={value}: the fleet {fleet!r} has {given[key]} already"
                    )
            try:
                settings = OmegaConf.merge(settings, terms[name].worker)
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                raise RewardError(f"rewards.{name}.worker: {str(error).splitlines()[0]}") from error
        fleets[fleet] = names, OmegaConf.to_object(settings)
        if fleets[fleet][1].batch_size is not None and fleets[fleet][1].batch_size < 1:
            raise RewardError(f"fleet {fleet!r}: batch_size={fleets[fleet][1].batch_size} must be at least 1")
    return fleets
