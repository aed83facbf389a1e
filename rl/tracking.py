"""MLflow tracking that cannot hurt a training.

    log(), log_strip(), ...  --append-->  spool/records.jsonl  --one thread-->  MLflow

Callers only append to a local file. A thread carries the records to the server in order and empties the file. While the
server is away the records wait there, across a restart of the process too, so an outage, a crash and normal operation
are one and the same path. Every connection starts by reading the last step of each metric, and a metric whose step is
not later is dropped: neither a resumed training nor a repeated delivery writes a step twice.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import tempfile
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

log = logging.getLogger(__name__)

SPOOL_LIMIT = 64 * 2**20
"""Bytes of undelivered records; what does not fit is lost and counted."""


class TrackingError(ValueError):
    """A name that MLflow does not take, or a required server that does not answer."""


class Tracking:
    """One MLflow run. Made by `open`; used as a context manager it sets the run's status from the exception.

    run_id: the run's id, None until the server was reached for the first time; belongs in the checkpoint manifest.
    failures: failed attempts to reach the server plus records lost for good; 0 in a healthy run.
    """

    def __init__(self, uri: str | None, experiment: str, run_id: str | None, params: dict[str, Any],
                 tags: dict[str, str], spool: Path, retry_s: float) -> None:  # fmt: skip
        self.uri, self.experiment, self.run_id, self.failures = uri, experiment, run_id, 0
        self._params, self._tags, self._spool, self._retry_s = params, tags, spool, retry_s
        self._client: Any = None  # None: not connected
        self._last: dict[str, int] = {}  # metric -> the last step the server has
        self._announced = self._ended = self._hurry = self._loss_told = self._outage_told = False
        self._misses, self._trouble = 0, "it takes too long"  # failed attempts, and what the last one said
        self._status: str | None = None  # set by close(): the thread's order to finish
        self._changed = threading.Condition()
        if uri is not None:
            spool.mkdir(parents=True, exist_ok=True)
            self._known = spool / "run_id"  # of a process that was killed before its first checkpoint
            # Unbuffered, so that what a write left undone is known at once and overwritten by the next one.
            self._file = os.fdopen(os.open(spool / "records.jsonl", os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
            self._end, self._sent = self._file.read().rfind(b"\n") + 1, 0
            if run_id is None and self._known.exists():
                self.run_id = self._known.read_text()
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    @classmethod
    def open(cls, uri: str | None, experiment: str, run_id: str | None = None, *, params: dict[str, Any],
             tags: dict[str, str], required: bool, spool: Path, timeout: float = 30, retry_s: float = 60,
             ) -> Tracking:  # fmt: skip
        """Creates a run, or reopens run_id (from the checkpoint manifest; None: the spool's last one) to go on with it.

        uri: an MLflow tracking URI; artifacts of a sqlite store go to `mlruns` beside its file. None tracks nothing.
        params: the configuration, nested; logged flat as the run's params when it is created, and as the artifact
        `config/segment_<k>.yaml` each time it is opened. tags: of the run; a resume adds them as `resume.<k>.<tag>`.
        spool: folder for undelivered records. timeout: s to wait for a required server. retry_s: longest pause between
        attempts later on, s.
        Raises TrackingError when `required` and the server does not answer in time; else the training goes on without.
        """
        tracking = cls(uri, experiment, run_id, params, tags, Path(spool), retry_s)
        if uri is None:
            return tracking
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # s; MLflow's own is 120, and that 7 times
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        import mlflow  # noqa: F401  (here, as two threads must not import at the same time)

        tracking._thread.start()
        with tracking._changed:
            tracking._changed.wait_for(lambda: tracking._client or (tracking._misses and not required), timeout)
            if tracking._client is None and required:
                tracking._status = "FAILED"
                tracking._changed.notify_all()
                raise TrackingError(f"the MLflow server at tracking.uri={uri} does not answer ({tracking._trouble}); "
                                    "start it, change tracking.uri, or set tracking.required=false")  # fmt: skip
            if tracking._client is None:
                tracking._tell_outage()
        return tracking

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends and returns. NaN is kept, infinity becomes MLflow's largest number. A bad name is a TrackingError."""
        for name in metrics:
            _check_name(name)
        self._put("metrics", step, metrics={name: float(value) for name, value in metrics.items()})

    def log_video(self, name: str, path: Path, step: int) -> None:
        """Stores an mp4 as the artifact `videos/step_<step>/<name>.mp4`; the file must stay until it is delivered."""
        _check_name(name)
        self._put("file", step, path=str(Path(path).resolve()), target=f"videos/step_{step:06d}/{name}.mp4")

    def log_strip(self, name: str, image: np.ndarray, step: int) -> None:
        """Stores uint8 [H, W, 3] so that MLflow shows it in its image grid, with a slider over the steps."""
        _check_name(name)
        if self.uri is None:
            return
        path = self._spool.resolve() / f"{name.replace('/', '~')}-{step}.png"
        try:
            Image.fromarray(image).save(path)
        except OSError as error:
            self._lost(f"strip {name!r} of step {step}", error)
        else:
            self._put("strip", step, name=name.replace(":", "-"), path=str(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Stores a file or folder under `folder` of the run's artifacts, as it is when it is delivered."""
        path = Path(path).resolve()
        self._put("file", 0, path=str(path), target=posixpath.join(folder, path.name))

    def register(self, name: str, folder: Path, about: str) -> None:
        """Stores a folder as an artifact and enters it into the model registry, as the next version of `name`."""
        self.artifact(folder)
        self._put("version", 0, name=name, target=Path(folder).name, about=about)

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run; a later value replaces an earlier one."""
        _check_name(name)
        self._put("tag", 0, name=name, value=value[:5000])

    def flush(self, timeout: float) -> bool:
        """Waits until all is delivered; False if that takes over timeout seconds, or at once when an attempt fails."""
        if self.uri is None:
            return True
        with self._changed:
            before, self._hurry = self._misses, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._sent == self._end or self._misses > before, timeout)
            return self._sent == self._end

    def close(self, status: str = "FINISHED", timeout: float = 30) -> None:
        """Delivers what it can within timeout seconds and sets the run's status: FINISHED, FAILED or KILLED."""
        if self.uri is None or self._status:
            return
        with self._changed:
            self._status = status
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._ended:
            log.warning("tracking: what is not delivered stays in %s and is sent when the run is resumed", self._spool)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        if killed:  # by somebody who waits
            self.close("KILLED", timeout=5)
        else:
            self.close("FINISHED" if kind is None else "FAILED")

    def _put(self, kind: str, step: int, **fields: Any) -> None:
        if self.uri is None:
            return
        record = {"kind": kind, "step": step, "time_ms": int(time.time() * 1000), **fields}
        line = json.dumps(record).encode() + b"\n"
        with self._changed:
            try:
                if self._end + len(line) > SPOOL_LIMIT:
                    raise OSError(f"{self._spool} holds {self._end} bytes already")
                self._file.seek(self._end)
                if self._file.write(line) < len(line):
                    raise OSError(f"no space left in {self._spool}")
            except OSError as error:
                self._lost(f"{kind} of step {step}", error)
            else:
                self._end += len(line)
                self._changed.notify_all()

    def _lost(self, what: str, error: Exception) -> None:
        with self._changed:
            self.failures += 1
            if not self._loss_told:
                log.warning("tracking: lost %s: %s (further losses are only counted)", what, _one_line(error))
            self._loss_told = True

    def _tell_outage(self) -> None:
        log.warning("tracking: no answer from %s (%s); records wait in %s", self.uri, self._trouble, self._spool)
        self._outage_told = True

    def _work(self) -> None:
        """The thread: connects, delivers, waits; ends when a status is set and it has delivered all, or cannot."""
        pause = 1.0
        while not self._ended:
            try:
                if self._client is None:
                    self._connect()
                self._deliver()
                pause = 1.0
                with self._changed:
                    if self._outage_told:
                        log.warning("tracking: %s answers again, everything is delivered", self.uri)
                        self._outage_told = False
                    self._changed.wait_for(lambda: self._sent < self._end or self._status)
                    if self._sent == self._end:
                        self._client.set_terminated(self.run_id, self._status)
                        self._ended = True
            except Exception as error:  # whatever it is, the training goes on
                with self._changed:
                    self.failures += 1
                    self._misses += 1
                    self._trouble = _one_line(error)
                    if self._announced and not self._outage_told:  # before that, open() tells
                        self._tell_outage()
                    self._client, self._hurry = None, False
                    self._changed.notify_all()
                    if self._status:
                        return
                    self._changed.wait_for(lambda: self._hurry or self._status, pause)
                    pause = min(2 * pause, self._retry_s)

    def _connect(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(self.uri)
        run = None
        if self.run_id is not None:
            try:
                run = client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            if run is None or run.info.lifecycle_stage != "active":
                log.warning("tracking: %s has no run %s; a new run continues it", self.uri, self.run_id)
                self._tags, run = {**self._tags, "continues": self.run_id}, None
        if run is None:
            run = client.create_run(self._experiment_id(client))
            self.run_id, self._announced = run.info.run_id, False
            self._known.write_text(self.run_id)
        if not self._announced:
            self._announce(client)
        with self._changed:
            self._client, self._announced = client, True
            self._last = {metric.key: metric.step for metric in run.data.to_proto().metrics}
            self._changed.notify_all()

    def _experiment_id(self, client: Any) -> str:
        if found := client.get_experiment_by_name(self.experiment):
            return found.experiment_id
        beside = None
        if self.uri.startswith("sqlite:///"):  # MLflow's own choice is the working directory of whoever comes first
            beside = (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlruns").as_uri()
        return client.create_experiment(self.experiment, artifact_location=beside)

    def _announce(self, client: Any) -> None:
        """Params, tags, configuration and status of a segment; does no harm when repeated after failing half-way."""
        from mlflow.entities import Param, RunTag

        segment = len(client.list_artifacts(self.run_id, "config"))
        params = flatten(self._params) if segment == 0 else {}  # MLflow refuses to change a param
        prefix = f"resume.{segment}." if segment else ""
        tags = [RunTag(prefix + key, str(value)) for key, value in self._tags.items()]
        client.log_batch(self.run_id, params=[Param(key, value) for key, value in params.items()], tags=tags)
        client.update_run(self.run_id, status="RUNNING")
        client.log_text(self.run_id, yaml.safe_dump(self._params, sort_keys=False), f"config/segment_{segment}.yaml")

    def _deliver(self) -> None:
        while self._sent < self._end:
            chunk = os.pread(self._file.fileno(), min(self._end - self._sent, 2**20), self._sent)
            for line in chunk[: chunk.rfind(b"\n") + 1].splitlines(keepends=True):
                try:
                    self._send(json.loads(line))
                except Exception as error:
                    if not _hopeless(error):
                        raise
                    self._lost("a record", error)
                with self._changed:
                    self._sent += len(line)
                    if self._sent == self._end:
                        self._sent = self._end = 0
                        os.truncate(self._file.fileno(), 0)
                    self._changed.notify_all()

    def _send(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        step, time_ms = record["step"], record["time_ms"]
        if record["kind"] == "metrics":
            fresh = {name: value for name, value in record["metrics"].items() if step > self._last.get(name, -1)}
            self._client.log_batch(self.run_id, metrics=[Metric(k, v, time_ms, step) for k, v in fresh.items()])
            self._last |= dict.fromkeys(fresh, step)
        elif record["kind"] == "strip":
            with Image.open(record["path"]) as image:
                self._client.log_image(self.run_id, image, key=record["name"], step=step, timestamp=time_ms)
            os.unlink(record["path"])
        elif record["kind"] == "tag":
            self._client.set_tag(self.run_id, record["name"], record["value"])
        elif record["kind"] == "version":
            self._register(record)
        else:
            target = PurePosixPath(record["target"])
            with tempfile.TemporaryDirectory() as scratch:  # MLflow names an artifact after its file
                link = Path(scratch, target.name)
                link.symlink_to(Path(record["path"]).resolve(strict=True))
                self._client.log_artifact(self.run_id, str(link), str(target.parent).removeprefix(".") or None)

    def _register(self, record: dict[str, Any]) -> None:
        """Once per run and folder, however often it is delivered."""
        from mlflow.exceptions import MlflowException

        name, source = record["name"], f"{self._client.get_run(self.run_id).info.artifact_uri}/{record['target']}"
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if not [v for v in self._client.search_model_versions(f"name = '{name}'") if v.source == source]:
            self._client.create_model_version(name, source, self.run_id, description=record["about"])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}, with keys and lengths that MLflow takes as params."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[re.sub(r"[^\w\-. :/]", "_", f"{prefix}{key}", flags=re.ASCII)[:250]] = str(value)[:5999]
    return flat


def _check_name(name: str) -> None:
    clean = re.fullmatch(r"[\w\-. :/]{1,250}", name, re.ASCII) and posixpath.normpath(name) == name
    if not clean or name.startswith((".", "/")):
        raise TrackingError(f"MLflow does not take the name {name!r}; use letters, digits, _-. : and single slashes")


def _hopeless(error: Exception) -> bool:
    """True where trying again cannot help: the file is gone or damaged, or MLflow refuses the content."""
    refused = getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
    return refused or isinstance(error, FileNotFoundError | UnidentifiedImageError | json.JSONDecodeError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
