from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.checkpoint import CheckpointError, Retention, latest, prune, resolve, save, verify


def weights(step: int, size: int = 1000) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file({"w": torch.full((size,), float(step))}, folder / "policy.safetensors")
        (folder / "learner").mkdir()
        torch.save({"step": step, "pad": torch.zeros(size)}, folder / "learner" / "rank_0.pt")

    return write


def value(checkpoint: Path) -> float:
    return load_file(checkpoint / "policy.safetensors")["w"][0].item()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of the steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints", step, weights(step), {"run_id": "r1", "seed": 3})
    return tmp_path / "checkpoints"


def test_the_manifest_says_what_the_checkpoint_is_made_of(root: Path) -> None:
    folder, warnings = latest(root)
    assert (folder, warnings, value(folder)) == (root / "step_000030", [], 30.0)
    manifest = verify(folder)
    assert (manifest["step"], manifest["run_id"], manifest["seed"], manifest["format"]) == (30, "r1", 3, 1)
    assert set(manifest["files"]) == {"policy.safetensors", "learner/rank_0.pt"}
    assert set(manifest["versions"]) == {"dragline", "torch"}
    assert {path.name for path in root.iterdir()} == {"step_000010", "step_000020", "step_000030"}


def truncate(folder: Path) -> None:
    path = folder / "learner" / "rank_0.pt"
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    path = folder / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def change_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"r1"', '"r2"'))


DAMAGES = {
    "rank_0.pt has": truncate,
    "policy.safetensors is not what was saved": flip_a_bit,
    "policy.safetensors is missing": lambda folder: (folder / "policy.safetensors").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: os.truncate(folder / "manifest.json", 100),
    "manifest.json is not what was saved": change_the_manifest,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(root: Path, message: str) -> None:
    DAMAGES[message](root / "step_000030")
    folder, (warning,) = latest(root)
    assert value(folder) == 20.0
    assert message in warning and "step_000030" in warning and "\n" not in warning
    with pytest.raises(CheckpointError, match=message):
        resolve(root / "step_000030", root)


def test_resume_auto_refuses_to_start_afresh_beside_damaged_checkpoints(root: Path) -> None:
    for step in (10, 20, 30):
        flip_a_bit(root / f"step_{step:06d}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable: .*step_000030.*resume=none"):
        resolve("auto", root)


def test_resume_says_where_to_start(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("auto", root) == (root / "step_000030", [])
    assert resolve("auto", tmp_path / "new run") == (None, [])
    assert resolve("none", root) == (None, [])
    assert resolve(str(root / "step_000010"), root) == (root / "step_000010", [])
    monkeypatch.chdir(root)  # of this process alone: workers have others
    assert resolve("step_000010", root) == (root / "step_000010", [])
    for folder in (root, root.parent):
        with pytest.raises(CheckpointError, match=r"is a folder of checkpoints; name one, such as .*step_000030"):
            resolve(folder, root)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        resolve(tmp_path / "typo", root)


def test_a_run_taken_back_to_an_early_step_goes_on_from_its_new_branch(root: Path) -> None:
    save(root, 15, weights(15), {})
    assert latest(root)[0] == root / "step_000015"
    save(root, 30, weights(31), {})  # replaces the abandoned branch's
    assert value(latest(root)[0]) == 31.0
    prune(root, Retention(last=2))
    assert {path.name for path in root.iterdir()} == {"step_000015", "step_000030"}


def test_what_stays_are_the_last_ones_every_nth_and_the_best(root: Path) -> None:
    for step in (40, 50, 60):
        save(root, step, weights(step), {})
    prune(root, Retention(last=2, every=20), best=30)
    assert {path.name for path in root.iterdir()} == {f"step_0000{step}" for step in (20, 30, 40, 50, 60)}
    prune(root, Retention(last=1))
    assert {path.name for path in root.iterdir()} == {"step_000060"}


def test_a_manifest_key_of_the_callers_cannot_hide_one_of_ours(root: Path) -> None:
    with pytest.raises(CheckpointError, match="files"):
        save(root, 40, weights(40), {"files": {}})
    with pytest.raises(CheckpointError, match="FileExistsError"):
        save(root, 40, lambda folder: (folder / "manifest.json").touch(), {})


def test_an_exception_of_the_writer_passes_and_leaves_nothing_behind(root: Path) -> None:
    def write(folder: Path) -> None:
        weights(40)(folder)
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        save(root, 40, write, {})
    assert {path.name for path in root.iterdir()} == {"step_000010", "step_000020", "step_000030"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def by_safetensors(folder: Path) -> None:
    save_file({"w": torch.zeros(100_000)}, folder / "policy.safetensors")


def by_torch(folder: Path) -> None:
    torch.save(torch.zeros(100_000), folder / "rank_0.pt")


def by_python(folder: Path) -> None:
    (folder / "rank_0.json").write_bytes(bytes(400_000))


@pytest.mark.parametrize("write", [by_safetensors, by_torch, by_python])
def test_a_full_disk_is_one_clear_line_and_leaves_the_earlier_checkpoints(
    small_disk: Path, write: Callable[[Path], None]
) -> None:
    save(small_disk, 1, weights(1), {})
    with pytest.raises(CheckpointError, match=r"checkpoint .*step_000002 \(0.\d MB free\): .*make room") as caught:
        save(small_disk, 2, write, {})
    assert "\n" not in str(caught.value)
    del caught  # its traceback keeps torch's file open, and with it the space
    assert [path.name for path in small_disk.iterdir()] == ["step_000001"]
    assert value(latest(small_disk)[0]) == 1.0
    save(small_disk, 2, weights(2), {})  # room again
    assert value(latest(small_disk)[0]) == 2.0


SAVER = """
import sys
from pathlib import Path
from rl.checkpoint import save

def write(folder):
    (folder / "learner").mkdir()
    for name in ("policy.safetensors", "learner/rank_0.pt", "learner/rank_1.pt"):
        (folder / name).write_bytes(bytes([step % 251]) * int(sys.argv[3]))

for step in range(int(sys.argv[2]), 10**6):
    save(Path(sys.argv[1]), step, write, {})
    print(step, flush=True)
"""


def saver(root: Path, first: int, size: int, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVER, str(root), str(first), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_file_size_limit_is_one_clear_line_too(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    with saver(tmp_path, 1, 100_000, preexec_fn=limit) as process:
        _, errors = process.communicate(timeout=60)
    assert "CheckpointError: cannot write checkpoint" in errors.splitlines()[-1] and "File too large" in errors
    assert list(tmp_path.iterdir()) == []


def test_kill_9_at_any_moment_leaves_every_checkpoint_complete(tmp_path: Path) -> None:
    generator, told, partial = random.Random(0), 0, 0
    for _ in range(12):
        with saver(tmp_path, told + 1, 300_000) as process:
            told = int(process.stdout.readline())
            threading.Event().wait(generator.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        told = int(rest[-1]) if rest else told
        folder, warnings = latest(tmp_path)
        assert warnings == [] and verify(folder)["step"] in (told, told + 1)  # renamed, not told yet
        partial += any(path.name.startswith(".") for path in tmp_path.iterdir())
        for path in tmp_path.glob("step_*"):
            verify(path)
            if path != folder:
                shutil.rmtree(path)
    assert partial >= 3, "the kills did not hit a save under way"
    save(tmp_path, told + 2, weights(1), {})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_manifest_is_plain_json_that_a_user_can_read(root: Path) -> None:
    assert json.loads((root / "step_000010" / "manifest.json").read_text())["run_id"] == "r1"
