"""The kill script itself, with one kill of the driver and of a worker of each fleet."""

from __future__ import annotations

import pytest
from jobs_cases import small_run  # noqa: F401  (a fixture)

from benchmarks.chaos import measure, same


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_training_ends_as_if_nobody_had_killed_it(small_run):  # noqa: F811
    smaller = [override for override in small_run if override.startswith(("policy.", "~", "+"))]
    rows, figures = measure(1, 9, *smaller, "+rewards.brightness.fleet=reward")
    assert [row["ended by"] for row in rows] == ["SIGKILL", "itself"]
    assert rows[1]["resumed from"] == rows[0]["saved"] and rows[1]["saved"] == 9
    assert [row["figure"] for row in figures if row["reached"] == "no"] == ["kills of the driver"]


def test_trainings_that_differ_in_one_metric_are_not_the_same(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, kl in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        folder = tmp_path / name / "checkpoints/step_000001"
        folder.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, folder / "policy.safetensors")
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "train/kl": {kl}, "time/learn": {len(name)}}}\n')
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")
    save_file({"w": torch.tensor([1.0, 1.1])}, tmp_path / "b/checkpoints/step_000001/policy.safetensors")
    assert not same(tmp_path / "a", tmp_path / "b")
