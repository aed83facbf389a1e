"""What a training is as a Ray Job: its configuration checked, its command, its environment, what it asks for."""

from __future__ import annotations

import itertools
import re
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import jobs.train  # noqa: F401  (its schema)
from jobs.build import fleet_specs, validate
from jobs.cli import ROOT, ConfigError
from jobs.config import TrainConfig
from rl.fleet import FleetSpec
from rl.tracking import flatten

LEFT_BEHIND = (".git", ".ci", ".venv", "outputs", "mlruns", "mlflow.db", "tests", "docs", "benchmarks")
"""Of the repository's root, what does not travel with a job; neither does what .gitignore names."""
MARGIN_S = 15
"""From the end of train.grace_s, in which a stopped job writes its checkpoint, to its SIGKILL."""
SECRET = re.compile(r"(token|password|passwd|secret|credential|(api|access|private)_?key)s?$", re.IGNORECASE)
URL_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


@dataclass(frozen=True)
class RayJob:
    """overrides: of `jobs.train`. env: variables of the driver and of all its workers, over the default ones."""

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        return shlex.join(("python", "-m", "jobs.train", *self.overrides))

    @property
    def env_vars(self) -> dict[str, str]:
        wait_s = round(self.config.train.grace_s) + MARGIN_S
        return {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(wait_s), **self.env}

    @property
    def runtime_env(self) -> dict[str, Any]:
        """With the repository as working_dir: Ray packs it, at most 512 MiB, and unpacks it on every node."""
        excludes = [*(f"/{name}" for name in LEFT_BEHIND), "__pycache__"]
        return {"working_dir": str(ROOT), "excludes": excludes, "env_vars": self.env_vars}

    @property
    def metadata(self) -> dict[str, str]:
        return {"job": "train", "run_dir": self.config.run_dir}

    @property
    def specs(self) -> list[FleetSpec]:
        return list(fleet_specs(self.config).values())


def make_job(overrides: Sequence[str], name: str | None = None, env: Mapping[str, str] | None = None) -> RayJob:
    """Composed and checked as `jobs.train` does it, with cluster=ray unless said otherwise; ConfigError where the job
    could not run, would lose what it writes, or would show a secret."""
    if not any(override.startswith("cluster=") for override in overrides):
        overrides = ("cluster=ray", *overrides)
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = OmegaConf.to_object(compose("train", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    refuse_secrets(config, env or {})
    validate(config)
    check_paths(config)
    if (config.cluster.backend, config.cluster.address) != ("ray", "auto"):
        raise ConfigError(
            "a submitted job joins its own cluster: leave out cluster.address, and give cluster=ray or none"
        )
    name = name or f"train-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    return RayJob(name, tuple(overrides), config, env or {})


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """One set of overrides per combination of `seed=0,1,2 learner.lr=1e-4,3e-4`, in Hydra's own syntax for sweeps. Each
    set has a run_dir of its own below the given one, which names what it varies.
    """
    choices = []
    try:
        for parsed in OverridesParser.create().parse_overrides(list(overrides)):
            values = parsed.sweep_string_iterator() if parsed.is_sweep_override() else None
            choices.append([f"{parsed.get_key_element()}={v}" for v in values] if values else [parsed.input_line])
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    home = next((o.removeprefix("run_dir=") for o in overrides if o.startswith("run_dir=")), None)
    sets = []
    for chosen in itertools.product(*choices):
        varied = ",".join(one for one, among in zip(chosen, choices) if len(among) > 1)
        kept = tuple(one for one in chosen if not one.startswith("run_dir="))
        folder = re.sub(r"[^\w.=,+-]", "_", varied)
        sets.append((*kept, f"run_dir='{home}/{folder}'") if home and folder else chosen)
    return sets


def refuse_secrets(config: TrainConfig, env: Mapping[str, str]) -> None:
    """Overrides and runtime environments are shown in Ray's dashboard and kept in its logs."""
    values = flatten(OmegaConf.to_container(OmegaConf.structured(config)))
    for key, value in (values | {f"--env {name}": value for name, value in env.items()}).items():
        if (SECRET.search(key) and value not in ("", "None")) or URL_WITH_PASSWORD.search(value):
            raise ConfigError(
                f"{key} looks like a secret, and a job's settings are shown to all who see the cluster: put it into "
                "the environment of the cluster's processes (a Secret of the pods; MLflow reads "
                "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_TOKEN) or a mounted file"
            )


def check_paths(c: TrainConfig) -> None:
    """A job runs in an unpacked copy of the repository, which is deleted when it ends. What it reads must be part of
    that or, like all that it writes, lie on storage that every node sees."""
    if Path.cwd() != ROOT:
        raise ConfigError(f"jobs.submit sends the repository along: run it in {ROOT}, not in {Path.cwd()}")
    wan = c.policy.wan
    rewards = {f"rewards.{name}.fn": str(t["fn"]).rpartition(":")[0] for name, t in c.rewards.items() if t}
    read = {
        "policy.path": c.policy.path,
        "policy.weights": c.policy.weights,
        "policy.wan.base": wan and wan.base,
        "prompts.path": c.prompts.path,
        "resume": None if c.resume in ("auto", "none") else c.resume,
        **{key: file for key, file in rewards.items() if file.endswith(".py")},
    }
    written = {
        "run_dir": c.run_dir or "null",
        "train.checkpoint_url": _folder(c.train.checkpoint_url),
        "tracking.uri": _folder(c.tracking.uri),
        "policy.wan.text_cache": wan and wan.text_cache,
    }
    for key, path in read.items():
        if path and not Path(path).is_absolute():
            if Path(path).parts[0] in (*LEFT_BEHIND, ".."):
                raise ConfigError(f"{key}={path} is not sent with the job; give an absolute path that every node sees")
            if not Path(path).exists():
                raise ConfigError(f"{key}={path} does not exist in {ROOT}")
    for key, path in written.items():
        if path and not Path(path).is_absolute():
            raise ConfigError(
                f"{key}={path} would be lost with the job's own folder; give an absolute path that every node sees"
                + ", the address of an MLflow server, or null" * (key == "tracking.uri")
            )


def _folder(uri: str | None) -> str | None:
    """What a URI names on the machine's own disk; None if it names something elsewhere."""
    path = re.sub("^(sqlite:///|file://|file:)", "", uri or "")
    return None if "://" in path or path == "databricks" else path


def shortage(specs: Sequence[FleetSpec], nodes: Sequence[Mapping[str, float]]) -> str:
    """Why the workers can never all run on nodes with these resources; empty where they can."""
    kinds = {"CPU": lambda spec: spec.num_cpus, "GPU": lambda spec: spec.num_gpus}
    for spec in specs:
        if not any(all(node.get(kind, 0) >= of(spec) for kind, of in kinds.items()) for node in nodes):
            return f"no node has the {spec.num_cpus:g} CPU and {spec.num_gpus:g} GPU that a worker of {spec.name} needs"
    for kind, of in kinds.items():
        asked, there = sum(spec.replicas * of(spec) for spec in specs), sum(node.get(kind, 0) for node in nodes)
        if asked > there:
            return f"{asked:g} {kind} are asked for, and the cluster has {there:g}; lower replicas or add nodes"
    return ""
