"""The KubeRay manifest of a training: deploy/rayjob.yaml with what is the job's filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import ROOT, ConfigError
from jobs.ray_job import RayJob, shortage
from rl.fleet import FleetSpec

TEMPLATE = ROOT / "deploy/rayjob.yaml"
GPU = "nvidia.com/gpu"


def manifest(job: RayJob) -> dict[str, Any]:
    """Raises ConfigError where a worker is larger than the template's pods, or Kubernetes does not take the name."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job.name):
        raise ConfigError(f"--name {job.name}: Kubernetes takes up to 47 small letters, digits and dashes")
    filled = yaml.safe_load(TEMPLATE.read_text())
    filled["metadata"]["name"] = job.name
    spec = filled["spec"]
    spec["entrypoint"] = job.entrypoint
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": job.env_vars})  # the code is in the image
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    if not any(fleet.num_gpus for fleet in job.specs):
        limits.pop(GPU, None)
    count = pods(job.specs, {"CPU": float(limits["cpu"]), "GPU": float(limits.get(GPU, 0))})
    group["replicas"] = group["minReplicas"] = group["maxReplicas"] = count
    return filled


def write(path: Path, jobs: Sequence[RayJob]) -> None:
    """One document per job."""
    path.write_text(yaml.dump_all(map(manifest, jobs), Dumper=_Plain, sort_keys=False))


class _Plain(yaml.SafeDumper):
    """YAML without references inside."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def pods(specs: Sequence[FleetSpec], pod: Mapping[str, float]) -> int:
    """How many pods of this size hold all workers, the largest placed first."""
    workers = sorted(((s.num_gpus, s.num_cpus) for s in specs for _ in range(s.replicas)), reverse=True)
    if problem := shortage([FleetSpec(s.name, 1, s.num_cpus, s.num_gpus) for s in specs], [pod] * len(specs)):
        raise ConfigError(f"{problem}: give the worker pods of {TEMPLATE.relative_to(ROOT)} more, or the worker less")
    free: list[list[float]] = []
    for gpus, cpus in workers:
        place = next((p for p in free if p[0] >= gpus and p[1] >= cpus), None)
        if place is None:
            free.append(place := [pod["GPU"], pod["CPU"]])
        place[0] -= gpus
        place[1] -= cpus
    return max(1, len(free))
