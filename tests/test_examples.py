"""The examples that the README shows run as they are."""

from __future__ import annotations

import json
from pathlib import Path

from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from tiny import SETTINGS

from rollout.folder import FolderPrompts

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_reward_of_the_readme_trains(small_run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(EXAMPLES.parent)
    more = ("+rewards.calm.fn=examples/my_reward.py:calm", "+rewards.calm.weight=0.2", "train.iterations=1")
    assert run_job("train", *small_run, *more, f"run_dir={tmp_path / 'run'}", "tracking.uri=null") == 0
    assert 0 <= json.loads((tmp_path / "run/metrics.jsonl").read_text())["reward/calm"] <= 1
    shown = (EXAMPLES.parent / "README.md").read_text()
    body = (EXAMPLES / "my_reward.py").read_text().split("\n\n\n")[1].strip()
    assert body in shown, "the README shows another reward than examples/my_reward.py"


def test_the_example_drags_are_valid_prompts():
    source = FolderPrompts(EXAMPLES / "drags", SETTINGS.size * 2, 13)
    assert source.has_heldout
    assert source.prompt("train", 0).tracks.shape[0] == 13
