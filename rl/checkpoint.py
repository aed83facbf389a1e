"""Checkpoints that are whole or not there: written beside, fsynced, hashed, renamed.

    checkpoints/step_000020/manifest.json         format, step, versions, sha256 of every file, what the caller adds
                            policy.safetensors    and whatever else the caller's `write` puts there
    checkpoints/.partial_step_000040/             a save under way, or what a kill left of one: the next save removes it

A kill at any moment leaves every folder `step_*` complete. Damage that comes later (a truncated copy, a flipped bit) is
found by the hashes, and `latest` falls back to the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

FORMAT = 1
MANIFEST = "manifest.json"
_PARTIAL, _REMOVED = ".partial_", ".removed_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names the folder or file and says what to do."""


@dataclass(frozen=True)
class Retention:
    """What stays: the `last` checkpoints saved last, and of all others those of every `every`-th step (None: none)."""

    last: int
    every: int | None = None


def kept(newest_first: Sequence[str], retention: Retention, best: int | None = None) -> set[str]:
    """Of checkpoints' names those that stay. best: a step that stays whatever its age."""
    stay = set(newest_first[: retention.last])
    for name in newest_first:
        step = int(name.removeprefix("step_"))
        if step == best or (retention.every and step % retention.every == 0):
            stay.add(name)
    return stay


def save(root: Path, step: int, write: Callable[[Path], None], manifest: dict[str, Any]) -> Path:
    """Writes `root/step_<step>` and returns it; a checkpoint of the same step is replaced once the new one is complete.

    write: fills the (empty) folder it is given, with subfolders as it likes; on return nobody writes there any more.
    manifest: JSON values that the caller wants back, the run id among them.
    Where it cannot be written (full disk, quota, a lost worker) the partial folder is removed, all else is left as it
    was, and CheckpointError is raised. Any other exception of `write` passes, after the same clean-up.
    """
    reserved = {"format", "step", "saved_at", "versions", "files", "digest"} & manifest.keys()
    if reserved:
        raise CheckpointError(f"manifest keys {sorted(reserved)} are checkpoint.save's own; rename the caller's")
    folder = root / f"step_{step:06d}"
    try:
        partial = partial_folder(root, folder.name)
        write(partial)
        _write_manifest(partial, step, manifest)
        publish(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by RuntimeError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        free = f"{shutil.disk_usage(root).free / 1e6:.1f} MB free" if root.exists() else "no such folder"
        raise CheckpointError(f"cannot write checkpoint {folder} ({free}): {reason}; earlier checkpoints are intact; "
                              "make room or choose another run_dir, then resume") from error  # fmt: skip
    finally:
        shutil.rmtree(root / f"{_PARTIAL}{folder.name}", ignore_errors=True)
    return folder


def partial_folder(root: Path, name: str) -> Path:
    """An empty folder in which the checkpoint `root/name` comes together; what earlier ones left is removed."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    partial = root / f"{_PARTIAL}{name}"
    partial.mkdir()
    return partial


def publish(partial: Path, folder: Path) -> None:
    """Gives a complete checkpoint its name, in place of another that has it."""
    if folder.exists():
        folder.rename(folder.with_name(f"{_REMOVED}{folder.name}"))
    partial.rename(folder)
    _fsync(folder.parent)
    _remove_leftovers(folder.parent)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte is as written. Raises CheckpointError naming the first defect."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; use another checkpoint")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise CheckpointError(f"{folder}: {name} has {size} bytes, not {expected['bytes']}; use another checkpoint")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{folder}: {name} is not what was saved (sha256 differs); use another checkpoint")
    return manifest


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint saved last whose hashes verify, and a line for each damaged one that was passed over.

    "Last" is the order of saving, not of steps: a run taken back to an early step goes on from its new branch.
    """
    folders, unreadable = _by_age(root)
    warnings = list(unreadable.values())
    for folder in folders:
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.append(str(error))
        else:
            return folder, warnings
    return None, warnings


def resolve(resume: str | Path, root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, if any, and `latest`'s warnings.

    resume: "auto" (the latest in root, none in a new run), "none", or the folder of a checkpoint.
    Raises CheckpointError where the named one is damaged, or where "auto" finds damaged ones only: starting afresh
    would overwrite the run.
    """
    if resume == "none":
        return None, []
    if resume == "auto":
        folder, warnings = latest(root)
        if folder is None and warnings:
            raise CheckpointError(f"no checkpoint in {root} is usable: {warnings[0]}; resume=none starts afresh")
        return folder, warnings
    folder = Path(resume).resolve()  # for workers elsewhere
    if not (folder / MANIFEST).exists() and (inside := _by_age(folder)[0] or _by_age(folder / "checkpoints")[0]):
        raise CheckpointError(f"resume={resume} is a folder of checkpoints; name one, such as {inside[0]}")
    verify(folder)
    return folder, []


def prune(root: Path, retention: Retention, best: int | None = None) -> None:
    """Removes what need not stay; checkpoints without a readable manifest count as the oldest."""
    folders, unreadable = _by_age(root)
    names = [folder.name for folder in (*folders, *unreadable)]
    for name in {*names} - kept(names, retention, best):
        # Renamed first: a kill in the middle leaves no half of it under its name.
        (root / name).rename(root / f"{_REMOVED}{name}")
    _remove_leftovers(root)


def _write_manifest(folder: Path, step: int, extra: dict[str, Any]) -> None:
    """Fsyncs everything in the folder and lists it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        _fsync(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    manifest = {
        **json.loads(json.dumps(extra)),  # as it will be read, so that the digest is the same then
        "format": FORMAT,
        "step": step,
        "saved_at": time.time_ns(),
        "versions": {name: version(name) for name in ("dragline", "torch")},
        "files": files,
    }
    manifest["digest"] = _digest(manifest)
    path = folder / MANIFEST
    with path.open("x") as file:  # `write` has no business with this name
        file.write(json.dumps(manifest, indent=2) + "\n")
    _fsync(path)
    _fsync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `save` was given and added, without a look at the files. Raises CheckpointError where it is damaged."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}; use another checkpoint") from error
    return parse_manifest(text, str(folder))


def parse_manifest(text: bytes, folder: str) -> dict[str, Any]:
    """The manifest of the checkpoint `folder`, wherever that is. Raises CheckpointError where it is damaged."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{folder}/{MANIFEST} cannot be read: {error}; use another checkpoint") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        raise CheckpointError(f"{folder}/{MANIFEST} is not what was saved; use another checkpoint")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest['format']}, this version reads {FORMAT}; "
                              f"use dragline {manifest['versions']['dragline']}")  # fmt: skip
    return manifest


def _by_age(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """The checkpoints of a folder, those saved last first, and those without a readable manifest, with the reason."""
    saved_at, unreadable = {}, {}
    for folder in sorted(root.glob("step_*")):
        try:
            saved_at[folder] = read_manifest(folder)["saved_at"]
        except CheckpointError as error:
            unreadable[folder] = str(error)
    return sorted(saved_at, key=saved_at.get, reverse=True), unreadable


def _remove_leftovers(root: Path) -> None:
    for prefix in (_PARTIAL, _REMOVED):
        for folder in root.glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
