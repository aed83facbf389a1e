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
    told = caplog.messages[0]
    assert told.startswith("iteration 0, rollout: nothing has come to an end for 1 s; under way: ")
    assert "rollout[0].rollout(0, [0, 1, 2], 0) for 1 of 600 s" in told and told.endswith("queued: 3 for rollout")


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
