"""The reward doctor as a user starts it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from doctor_cases import VISIBLE_ONLY
from jobs_cases import run_job

SMALL = ["scenes=2", "replicas=2", "shown=1"]
CLASS = """
class Judge:
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, batch):
        return {"score": (self.gain * batch.video / 255).mean((2, 3, 4)).clip(0, 1), "seen": [1.0] * len(batch)}
"""


def check(folder, *overrides):
    """Exit status, and what was written for CI."""
    status = run_job("check_reward", *SMALL, f"run_dir={folder}", *overrides)
    return status, json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_the_shipped_rewards_pass_and_every_video_is_on_the_page(tmp_path, capsys):
    status, summary = check(tmp_path, "scenes=6")
    assert status == 0 and summary["passed"]
    shown = capsys.readouterr().out
    assert "PASSED" in shown and "over-saturation" in shown and "trajectory" in shown
    assert not [v for v in summary["verdicts"] if v["status"] == "fail"]
    mix = summary["terms"]["mix"]["scores"]
    assert mix["truth"] == max(mix.values()) and mix["NaN frame"] == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:video/mp4;base64,') == len(mix) == len(list((tmp_path / "videos").glob("*.mp4")))
    assert "http" not in page and all(name in page for name in mix)


def test_a_bad_reward_fails_and_the_hack_is_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(VISIBLE_ONLY)
    status, summary = check(tmp_path / "run", "rewards=none", f"+rewards.mine.fn={tmp_path / 'mine.py'}:judge")
    assert status == 2 and not summary["passed"]
    assert "FAILED mix: vanishing" in " ".join(capsys.readouterr().out.split())
    assert any(v["check"] == "vanishing" and v["status"] == "fail" for v in summary["verdicts"])


def test_a_reward_that_raises_is_reported_like_any_other_failure(tmp_path):
    (tmp_path / "mine.py").write_text("def judge(batch):\n    return 1 / 0\n")
    status, summary = check(tmp_path / "run", "rewards=none", f"+rewards.mine.fn={tmp_path / 'mine.py'}:judge")
    assert status == 2 and summary["verdicts"] == [
        {"subject": "mine", "check": "runs", "status": "fail", "text": "ZeroDivisionError: division by zero"}
    ]


def test_a_reward_beside_the_shipped_ones_is_compared_with_them(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(CLASS)
    monkeypatch.syspath_prepend(tmp_path)
    more = ("+rewards.mine.fn={_target_: own_module.Judge, gain: 0.5}", "+rewards.mine.weight=0.1")
    _, summary = check(tmp_path / "run", "rewards=none", *more)
    overlap = next(v for v in summary["verdicts"] if v["check"] == "overlap")["text"]
    assert all(name in overlap for name in ("trajectory", "background", "degradation"))
    assert set(summary["terms"]) == {"mine", "mix"}
    assert np.isfinite(list(summary["terms"]["mine"]["scores"].values())).all()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rewards=none"], "rewards: there is nothing to check"),
        (["+rewards.mix.fn=mine.py:judge"], "rewards.mix"),
        (["scenes=1"], "scenes=1"),
        (["replicas=1"], "replicas=1"),
        (["+rewards.mine.fn=no_such_module:judge"], "no_such_module"),
        (["+accept.mix.flickr=because"], "accept.mix.flickr"),
        (["+accept.mine.noise=because"], "accept.mine.noise"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, capsys, overrides, named):
    light = ["rewards=none", "+rewards.trajectory.fn={_target_: rewards.trajectory.Trajectory}"]
    first = [] if "rewards=none" in overrides else light
    assert run_job("check_reward", *SMALL, f"run_dir={tmp_path}", *first, *overrides) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
