"""Teach a policy what a drag means, on true videos whose objects move as their tracks say, before jobs.train tunes it.

python -m jobs.teach policy=wan_1_3b policy.path=/models/wan prompts.path=/data/clips
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from jobs.build import join_learner, policy_source, session
from jobs.cli import ConfigError, job, require
from jobs.config import (
    AsyncConfig,
    ClusterConfig,
    LearnerConfig,
    PolicyConfig,
    PromptsConfig,
    TrackingConfig,
    settings_of,
)
from jobs.plugins import make_source
from jobs.resume import changes
from jobs.rules import learner_rules
from rl import checkpoint
from rl.fleet import Fleet, closing, fetch
from rl.learner import LearnerSettings
from rl.run_folder import RunFolder
from rl.stop import Stopped, check, stopping
from rl.teacher import Lessons, Teacher
from rl.tracking import Tracking


@dataclass
class LessonsConfig:
    """What `rl.teacher.Lessons` says, and how long."""

    steps: int
    batch: int
    context_noise: float
    on_schedule: float
    heldout: int
    measure_every: int
    checkpoint_every: int
    keep_checkpoints: int
    grace_s: float


@dataclass
class TeachConfig:
    seed: int
    run_dir: str | None
    resume: str
    policy: PolicyConfig
    prompts: PromptsConfig
    learner: LearnerConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    teach: LessonsConfig


@job("teach", TeachConfig)
def main(config: TeachConfig) -> None:
    validate(config)
    with (folder := RunFolder.at(config.run_dir, "teach")).taken():
        run(config, folder)


def run(config: TeachConfig, folder: RunFolder) -> None:
    t = config.tracking
    resume, warnings = checkpoint.resolve(config.resume, folder.checkpoints)
    for warning in warnings:
        print(f"warning: {warning}")
    if resume is None and any(folder.checkpoints.glob("step_*")):
        raise ConfigError(f"run_dir={folder.path} holds checkpoints; resume=auto goes on from them")
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))
    manifest = checkpoint.read_manifest(resume) if resume else {}
    print("".join(f"changed: {line}\n" for line in changes(manifest.get("config", values), values)), end="")
    folder.write_config(OmegaConf.to_yaml(values))
    with (
        stopping(config.teach.grace_s, f"the same command with run_dir={folder.path} goes on"),
        Tracking.open(t.uri, t.experiment, manifest.get("mlflow_run_id"), params=values, tags={"job": "teach"},
                      required=t.required, spool=folder.path / "tracking") as tracking,
        session(config),
        closing(make_teacher(config)) as (teacher,),
    ):  # fmt: skip
        last = teach(teacher, config.teach, folder, tracking, values, resume)
    print(f"wrote {last}; go on with: python -m jobs.train policy.weights={last / 'policy.safetensors'}")


def teach(
    teacher: Fleet, c: LessonsConfig, folder: RunFolder, tracking: Tracking, values: dict, resume: Path | None
) -> Path:
    """Steps until there are `c.steps` of them, or a signal asks for the end; returns the last checkpoint."""

    def save(step: int) -> Path:
        folder.sync()
        write = lambda path: fetch(teacher.broadcast("save", str(path)))  # noqa: E731
        manifest = {"mlflow_run_id": tracking.run_id, "config": values}
        saved = checkpoint.save(folder.checkpoints, step, write, manifest)
        checkpoint.prune(folder.checkpoints, checkpoint.Retention(c.keep_checkpoints, None))
        return saved

    def call(step: int, method: str, prefix: str) -> None:
        """The method on all ranks; the mean of what they tell is written down."""
        ranks = fetch(teacher.broadcast(method))
        metrics = {f"{prefix}/{name}": float(np.mean([rank[name] for rank in ranks])) for name in ranks[0]}
        folder.append(step, metrics)
        tracking.log(metrics, step)
        if method == "measure":
            print(f"step {step} " + " ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)

    step = fetch(teacher.broadcast("load", str(resume)))[0][-1] if resume else 0
    folder.truncate_after(step)
    if not step:
        call(0, "measure", "heldout")
    saved = resume
    while step < c.steps:
        call(step + 1, "teach", "train")
        step += 1
        if step % c.measure_every == 0 or step == c.steps:
            call(step, "measure", "heldout")
        due = step % c.checkpoint_every == 0 or step == c.steps
        if due:
            saved = save(step)
        try:
            check()
        except Stopped:
            due or save(step)
            raise
    return saved


def validate(c: TeachConfig) -> None:
    """Raises ConfigError naming the keys, before anything is started."""
    t, ranks = c.teach, c.learner.ranks
    rules = [
        *learner_rules(c.learner),
        (c.policy.lora.rank == 0, "policy.lora.rank: adapters do not reach the control channels; teach all weights"),
        (c.cluster.backend == "ray" or ranks == 1, f"learner.ranks={ranks} needs cluster=local or ray"),
        (c.prompts.kind in ("folder", "sprites"), f"prompts.kind={c.prompts.kind} has no videos; give a folder"),
        (c.prompts.kind == "sprites" or c.prompts.path, "prompts.path is missing: the folder with prompts.jsonl"),
        (
            not (c.tracking.register or c.tracking.parent or c.cluster.placement),
            "tracking.register, tracking.parent and cluster.placement have no effect here; they are jobs.train's",
        ),
        (t.steps >= 1, f"teach.steps={t.steps} must be at least 1"),
        (t.batch >= 1 and t.batch % ranks == 0, f"teach.batch={t.batch} must be a multiple of learner.ranks={ranks}"),
        (t.heldout >= 1 and t.heldout % ranks == 0, f"teach.heldout={t.heldout} must be one of learner.ranks={ranks}"),
        (0 <= t.on_schedule <= 1, f"teach.on_schedule={t.on_schedule} must lie in [0, 1]"),
        (t.context_noise >= 0, f"teach.context_noise={t.context_noise} must not be negative"),
        (
            min(t.measure_every, t.checkpoint_every, t.keep_checkpoints) >= 1,
            "teach.measure_every, teach.checkpoint_every and teach.keep_checkpoints must be at least 1",
        ),
        (t.grace_s > 0, f"teach.grace_s={t.grace_s} must be above 0"),
    ]
    require(rules)


def make_teacher(c: TeachConfig) -> Fleet:
    source, p = policy_source(c.policy), c.prompts
    settings = source.settings()
    clips = partial(make_source, p.kind, p.path, p.world_seed, settings.size, settings.frames)
    clips()  # what is wrong with a row is said here
    lessons = settings_of(Lessons, c.teach)
    settings = settings_of(LearnerSettings, c.learner, AsyncConfig(max_staleness=0, weight_cap=1.0))
    args = (source, c.policy.weights, settings, c.learner.ranks, clips, lessons, c.seed)
    return join_learner(c, Teacher, args)


if __name__ == "__main__":
    main()
