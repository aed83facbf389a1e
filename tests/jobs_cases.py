"""Running a job in the test's own process, on the smallest policy and with a reward that is always informative."""

from __future__ import annotations

import importlib
import sys

import pytest

REWARD = "def brightness(batch):\n    return (batch.video / 255.0).mean((2, 3, 4))\n"
SMALL = [
    "cluster=inline",
    "~rewards.trajectory",
    "~rewards.background",
    "~rewards.degradation",
    "evaluate.prompts=3",
    "evaluate.batch=2",
    "evaluate.strips=1",
    "train.iterations=2",
    "learner.decay_iterations=4",
    "train.checkpoint_every=1",
    "rollout.prompts_per_iteration=2",
    "rollout.prompts_per_task=1",
    "rollout.group_size=3",
]


def run_job(name: str, *overrides: str) -> int:
    """The exit status of `python -m jobs.<name> overrides`, run here."""
    before = sys.argv
    sys.argv = [f"jobs.{name}", *overrides]
    try:
        importlib.import_module(f"jobs.{name}").main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Overrides of a run that takes seconds: a tiny random policy and the reward above."""
    from tiny import tiny_policy

    home = tmp_path_factory.mktemp("small")
    tiny_policy().save(home / "policy")
    (home / "brightness.py").write_text(REWARD)
    return [*SMALL, f"policy.path={home / 'policy'}", f"+rewards.brightness.fn={home / 'brightness.py'}:brightness"]
