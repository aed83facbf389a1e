"""The benchmark that needs a GPU runs at a tiny size on what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.streaming import measure, table

ROOT = Path(__file__).parents[1]


def test_streaming_and_training_are_timed_at_a_tiny_size():
    found = measure("tiny", videos=1)
    assert found["pixel_frames_per_s"] > 0
    for name in ("first_frame_s", "block_s", "rollout_s", "learn_s"):
        assert 0 < found[name]["p50"] <= found[name]["p95"] and f"| {name} | " in table(found)


def test_a_shape_that_is_not_there_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "14b"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("14b: the 1.3b shape takes a GPU, tiny runs anywhere")
