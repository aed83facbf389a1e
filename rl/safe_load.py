"""Files of torch that are read as tensors and nothing else, whoever calls torch.load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only(*classes: type) -> Iterator[None]:
    """Inside the block every torch.load, a library's own included, builds tensors, plain values and the given classes.

    Raises ValueError where a file asks for anything else, before any of that has run.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise ValueError(f"a file of the checkpoint holds more than tensors and is not read: {reason}") from error
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
