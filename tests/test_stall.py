"""A run that waits says for what."""

from __future__ import annotations

import logging

import pytest

from benchmarks.sleepers import sleepers
from rl.loop import LoopSettings
from rl.stall import WATCHDOG, plain


def test_a_stall_names_the_phase_the_fleet_and_the_groups_that_are_under_way(ray_local, monkeypatch, caplog):
    settings = LoopSettings(0, 2, 6, 3, True, 5.0, False, 100, max_staleness=1)
    roles = {"rollout": (1.6, 1), "reward": (0.0, 1), "learner": (0.0, 1)}
    with sleepers("ray", roles) as run, caplog.at_level(logging.WARNING, "rl.stall"):
        monkeypatch.setattr(WATCHDOG, "after_s", 0.7)
        run(settings)
    # A machine that is slow may stall elsewhere too; here it must.
    told = [
        text for text in caplog.messages if text.startswith("iteration 1, rollout: nothing has come to an end for ")
    ]
    assert told, caplog.messages
    assert any("rollout[0].rollout(1, [6, 7, 8], 0) for " in text for text in told)
    assert any(text.endswith("queued: 1 for rollout") for text in caplog.messages)


def test_a_run_that_moves_on_tells_nothing(ray_local, monkeypatch, caplog):
    with sleepers("ray", {"rollout": (0.1, 1), "reward": (0.0, 1), "learner": (0.0, 1)}) as run:
        monkeypatch.setattr(WATCHDOG, "after_s", 30.0)
        run(LoopSettings(0, 4, 2, 1, True, 5.0, False, 100))
    assert not caplog.messages


@pytest.mark.parametrize(
    "arguments, text", [((3, range(2)), "3, ..."), (([1, 2], object()), "[1, 2], ..."), (("x" * 99, 1.5), "..., 1.5")]
)
def test_only_what_is_short_is_told(arguments, text):
    assert plain(arguments) == text
