"""What every command has in common: Hydra composes a checked configuration; a user's mistake ends in one line, not in
a stack.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl.fleet import FleetError

log = logging.getLogger("dragline")
ROOT = Path(__file__).resolve().parents[1]
OmegaConf.register_new_resolver("repo", lambda path: str(ROOT / path), replace=True)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what to do."""


def require(rules: Iterable[tuple[object, str]]) -> None:
    """Raises ConfigError with the line of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def job(name: str, schema: type) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates `main(config: schema)` into a command that reads conf/<name>.yaml; unknown keys and wrong types are
    errors.

    ValueError (the base of all errors that a user can mend), OSError and FleetError become one line and exit status 1.
    """
    ConfigStore.instance().store(name=schema.__name__, node=schema)

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)
        def entry(config: DictConfig) -> None:
            torch.set_num_threads(1)
            cv2.setNumThreads(1)
            try:
                main(OmegaConf.to_object(config))
            except (ValueError, OSError, FleetError, OmegaConfBaseException) as error:
                log.debug("the error in full", exc_info=True)
                print(f"error: {str(error).strip()}", file=sys.stderr)
                sys.exit(1)

        return entry

    return decorate
