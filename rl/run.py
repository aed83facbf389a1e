"""One training run from its first measurement to its report: what surrounds the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl import checkpoint
from rl.advantage import TermWeight
from rl.checkpoint_store import CheckpointStore
from rl.evaluation import compare, stack
from rl.fleet import Fleet, FleetError, ResultLost, as_completed, fetch
from rl.hack_watch import HackWatch
from rl.judges import Judges
from rl.learner import join
from rl.loop import Clock, LoopSettings, train
from rl.pipeline import Fleets, synchronise
from rl.progress import Progress
from rl.report import figures, filmstrip, side_by_side, write_mp4, write_report
from rl.run_folder import RunFolder
from rl.stop import Stopped
from rl.tracking import Tracking
from rollout.prompts import DragPrompt
from rollout.records import Films

logger = logging.getLogger(__name__)
CANARY = "canary/"


@dataclass(frozen=True)
class HeldOut:
    """prompts: how many. seed: chooses them and their noise. batch: prompts generated together. strips: how many are
    shown.
    """

    prompts: int
    seed: int
    batch: int
    strips: int
    split: str = "heldout"


@dataclass(frozen=True)
class Measured:
    """metrics: float32 [prompts] each. chunks: references to the Films, `batch` prompts in each but the last."""

    metrics: dict[str, np.ndarray]
    chunks: list
    batch: int

    def films(self, count: int) -> Films:
        """Of the first so many prompts."""
        parts = [fetch(chunk) for chunk in self.chunks[: max(1, -(-count // self.batch))]]
        prompts = tuple(prompt for part in parts for prompt in part.prompts)
        known = parts[0].truths is not None
        truths = np.concatenate([part.truths for part in parts])[:count] if known else None
        return Films(prompts[:count], np.concatenate([part.videos for part in parts])[:count], truths)

    def film(self, i: int) -> tuple[DragPrompt, np.ndarray]:
        """Prompt and video of the i-th prompt."""
        films = fetch(self.chunks[i // self.batch])
        return films.prompts[i % self.batch], films.videos[i % self.batch]


def measure(rollout: Fleet, judges: Judges, heldout: HeldOut) -> Measured:
    """The rollout workers' present policy on the held-out prompts."""
    first = heldout.seed * 1_000_000
    chunks = [
        range(first + i, first + min(i + heldout.batch, heldout.prompts))
        for i in range(0, heldout.prompts, heldout.batch)
    ]
    generating = {rollout.submit("generate", heldout.split, list(c), heldout.seed): i for i, c in enumerate(chunks)}
    measuring, films = {}, {}
    for task in as_completed(generating):
        i = generating[task]
        films[i] = task.result()[0]
        measuring[i] = judges.measure(films[i], heldout.split)
    found = [judges.measured(*measuring[i]) for i in range(len(chunks))]
    return Measured(stack(found), [films[i] for i in range(len(chunks))], heldout.batch)


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


