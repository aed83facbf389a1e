"""What every test process needs first: one thread per library, an importable torchvision; one Ray for the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import cv2
import pytest
import torch

from torchvision_cpu import ensure_torchvision

ensure_torchvision()
torch.set_num_threads(1)
cv2.setNumThreads(1)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private Ray with 2 CPUs whose workers can import the test modules."""
    from rl.ray_fleet import ray_session

    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    with ray_session("local", num_cpus=2, object_store_gb=0.5):
        yield
    os.environ["PYTHONPATH"] = before
