"""The folder of one run: what a training leaves on disk and what a resume starts from."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

RECORDS = ("metrics.jsonl", "watch/evaluations.jsonl")


class RunFolderError(ValueError):
    """A run folder that cannot be written or read; one line that names the file and says what to do."""


class RunFolder:
    """outputs/<job>/<timestamp>/{config.yaml, metrics.jsonl, checkpoints/, videos/, report.html, summary.json, lock}.

    config.yaml is the configuration of the latest start; config/segment_<k>.yaml are those before and after a change.
    metrics.jsonl holds one object per iteration: {"step": 3, "train/kl": 0.01, ...}, null where a value is not finite.
    Every method raises RunFolderError where the disk does not do what it should.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / "config.yaml", path / "metrics.jsonl", path / "summary.json"
        self.segments = path / "config"
        self.checkpoints, self.videos, self.report = path / "checkpoints", path / "videos", path / "report.html"

    @classmethod
    def create(cls, root: str | Path, job: str) -> RunFolder:
        """A new folder `<root>/<job>/<timestamp>`, to which `<root>/<job>/latest` then points."""
        home, stamp = Path(root) / job, time.strftime("%Y-%m-%d_%H-%M-%S")
        with _disk(home):
            home.mkdir(parents=True, exist_ok=True)
            for number in range(1, 1000):  # two runs may start within a second
                path = home / (stamp if number == 1 else f"{stamp}_{number}")
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            link = home / f".latest-{path.name}"
            link.symlink_to(path.name)
            link.replace(home / "latest")
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder at path; what is missing of it is made."""
        folder = cls(Path(path))
        for part in (folder.checkpoints, folder.videos):
            with _disk(part):
                part.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def at(cls, run_dir: str | Path | None, job: str) -> RunFolder:
        """The folder run_dir, or a new one under ./outputs where it is None; absolute, for workers elsewhere."""
        return cls.open(Path(run_dir).resolve()) if run_dir else cls.create(Path("outputs").resolve(), job)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within the block no other process may take the folder; raises RunFolderError where one has. The system ends
        it with the process, however that ends. Disks that know no locks are not guarded."""
        lock = FileLock(path := self.path / "lock", timeout=0, fallback_to_soft=False)
        with _disk(path):
            try:
                lock.acquire()
            except Timeout as error:  # an OSError too
                told = f"run_dir={self.path} is in use by another process; choose another run_dir"
                raise RunFolderError(told) from error
            except NotImplementedError:
                log.warning("run_dir=%s cannot be locked: see to it that no other process writes there", self.path)
        try:
            yield
        finally:
            lock.release()

    def write_config(self, text: str) -> None:
        """Of this start; a new segment if the one before had another."""
        write_atomically(self.config, text)
        segments = sorted(self.segments.glob("segment_*.yaml"), key=lambda path: int(path.stem.split("_")[1]))
        if not segments or segments[-1].read_text() != text:
            with _disk(self.segments):
                self.segments.mkdir(exist_ok=True)
            write_atomically(self.segments / f"segment_{len(segments)}.yaml", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.summary, json.dumps(_finite(summary), indent=2) + "\n")

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """One more line of metrics.jsonl; safe from a crash of this process, from one of the machine after `sync`."""
        line = json.dumps(_finite({"step": step, **metrics})) + "\n"
        with _disk(self.metrics), self.metrics.open("a") as file:
            file.write(line)

    def keep(self, checkpoint: Path) -> None:
        """Copies what a resume on another machine would miss into a checkpoint that is being written."""
        for name in RECORDS:
            if (self.path / name).exists():
                with _disk(checkpoint / name):
                    (checkpoint / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.path / name, checkpoint / name)

    def restore(self, checkpoint: Path) -> None:
        """Takes from a checkpoint what is missing here."""
        for name in RECORDS:
            if (checkpoint / name).exists() and not (self.path / name).exists():
                with _disk(self.path / name):
                    (self.path / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(checkpoint / name, self.path / name)

    def sync(self) -> None:
        """Forces metrics.jsonl to the disk; call it before each checkpoint, so that the log is never behind it."""
        with _disk(self.metrics), self.metrics.open("a") as file:
            os.fsync(file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drops what lies after `step`, and a last line that a crash cut short, so that a resume repeats no step."""
        if self.metrics.exists():
            kept = [json.dumps(record) + "\n" for record in self.history() if record["step"] <= step]
            write_atomically(self.metrics, "".join(kept))

    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in order, without a last line that was cut short."""
        if not self.metrics.exists():
            return []
        with _disk(self.metrics):
            lines = self.metrics.read_text(errors="replace").splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith("\n"):
                break
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RunFolderError(f"{self.metrics}:{number}: not JSON ({error}); remove the line") from None
        return records


def write_atomically(path: Path, text: str) -> None:
    """Writes beside, fsyncs and renames: a reader or a crash finds the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.tmp")
    with _disk(path):
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: {error.strerror or error}; free space or set run_dir to a folder you can write"
        ) from error


def _finite(value: Any) -> Any:
    """Plain numbers; JSON has no NaN and no infinity."""
    if hasattr(value, "item"):  # scalars of numpy and torch
        value = value.item()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