def run(
    fleets: Fleets,
    terms: dict[str, TermWeight],
    settings: LoopSettings,
    heldout: HeldOut,
    watch: HackWatch,
    output: Output,
    resume: Path | None,
) -> dict[str, Any]:
    """Measures the base, trains, measures the tuned policy, writes report.html and summary.json; returns the
    summary. Where the run is asked to stop, what is trained is saved before Stopped passes. Where the learner is lost,
    or results that no worker can give again, the learner is made anew and goes on from the last checkpoint.
    """
    started, clock, phases = time.perf_counter(), Clock(), Clock()
    folder, tracking = output.folder, output.tracking

    def look(step: int) -> tuple[dict[str, np.ndarray], Films, bool]:
        with clock("evaluate"):
            measured = measure(fleets.rollout, fleets.judges, heldout)
            stop = watch.look(step, measured.metrics, tracking)
            if step:
                watch.draw(step, measured.metrics, measured.film, tracking, output.fps)
        return measured.metrics, measured.films(heldout.strips), stop

    def go_on_from(path: Path | None) -> list[int]:
        """Takes learner and records to a checkpoint, or to the beginning; the versions of the weights there."""
        nonlocal best, done, saved
        held, best = [0], None
        if path:
            held = fetch(fleets.learner.broadcast("load", str(path)))[0]
            best = checkpoint.read_manifest(path).get("best")
            folder.restore(path)
        done = saved = held[-1]
        folder.truncate_after(done)
        watch.resume(done)
        return held

    last, recoveries, best, done, saved, newest = settings.iterations, 0, None, 0, 0, resume
    held = go_on_from(resume)
    start = held[-1]
    base, base_films, _ = look(0)

    with Progress(settings.iterations, start) as progress:

        def log(step: int, metrics: dict[str, float]) -> None:
            nonlocal done
            metrics = metrics | {"system/recoveries": float(recoveries)}
            folder.append(step, metrics)
            tracking.log({**metrics, **output.system()}, step)
            progress.update(metrics)
            done = step

        def save(step: int) -> None:
            nonlocal saved, newest
            if step == saved:
                return

            def write(path: Path) -> None:
                versions = fetch(fleets.learner.broadcast("save", str(path)))
                if versions != [step] * len(versions):
                    raise RuntimeError(f"the learner's ranks hold versions {versions}, not {step}")
                folder.keep(path)

            folder.sync()
            manifest = {"mlflow_run_id": tracking.run_id, "config": output.config, "best": best}
            output.store.save(step, write, manifest, best and best["step"])
            saved, newest = step, None  # the one to go back to is then the newest of the folder

        def rescue() -> None:
            """What is trained, from an error that left the learner whole; that error is what the user has to see."""
            try:
                save(done)
            except Exception as error:
                logger.warning("what was trained after step %d is not saved: %s", saved, error)

        def evaluate(step: int) -> bool:
            nonlocal last, best
            synchronise(fleets, averaged=True)
            stop = look(step)[2]
            last = step if stop else last
            if (reward := watch.reward(step)) > (best["reward"] if best else -np.inf):
                best = {"step": step, "reward": reward}
                save(step)
            return stop

        due = settings.evaluate_every and start % settings.evaluate_every == 0 and 0 < start < settings.iterations
        if watch.stops(start):  # an alarm that a run was stopped after
            last, held = start, [settings.iterations]
        elif due and not watch.knows(start) and evaluate(start):  # what a stop came before
            held = [settings.iterations]

        while True:
            try:
                train(fleets, terms, settings, held, log, save, evaluate, phases)
                synchronise(fleets, averaged=True)
                break
            except Stopped:
                save(done)
                raise
            except Exception as error:
                lost = fleets.learner.loss is not None or isinstance(error, ResultLost)
                mendable = lost and isinstance(error, FleetError | checkpoint.CheckpointError)
                if not mendable or recoveries == settings.max_recoveries:
                    if fleets.learner.loss is None and not isinstance(error, checkpoint.CheckpointError):
                        rescue()
                    raise
                recoveries += 1
                path = newest or checkpoint.latest(folder.checkpoints)[0]
                logger.warning("%s; recovery %d of %d, from %s", error, recoveries, settings.max_recoveries,
                               path or "the beginning")  # fmt: skip
                fleets.learner.renew()
                join(fleets.learner)
                held, progress.done = go_on_from(path), done
                if done == last:
                    held = [settings.iterations]

    tuned, tuned_films, _ = look(last)
    seconds = phases.seconds | clock.seconds | {"total": time.perf_counter() - started}
    summary = summarise(compare(base, tuned), heldout.prompts, last, seconds, tracking.run_id)
    summary["hack_watch"] = {**watch.summary(), "stopped_at": last if last < settings.iterations else None}
    tracking.log(
        {
            f"eval/{name}/{which}": value
            for name, row in figures(summary["heldout"])
            for which, value in row.items()
            if which != "ci95"
        },
        last,
    )
    folder.write_summary(summary)
    show(output, summary, base_films, tuned_films, last)
    tracking.artifact(folder.summary)
    return summary


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
