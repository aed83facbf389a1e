"""The checkpoints of one run: a local folder that is thinned out, and a copy of it at any fsspec URL if there is one.

    save:    checkpoint.save --> retention --> copies what the URL lacks, of each checkpoint the manifest last
    resolve: the newest of the folder and of the URL that is whole; from the URL it is copied, verified, then renamed

A copy without its manifest is none, so a kill in the middle of an upload leaves nothing that could be chosen.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from rl import checkpoint
from rl.checkpoint import MANIFEST, CheckpointError, Retention, kept

log = logging.getLogger(__name__)


class CheckpointStore:
    """root: the local folder. url: of the copy, such as s3://bucket/run, with the credentials that its fsspec backend
    finds in the environment; None: there is none. Raises CheckpointError where the URL cannot be reached."""

    def __init__(self, root: Path, retention: Retention, url: str | None = None) -> None:
        self.root, self.retention, self.copy = root, retention, Copy(url) if url else None

    def resolve(self, resume: str) -> tuple[Path | None, list[str]]:
        """As `checkpoint.resolve`, after a newer checkpoint of the URL has been copied here ("auto" alone)."""
        told = []
        if resume == "auto" and self.copy:
            newest = checkpoint.latest(self.root)[0]
            told = self.copy.pull(self.root, checkpoint.read_manifest(newest)["saved_at"] if newest else 0)
        folder, warnings = checkpoint.resolve(resume, self.root)
        return folder, [*told, *warnings]

    def save(self, step: int, write: Callable[[Path], None], manifest: dict[str, Any], best: int | None = None) -> None:
        """As `checkpoint.save`. best: a step that stays. A copy that fails is told and made up for with the next one:
        the checkpoint here is whole."""
        checkpoint.save(self.root, step, write, manifest)
        checkpoint.prune(self.root, self.retention, best)
        if self.copy:
            try:
                self.copy.push(self.root, self.retention, best)
            except CheckpointError as error:
                log.warning("step %d is saved in %s alone: %s", step, self.root, error)


class Copy:
    """url/step_<step>/ as in the folder."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self._reached():
            self.files, self.base = fsspec.url_to_fs(url)
            self.files.makedirs(self.base, exist_ok=True)
            self._manifests()

    def push(self, root: Path, retention: Retention, best: int | None) -> None:
        """Copies the folder's checkpoints that are missing or others there, then removes what need not stay."""
        with self._reached():
            there = {name: found["saved_at"] for name, found in self._manifests()[0].items()}
            for folder in sorted(root.glob("step_*")):
                manifest = checkpoint.read_manifest(folder)
                if there.get(folder.name) == manifest["saved_at"]:
                    continue
                self._remove(folder.name)
                for name in (*manifest["files"], MANIFEST):
                    target = f"{self.base}/{folder.name}/{name}"
                    self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self.files.put_file(str(folder / name), target)
            manifests, without = self._manifests()
            newest_first = sorted(manifests, key=lambda name: manifests[name]["saved_at"], reverse=True)
            for name in (set(newest_first) | without) - kept(newest_first, retention, best):
                self._remove(name)

    def pull(self, root: Path, saved_after: int) -> list[str]:
        """Copies the newest whole checkpoint that was saved after this time (ns) into the folder; a line for each that
        was not whole."""
        told = []
        with self._reached():
            manifests = {name: m for name, m in self._manifests()[0].items() if m["saved_at"] > saved_after}
            for name in sorted(manifests, key=lambda name: manifests[name]["saved_at"], reverse=True):
                partial = checkpoint.partial_folder(root, name)
                try:
                    for file in (*manifests[name]["files"], MANIFEST):
                        if not (partial / file).resolve().is_relative_to(partial.resolve()):
                            raise CheckpointError(f"its manifest names {file}, which lies outside of it")
                        (partial / file).parent.mkdir(parents=True, exist_ok=True)
                        self.files.get_file(f"{self.base}/{name}/{file}", str(partial / file))
                    checkpoint.verify(partial)
                except (CheckpointError, FileNotFoundError) as error:
                    told.append(f"{self.url}/{name} is passed over: {error}")
                    shutil.rmtree(partial)
                else:
                    checkpoint.publish(partial, root / name)
                    break
        return told

    def _manifests(self) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """By name the manifests that can be read, and the names of the rest."""
        self.files.invalidate_cache()
        found, without = {}, set()
        for path in self.files.ls(self.base, detail=False):
            if (name := path.rstrip("/").rpartition("/")[2]).startswith("step_"):
                try:
                    found[name] = checkpoint.parse_manifest(self.files.cat_file(f"{path}/{MANIFEST}"), f"{path}")
                except (CheckpointError, FileNotFoundError):
                    without.add(name)
        return found, without

    def _remove(self, name: str) -> None:
        folder = f"{self.base}/{name}"
        if self.files.exists(f"{folder}/{MANIFEST}"):
            self.files.rm_file(f"{folder}/{MANIFEST}")
        if self.files.exists(folder):
            self.files.rm(folder, recursive=True)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # each backend has its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(f"train.checkpoint_url={self.url} does not work ({reason}); mend it, or set it to "
                                  "null and keep checkpoints in run_dir alone") from error  # fmt: skip
