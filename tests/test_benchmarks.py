"""Every benchmark runs at a tiny size on what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jobs_cases import small_run  # noqa: F401  (a fixture)

from benchmarks import (
    common,
    iteration,
    kv_cache,
    many_workers,
    one_forward,
    operators,
    overlap,
    prefix,
    run,
    weight_sync,
    whole_loop,
)
from benchmarks.sleepers import sleepers
from benchmarks.streaming import measure

ROOT = Path(__file__).parents[1]


def test_streaming_and_training_are_timed_at_a_tiny_size():
    rows = measure("tiny", videos=1)
    assert all(0 < row["p50"] <= row["p95"] for row in rows)
    assert [row["what"] for row in rows] == [
        "first_frame_s", "block_s", "rollout_s", "learn_s", "iteration_s", "pixel frames per s"]  # fmt: skip


def test_a_shape_that_is_not_there_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "14b"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("14b: the 1.3b shape takes a GPU, tiny runs anywhere")


@pytest.fixture(scope="module")
def small(small_run):  # noqa: F811
    """Overrides of the tiny policy and its reward, for benchmarks that choose their own groups and prompts."""
    return [o for o in small_run if not o.startswith("rollout.")]


def test_an_iteration_is_timed_and_its_frames_counted_for_every_select(small):
    rows = iteration.measure(1, (3,), dict.fromkeys(iteration.SELECTS, 1), *small)
    by_select = {row["select"]: row for row in rows}
    assert by_select.keys() == iteration.SELECTS.keys()
    assert [row["groups"] for row in rows] == [4, 1, 4, 4]
    assert all(row[phase] > 0 for row in rows for phase in iteration.PHASES)
    # 1 first frame; per block a trunk's 3 steps and context pass, 4 moved drags, 3 twigs from the selected step on.
    assert 1 + 4 * (3 + 4 + 3) * 2 < by_select["trunk"]["rollout_frames"] < 1 + 4 * (4 + 4 + 6) * 2
    assert by_select["all"]["rollout_frames"] == 3 * (4 * 3 + 3) * 2 + 1  # no context pass after the last block
    assert by_select["trunk"]["learn_frames"] < by_select["frame"]["learn_frames"] < by_select["all"]["learn_frames"]


def test_a_shared_prefix_is_generated_once(small):
    shared, own = prefix.measure(4, 1, *(o for o in small if o.startswith("policy.")))
    assert shared["rollout_s per group"] > 0 and shared["frames per group"] * 1.3 < own["frames per group"]


def test_one_forward_per_group_has_the_gradient_of_one_per_member(small):
    row = one_forward.measure("trunk", 4, 1, 1, *small)
    assert row["gradients differ by"] < 1e-5 and row["one forward_s"] > 0 and row["G forwards_s"] > 0


def test_the_time_of_a_rollout_and_an_update_is_divided_among_kinds_of_operators(small):
    rows = operators.measure("trunk", 3, 1, *small)
    assert [row["phase"] for row in rows] == ["rollout", "learner"]
    for row in rows:
        assert abs(sum(row[name] for name in (*operators.KINDS, operators.REST, operators.OUTSIDE)) - 1) < 1e-6
        assert row["matrix products"] > 0 and row["operators"] > 100 and row["cpu_s"] > 0
    assert operators.kind("aten::addmm") == "matrix products" and operators.kind("aten::mul") == operators.REST


def test_streaming_with_a_cache_equals_the_whole_history_with_fewer_frames(small):
    cache, whole = kv_cache.measure(2, 1, *(o for o in small if o.startswith("policy.")))
    assert cache["latents differ by"] < 1e-3 and cache["frames per video"] < whole["frames per video"]


@pytest.mark.slow
def test_the_loop_on_ray_is_timed_beside_its_mathematics(small_run, ray_local):  # noqa: F811
    rows = whole_loop.measure(1, *small_run, "cluster=local")
    assert [row["side"] for row in rows] == ["bare", "Ray"]
    assert all(row["cpu_s"] > 0 and row["wall_s"] > 0 for row in rows)


@pytest.mark.slow
def test_weights_reach_a_worker_and_the_way_is_timed_beside_a_copy(ray_local):
    rows = weight_sync.measure(1, 1, 1, ["object store"])
    assert [row["way"] for row in rows] == ["object store", "broadcast, gloo"]
    assert rows[0]["MB"] == rows[1]["MB"] > 0.1 and all(row["sync_s"] > row["copy_s"] > 0 for row in rows)


@pytest.mark.slow
def test_what_overlap_hides_and_what_the_loop_costs_are_measured_on_sleeping_workers(ray_local):
    roles = {"rollout": (0.1, 2), "reward": (0.0, 1), "learner": (0.2, 1)}
    with sleepers("ray", roles) as run:
        (apart, together), courses = overlap.measure(run, "tiny", 0.3, 4, 4)
    assert apart["learn_s"] >= 0.3 and apart["s per iteration"] >= 0.4 and together["hidden"] < 1.5
    assert len(overlap.draw(courses, range(4)).axes) == 2
    row = many_workers.scheduling(2, 4, 0.05, 3)
    assert row["nodes"] == 1 and row["s per iteration"] > row["of it sleep_s"] == 0.1
    rows = many_workers.growth(1, 2, 12)
    assert [row["iteration"] for row in rows] == [3, 6, 9, 10, 12] and rows[0]["grown by MB"] == 0


def test_results_are_written_with_the_figures_that_they_reach(tmp_path, monkeypatch):
    for module in (common, run):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    figures = [common.figure("speed", 1.4, ">= 1.3"), common.figure("cost", 1.4, "<= 1.3")]
    common.write("prefix", "What it is.", [{"side": "a", "s": 0.12345}], figures)
    assert "| a | 0.123 |" in (tmp_path / "prefix.md").read_text()
    assert "| speed | 1.4 | >= 1.3 | yes |" in run.summary() and "| cost | 1.4 | <= 1.3 | no |" in run.summary()


def test_a_benchmark_that_is_not_there_is_named():
    assert run.choose(["only=prefix,kv_cache"]) == ["prefix", "kv_cache"]
    assert {"iteration", "whole_loop"} <= {*run.choose([])}
    with pytest.raises(SystemExit, match=r"only=prefixes: give only=<names>, of iteration, prefix"):
        run.choose(["only=prefixes"])
