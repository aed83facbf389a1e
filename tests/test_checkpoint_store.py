"""Checkpoints that are copied to a URL: what is chosen, what stays, and what happens when the URL does not work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.torch import load_file
from test_checkpoint import flip_a_bit, value, weights

from rl import checkpoint
from rl.checkpoint import CheckpointError, Retention, verify
from rl.checkpoint_store import CheckpointStore


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def store(tmp_path: Path, there: Path) -> CheckpointStore:
    """Checkpoints of the steps 10, 20 and 30, and their copies."""
    store = CheckpointStore(tmp_path / "here", Retention(3), f"file://{there}")
    for step in (10, 20, 30):
        store.save(step, weights(step), {"run_id": "r1"})
    return store


def elsewhere(there: Path, name: str = "elsewhere") -> CheckpointStore:
    """The store as another machine finds it."""
    return CheckpointStore(there.parent / name, Retention(3), f"file://{there}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_another_machine_goes_on_from_the_copy(store, there):
    other = elsewhere(there)
    folder, told = other.resolve("auto")
    assert folder == other.root / "step_000030" and told == [] and value(folder) == 30
    assert verify(folder) == verify(store.root / "step_000030")
    assert other.resolve("none") == (None, [])


def test_memory_of_another_process_is_as_good_a_url_as_a_disk(tmp_path):
    store = CheckpointStore(tmp_path / "a", Retention(1), "memory://bucket/run")
    for step in (1, 2):
        store.save(step, weights(step), {})
    folder, _ = CheckpointStore(tmp_path / "b", Retention(1), "memory://bucket/run").resolve("auto")
    assert value(folder) == 2 and names(tmp_path / "b") == {"step_000002"}


def test_what_is_here_is_used_where_it_is_as_new(store, there):
    flip_a_bit(there / "step_000030")  # nobody looks
    assert store.resolve("auto") == (store.root / "step_000030", [])


def test_a_damaged_copy_is_told_and_the_one_before_is_taken(store, there):
    flip_a_bit(there / "step_000030")
    other = elsewhere(there)
    folder, (told,) = other.resolve("auto")
    assert value(folder) == 20 and "step_000030 is passed over" in told
    assert names(other.root) == {"step_000020"}


def test_a_manifest_that_names_files_elsewhere_is_passed_over(store, there):
    path = there / "step_000030/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["files"]["../../stolen"] = manifest["files"]["policy.safetensors"]
    manifest["digest"] = checkpoint._digest(manifest)  # whoever writes one can do that too
    path.write_text(json.dumps(manifest))
    shutil.copy(there / "step_000030/policy.safetensors", there.parent / "stolen")
    other = elsewhere(there)
    folder, (told,) = other.resolve("auto")
    assert value(folder) == 20 and "../../stolen, which lies outside of it" in told


def test_a_copy_whose_manifest_did_not_arrive_is_none(store, there):
    (there / "step_000030/manifest.json").unlink()
    folder, told = elsewhere(there).resolve("auto")
    assert value(folder) == 20 and told == []


def test_an_upload_cut_short_at_any_file_is_never_chosen_and_made_up_for(store, there, monkeypatch):
    put, left = LocalFileSystem.put_file, [0]

    def failing(self, *args, **options):
        if not left[0]:
            raise OSError("the network is gone")
        left[0] -= 1
        return put(self, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", failing)
    for allowed in range(3):  # two files and the manifest
        left[0] = allowed
        store.save(40 + allowed, weights(40 + allowed), {})
        folder, _ = elsewhere(there, f"at_{allowed}").resolve("auto")
        assert value(folder) == 30
    left[0] = 100
    store.save(43, weights(43), {})
    assert names(there) == names(store.root) == {"step_000041", "step_000042", "step_000043"}
    assert value(elsewhere(there).resolve("auto")[0]) == 43


def test_the_copy_is_thinned_out_by_the_same_rule(tmp_path, there):
    store = CheckpointStore(tmp_path / "here", Retention(2, every=20), f"file://{there}")
    for step in (10, 20, 30, 40, 50, 60):
        store.save(step, weights(step), {}, best=30)
    stay = {f"step_0000{step}" for step in (20, 30, 40, 50, 60)}
    assert names(there) == names(store.root) == stay


def test_a_step_that_is_saved_again_replaces_its_copy(store, there):
    store.save(30, weights(31), {})
    assert value(there / "step_000030") == 31


@pytest.mark.parametrize(
    "url, reason",
    [
        ("nowhere://bucket/run", "Protocol not known: nowhere"),
        ("file:///proc/version/run", "NotADirectoryError|FileExistsError"),
    ],
)
def test_a_url_that_does_not_work_is_told_before_anything_starts(tmp_path, url, reason):
    with pytest.raises(CheckpointError, match=rf"train\.checkpoint_url={url} does not work \(.*({reason})") as caught:
        CheckpointStore(tmp_path / "here", Retention(1), url)
    assert "\n" not in str(caught.value)


def test_a_copy_that_fails_later_is_told_and_the_training_goes_on(store, there, caplog):
    there.rename(there.with_name("away"))
    there.write_text("a file in the way")
    store.save(40, weights(40), {})
    assert "step 40 is saved in" in caplog.text and "train.checkpoint_url=file://" in caplog.text
    assert store.resolve("none") == (None, []) and value(store.root / "step_000040") == 40


def test_a_run_that_lost_its_machine_goes_on_from_the_url_to_the_same_weights(small_run, tmp_path):  # noqa: F811
    url = f"train.checkpoint_url=file://{tmp_path / 'there'}"
    more = ("tracking.uri=null", "evaluate.every=1", "train.keep_checkpoints=1", url)
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert run_job("train", *small_run, *more[:-1], f"run_dir={whole}", "train.iterations=3") == 0
    assert run_job("train", *small_run, *more, f"run_dir={first}", "train.iterations=2") == 0
    shutil.rmtree(first)
    assert run_job("train", *small_run, *more, f"run_dir={second}", "train.iterations=3") == 0
    name = "checkpoints/step_000003/policy.safetensors"
    again, never = load_file(second / name), load_file(whole / name)
    assert all((again[key] == never[key]).all() for key in never)
    histories = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, second)]
    assert [json.loads(line)["step"] for line in histories[1]] == [1, 2, 3]
    best = [json.loads((run / "checkpoints/step_000003/manifest.json").read_text())["best"] for run in (whole, second)]
    assert best[0] == best[1] and best[0]["step"] in (1, 2)
    assert {f"step_{best[0]['step']:06d}", "step_000003"} <= set(os.listdir(whole / "checkpoints"))
