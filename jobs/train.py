"""Fine-tune a policy with group-relative reinforcement learning.

python -m jobs.train train.iterations=60 seed=1
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from jobs.build import (
    first_prompt,
    loop_settings,
    make_judges,
    make_learner,
    make_rollout_fleet,
    places,
    policy_source,
    session,
    term_weights,
    validate,
)
from jobs.cli import ConfigError, job
from jobs.config import TrainConfig
from jobs.resume import changes
from policy.lora import merge_own_lora
from policy.policy import Settings, load_policy
from policy.wan_formats import write_wan
from rl import checkpoint
from rl.checkpoint_store import CheckpointStore
from rl.fleet import closing
from rl.hack_watch import HackWatch
from rl.heldout import HeldOut
from rl.monitor import monitoring
from rl.pipeline import Fleets
from rl.run import Output, Training, run
from rl.run_folder import RunFolder
from rl.stop import stopping
from rl.tracking import Tracking, TrackingError

UPLOAD_S = 3600
"""How long a registered policy may take on its way to MLflow."""


@job("train", TrainConfig)
def main(config: TrainConfig) -> None:
    settings = validate(config)
    with (folder := RunFolder.at(config.run_dir, "train")).taken():
        train(config, settings, folder)


def train(config: TrainConfig, settings: Settings, folder: RunFolder) -> None:
    e, t, kept = config.evaluate, config.tracking, config.train
    retention = checkpoint.Retention(kept.keep_checkpoints, kept.keep_every)
    store = CheckpointStore(folder.checkpoints, retention, kept.checkpoint_url)
    resume, warnings = store.resolve(config.resume)
    for warning in warnings:
        print(f"warning: {warning}")
    if resume is None and any(folder.checkpoints.glob("step_*")):
        raise ConfigError(
            f"run_dir={folder.path} holds checkpoints; resume=auto goes on from them, or choose another run_dir"
        )
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))
    manifest = checkpoint.read_manifest(resume) if resume else {}
    if manifest and manifest["step"] > kept.iterations:
        raise ConfigError(f"train.iterations={kept.iterations} is less than the step of {resume}; resume from an "
                          "earlier checkpoint, or ask for more iterations")  # fmt: skip
    tags, tracked = {"job": "train"}, manifest.get("mlflow_run_id")
    if t.parent:
        tags["mlflow.parentRunId"] = t.parent
    if tracked and resume.parent != folder.checkpoints:  # a branch: what it learns is not that run's
        tags["continues"], tracked = tracked, None
    if changed := changes(manifest.get("config", values), values):
        print("\n".join(f"changed: {line}" for line in changed))
        tags["changed"] = "; ".join(changed)[:5000]
    folder.write_config(OmegaConf.to_yaml(values))
    with (
        stopping(config.train.grace_s, f"the same command with run_dir={folder.path} goes on"),
        Tracking.open(t.uri, t.experiment, tracked, params=values, tags=tags, required=t.required,
                      spool=folder.path / "tracking") as tracking,
        session(config),
        places(config),
        monitoring(config.cluster.backend if t.uri and t.system_metrics else None) as system,
        closing(make_rollout_fleet(config, settings), make_judges(config), make_learner(config)) as parts,
    ):  # fmt: skip
        parts[1].dry_run(first_prompt(config, settings))
        output = Output(folder, tracking, store, system, config.fps, values)
        heldout = HeldOut(e.prompts, e.seed, e.batch, e.strips)
        watch = HackWatch(folder.path / "watch", term_weights(config), e.patience, e.stop)
        loop = loop_settings(config)
        summary = run(Training(Fleets(*parts), term_weights(config), loop, heldout, watch, output, resume))
        if t.register:
            register(config, folder, summary, tracking, resume)
    print("\n".join([*heldout_lines(summary), f"report: {folder.report}"]))


def register(
    config: TrainConfig, folder: RunFolder, summary: dict[str, Any], tracking: Tracking, resume: Path | None
) -> None:
    """The tuned policy as a folder that stock diffusers loads, with its report, as a version in MLflow's registry."""
    tracking.flush(UPLOAD_S)  # of an earlier registration, which reads the folder that is made anew
    out = folder.path / "policy"
    shutil.rmtree(out, ignore_errors=True)  # of a run that has ended before
    last = folder.checkpoints / f"step_{summary['iterations']:06d}"
    weights = (last if last.exists() else resume) / "policy.safetensors"  # nothing was left to train: none was saved
    model = load_policy(policy_source(config.policy), str(weights)).net.model
    if config.policy.lora.rank:
        merge_own_lora(model)
    write_wan(model, out)
    for page in (folder.report, folder.summary):
        shutil.copy(page, out)
    tracking.register(config.tracking.register, out, "\n".join(heldout_lines(summary)))
    if not tracking.flush(UPLOAD_S):
        raise TrackingError(f"tracking.register={config.tracking.register}: {out} did not reach the MLflow server at "
                            f"tracking.uri={config.tracking.uri}; the same command sends it again")  # fmt: skip


def heldout_lines(summary: dict[str, Any]) -> list[str]:
    held, lines = summary["heldout"], []
    for label, row, unit in (
        ("track error", held["track_error_px"], "px"),
        ("canary track error", held["canary"]["track_error_px"], "px"),
        *((f"canary {name}", row, "") for name, row in held["canary"]["quality"].items()),
        ("sharpness", held["sharpness"], ""),
    ):
        change = 100 * (row["tuned"] / row["base"] - 1)
        lines.append(f"held-out {label:20s} {row['base']:7.3f} -> {row['tuned']:7.3f} {unit:2s} ({change:+.0f} %)")
    return lines


if __name__ == "__main__":
    main()
