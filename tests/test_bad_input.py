"""What a user gets wrong ends in one line that names the key or file, a non-zero exit, and nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from imageio.v3 import imwrite
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)


def complaint(capsys, *overrides: str) -> str:
    """The one line that the training job prints before it exits with status 1."""
    capsys.readouterr()
    assert run_job("train", *overrides) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "override, named",
    [
        ("rollout.group_size=1", "rollout.group_size"),
        ("rollout.select=branch", "rollout.select"),
        ("rollout.explore=sideways", "rollout.explore"),
        ("rollout.prompts_per_task=7", "rollout.prompts_per_task"),
        ("rollout.prompts_per_task=0", "rollout.prompts_per_task=0"),
        ("learner.ranks=2", "learner.ranks"),
        ("learner.zero_stage=4", "learner.zero_stage"),
        ("learner.kl_target=0", "learner.kl_target"),
        ("learner.advantage_std=own", "learner.advantage_std"),
        ("learner.best_and_worst=99", "learner.best_and_worst"),
        ("policy.path=nowhere", "nowhere"),
        ("policy.weights=nowhere.safetensors", "nowhere.safetensors"),
        ("resume=nowhere", "nowhere"),
        ("prompts=folder", "prompts.path"),
        ("+rewards.mine.fm=x", "fm"),
        ("+rewards.mine.fn=no_such_module:judge", "no_such_module"),
    ],
)
def test_a_wrong_value_is_named(capsys, small_run, tmp_path, override, named):  # noqa: F811
    assert named in complaint(capsys, *small_run, f"run_dir={tmp_path}", "tracking.uri=null", override)


def test_an_unknown_key_is_an_error():
    done = subprocess.run([sys.executable, "-m", "jobs.train", "train.iteration=3"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "iteration" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "body, named",
    [
        ("raise OSError('judge is away')", "judge is away"),
        ("return [0.5]", "must return one score per clip, [2], or per frame, [2, 9], not [1]"),
        ("return batch.video", "not [2, 9, 32, 32, 3]"),
        ("batch.video.mean()", "not None; is a `return` missing?"),
        ("return [None, None]", "a score, where at least one number was expected"),
        ("return [float('inf'), 0.5]", "returned inf, outside its range 0..1"),
        ("return [7.0, 0.5]", "returned 7, outside its range 0..1; scale it, or declare its range"),
        ("return ['good', 'bad']", "score must be numbers, not list"),
        ("batch.video[:] = 0; return [0.5, 0.5]", "read-only"),
    ],
)
def test_a_reward_that_raises_or_miscounts_is_found_before_any_rollout(capsys, small_run, tmp_path, body, named):  # noqa: F811
    (tmp_path / "mine.py").write_text(f"def judge(batch):\n    {body}\n")
    more = (f"run_dir={tmp_path / 'run'}", "tracking.uri=null", f"+rewards.mine.fn={tmp_path / 'mine.py'}:judge")
    line = complaint(capsys, *small_run, *more)
    assert "rewards.mine" in line and named in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_declared_range_is_accepted_and_reaches_the_scores(small_run, tmp_path):  # noqa: F811
    (tmp_path / "mine.py").write_text("def judge(batch):\n    return [7.0] * len(batch)\n")
    more = (f"+rewards.mine.fn={tmp_path}/mine.py:judge", "+rewards.mine.range=[1,10]", "train.iterations=1")
    assert run_job("train", *small_run, f"run_dir={tmp_path}/run", "tracking.uri=null", *more) == 0
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["reward/mine"] == 7


@pytest.mark.parametrize(
    "spec, named",
    [
        ("{fn: {_target_: rewards.clip_scores.LaionAesthetic, head: gone.pth, weights: gone}}", "gone"),
        ("{fn: {_target_: rewards.guards.Background, scael: 1}}", "scael"),
        ("{fn: {_target_: rewards.guards.Backgruond}}", "Backgruond"),
        ("{fn: 'FILE:Judge', args: {weights: gone.safetensors}}", "No such file or directory: 'gone.safetensors'"),
        ("{fn: 'FILE:Judge', args: {wheights: x}}", "unexpected keyword argument 'wheights'"),
        ("{fn: 'FILE:judge'}", "did you mean 'Judge'?"),
        ("{fn: 'FILE:Judge', range: [1, 0]}", "range must be (worst, best)"),
    ],
)
def test_a_reward_that_cannot_be_made_is_named_with_the_reason(capsys, small_run, tmp_path, spec, named):  # noqa: F811
    (tmp_path / "mine.py").write_text(
        "class Judge:\n    def __init__(self, weights=None):\n        weights and open(weights)\n"
    )
    more = (
        f"run_dir={tmp_path / 'run'}",
        "tracking.uri=null",
        f"+rewards.mine={spec}".replace("FILE", str(tmp_path / "mine.py")),
    )
    line = complaint(capsys, *small_run, *more)
    assert "mine" in line and named in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_damaged_checkpoint_is_named_and_the_others_stay(capsys, small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    assert run_job("train", *small_run, f"run_dir={run}", "tracking.uri=null") == 0
    damaged = run / "checkpoints/step_000002/policy.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    line = complaint(capsys, *small_run, f"run_dir={run}", "tracking.uri=null", f"resume={damaged.parent}")
    assert "policy.safetensors" in line
    assert (run / "checkpoints/step_000001/manifest.json").exists()
    line = complaint(capsys, *small_run, f"run_dir={run}", "tracking.uri=null", f"policy.weights={damaged}")
    assert str(damaged) in line


def write_folder(path, tracks, image="cat.png"):
    path.mkdir()
    imwrite(path / "cat.png", np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    (path / "notes.png").write_text("not a picture")
    (path / "prompts.jsonl").write_text(json.dumps({"image": image, "text": "", "tracks": tracks}) + "\n")


LINE = [[[10.0 + t, 20.0] for t in range(9)]]


@pytest.mark.parametrize(
    "tracks, image, named",
    [
        (LINE, "notes.png", "notes.png"),
        (LINE, "gone.png", "gone.png"),
        ([[[10.0, 20.0]] * 5], "cat.png", "9"),
        ([[[100.0, 20.0]] * 9], "cat.png", "prompts.jsonl:1"),
        ([[[float("nan"), 20.0]] * 9], "cat.png", "prompts.jsonl:1"),
    ],
)
def test_a_bad_picture_or_drag_is_named_with_its_line(capsys, small_run, tmp_path, tracks, image, named):  # noqa: F811
    write_folder(tmp_path / "mine", tracks, image)
    more = ("prompts=folder", f"prompts.path={tmp_path / 'mine'}", f"run_dir={tmp_path / 'run'}", "tracking.uri=null")
    line = complaint(capsys, *small_run, *more)
    assert named in line and "prompts.jsonl:1" in line


def test_a_folder_of_own_pictures_trains_and_generates(small_run, tmp_path):  # noqa: F811
    write_folder(tmp_path / "mine", LINE)
    more = ("prompts=folder", f"prompts.path={tmp_path / 'mine'}", "tracking.uri=null", "evaluate.prompts=1")
    assert run_job("train", *small_run, *more, f"run_dir={tmp_path / 'run'}", "train.iterations=1") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["heldout"]["canary"]["quality"] == {}, "without a rendered truth there is no error against it"
    assert run_job("generate", *small_run, *more, f"run_dir={tmp_path / 'made'}") == 0
    assert len(list((tmp_path / "made/videos").glob("*.mp4"))) == 1


def test_a_disk_that_fills_while_saving_leaves_the_earlier_checkpoints(small_run, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    more = [*small_run, f"run_dir={run}", "tracking.uri=null"]
    assert run_job("train", *more, "train.iterations=1") == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*"))
    # No file may grow beyond 64 KiB: what a full disk or a quota says, without filling one.
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "_", sys.executable, "-m", "jobs.train", *more]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: cannot write checkpoint") and "earlier checkpoints are intact" in line
    assert sorted((p, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*")) == before
