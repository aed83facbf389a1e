"""One training run from its first measurement to its report: what surrounds the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rl import checkpoint
from rl.advantage import TermWeight
from rl.checkpoint_store import CheckpointStore
from rl.evaluation import compare
from rl.fleet import FleetError, ResultLost, fetch
from rl.hack_watch import HackWatch
from rl.heldout import HeldOut, measure
from rl.learner import join
from rl.loop import Clock, LoopSettings, train
from rl.pipeline import Fleets, synchronise
from rl.progress import Progress
from rl.report import figures, filmstrip, side_by_side, write_mp4, write_report
from rl.run_folder import RunFolder
from rl.stop import Stopped
from rl.tracking import Tracking
from rollout.records import Films

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """Where a run writes. system: samples the machines. fps: of its videos. config: goes into every checkpoint, for a
    resume to compare with.
    """

    folder: RunFolder
    tracking: Tracking
    store: CheckpointStore
    system: Callable[[], dict[str, float]]
    fps: float
    config: dict[str, Any]


def run(training: Training) -> dict[str, Any]:
    """Measures the base, trains, measures the tuned policy, writes report.html and summary.json, which it returns."""
    started, output = time.perf_counter(), training.output
    training.begin()
    base, base_films, _ = training.look(0)
    training.to_the_end()
    last = training.last
    tuned, tuned_films, _ = training.look(last)
    seconds = training.phases.seconds | {"total": time.perf_counter() - started}
    summary = summarise(compare(base, tuned), training.heldout.prompts, last, seconds, output.tracking.run_id)
    stopped_at = last if last < training.settings.iterations else None
    summary["hack_watch"] = {**training.watch.summary(), "stopped_at": stopped_at}
    output.tracking.log(
        {
            f"eval/{name}/{which}": value
            for name, row in figures(summary["heldout"])
            for which, value in row.items()
            if which != "ci95"
        },
        last,
    )
    output.folder.write_summary(summary)
    show(output, summary, base_films, tuned_films, last)
    output.tracking.artifact(output.folder.summary)
    return summary


@dataclass
class Training:
    """The loop and what it has to lose: where it stands, what is saved of it, and the way back there.

    Where it is asked to stop, what is trained is saved before Stopped passes. Where the learner is lost, or results
    that no worker can give again, the learner is made anew and goes on from the last checkpoint.

    resume: the checkpoint to begin with. start, done, last: the steps it begins with, has come to and ends with.
    saved: that of the newest checkpoint. held: of `rl.loop.train`. best: {"step", "reward"} of the best evaluation.
    """

    fleets: Fleets
    terms: dict[str, TermWeight]
    settings: LoopSettings
    heldout: HeldOut
    watch: HackWatch
    output: Output
    resume: Path | None
    phases: Clock = field(default_factory=Clock, init=False)
    recoveries: int = field(default=0, init=False)
    held: Sequence[int] = field(init=False)
    start: int = field(init=False)
    done: int = field(init=False)
    saved: int = field(init=False)
    last: int = field(init=False)
    best: dict[str, float] | None = field(init=False)
    progress: Progress = field(init=False)

    def begin(self) -> None:
        self.go_on_from(self.resume)
        self.start, self.last = self.done, self.settings.iterations

    def go_on_from(self, path: Path | None) -> None:
        """Takes learner and records to a checkpoint, or to the beginning."""
        self.held, self.best = [0], None
        if path:
            self.held = fetch(self.fleets.learner.broadcast("load", str(path)))[0]
            self.best = checkpoint.read_manifest(path).get("best")
            self.output.folder.restore(path)
        self.done = self.saved = self.held[-1]
        self.output.folder.truncate_after(self.done)
        self.watch.resume(self.done)

    def to_the_end(self) -> None:
        """Trains up to the last step and leaves the averaged weights with the rollout workers."""
        with Progress(self.settings.iterations, self.start) as self.progress:
            self.make_up_for_a_stop()
            while True:
                try:
                    if self.done < self.last:
                        train(self.fleets, self.terms, self.settings, self.held, self.log, self.save, self.evaluate,
                              self.phases)  # fmt: skip
                    return synchronise(self.fleets, averaged=True)
                except Stopped:
                    self.save(self.done)
                    raise
                except Exception as error:
                    if not self.mendable(error):
                        self.rescue(error)
                        raise
                    self.recover(error)

    def make_up_for_a_stop(self) -> None:
        """An alarm that ended the training ends it again; an evaluation that a stop came before is made."""
        every, begun = self.settings.evaluate_every, 0 < self.start < self.settings.iterations
        if self.watch.stops(self.start):
            self.last = self.start
        elif every and begun and self.start % every == 0 and not self.watch.knows(self.start):
            self.evaluate(self.start)

    def look(self, step: int) -> tuple[dict[str, np.ndarray], Films, bool]:
        """Metrics and first films of the policy that the rollout workers hold; True where the training should stop."""
        with self.phases("evaluate"):
            measured = measure(self.fleets.rollout, self.fleets.judges, self.heldout)
            stop = self.watch.look(step, measured.metrics, self.output.tracking)
            if step:
                self.watch.draw(step, measured.metrics, measured.film, self.output.tracking, self.output.fps)
        return measured.metrics, measured.films(self.heldout.strips), stop

    def evaluate(self, step: int) -> bool:
        synchronise(self.fleets, averaged=True)
        stop = self.look(step)[2]
        if stop:
            self.last = step
        if (reward := self.watch.reward(step)) > (self.best["reward"] if self.best else -np.inf):
            self.best = {"step": step, "reward": reward}
            self.save(step)
        return stop

    def log(self, step: int, metrics: dict[str, float]) -> None:
        metrics = metrics | {"system/recoveries": float(self.recoveries)}
        self.output.folder.append(step, metrics)
        self.output.tracking.log({**metrics, **self.output.system()}, step)
        self.progress.update(metrics)
        self.done = step

    def save(self, step: int) -> None:
        if step == self.saved:
            return

        def write(path: Path) -> None:
            versions = fetch(self.fleets.learner.broadcast("save", str(path)))
            if versions != [step] * len(versions):
                raise RuntimeError(f"the learner's ranks hold versions {versions}, not {step}")
            self.output.folder.keep(path)

        self.output.folder.sync()
        manifest = {"mlflow_run_id": self.output.tracking.run_id, "config": self.output.config, "best": self.best}
        self.output.store.save(step, write, manifest, self.best and self.best["step"])
        self.saved = step

    def mendable(self, error: Exception) -> bool:
        """Whether a new learner can go on from the last checkpoint."""
        lost = self.fleets.learner.loss is not None or isinstance(error, ResultLost)
        known = isinstance(error, FleetError | checkpoint.CheckpointError)
        return lost and known and self.recoveries < self.settings.max_recoveries

    def rescue(self, error: Exception) -> None:
        """Saves what is trained from an error that left the learner whole; that error is what the user has to see."""
        if self.fleets.learner.loss is None and not isinstance(error, checkpoint.CheckpointError):
            try:
                self.save(self.done)
            except Exception as second:
                logger.warning("what was trained after step %d is not saved: %s", self.saved, second)

    def recover(self, error: Exception) -> None:
        """Goes back to the last checkpoint with a new learner."""
        self.recoveries += 1
        own = self.saved > self.start  # else the folder's newest may be of another branch
        path = (own and checkpoint.latest(self.output.folder.checkpoints)[0]) or self.resume
        logger.warning("%s; recovery %d of %d, from %s", error, self.recoveries, self.settings.max_recoveries,
                       path or "the beginning")  # fmt: skip
        self.fleets.learner.renew()
        join(self.fleets.learner)
        self.go_on_from(path)
        self.progress.done = self.done


def summarise(
    table: dict[str, dict], prompts: int, iterations: int, seconds: dict[str, float], run_id: str | None
) -> dict[str, Any]:
    """The contract of summary.json. Each figure is {"base", "tuned", "ci95" of tuned - base, paired over the
    prompts}.
    """
    return {
        "heldout": {
            "prompts": prompts,
            "track_error_px": table["track_error_px"],
            "quality": {name.removeprefix("reward/"): row for name, row in table.items() if name.startswith("reward/")},
            "sharpness": table["sharpness"],
            "canary": {
                "track_error_px": table["canary/track_error_px"],
                "quality": {"psnr_db": table["canary/psnr_db"]} if "canary/psnr_db" in table else {},
            },
        },
        "iterations": iterations,
        "seconds": {name: round(s, 1) for name, s in seconds.items()},
        "mlflow_run_id": run_id,
    }


def show(output: Output, summary: dict, base: Films, tuned: Films, step: int) -> None:
    """Strips and videos of truth, base and tuned, into the folder, the report and MLflow."""
    folder, tracking, pictures, videos = output.folder, output.tracking, {}, {}
    for i, prompt in enumerate(base.prompts):
        rows = [("base", base.videos[i]), ("tuned", tuned.videos[i])]
        if base.truths is not None:
            rows.insert(0, ("truth", base.truths[i]))
        name = prompt.id.replace("/", "_")
        pictures[prompt.id] = filmstrip(rows, prompt.tracks)
        videos[prompt.id] = write_mp4(folder.videos / f"{name}.mp4", side_by_side([v for _, v in rows]), output.fps)
        tracking.log_strip(f"eval/{name}", pictures[prompt.id], step)
        tracking.log_video(f"eval/{name}", videos[prompt.id], step)
    write_report(folder.path, summary, folder.history(), pictures, videos)
    tracking.artifact(folder.report)
