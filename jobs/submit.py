"""Submit trainings to a Ray cluster as Ray Jobs. The options come first, then `--` and the overrides of `jobs.train`.

python -m jobs.submit --address http://127.0.0.1:8265 -- run_dir=/shared/first tracking.uri=http://mlflow:5000 seed=1
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from rich.console import Console
from rich.table import Table

from jobs import manifest
from jobs.cli import ConfigError
from jobs.ray_job import RayJob, expand, make_job, shortage
from rl.tracking import Tracking

EXIT = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 3}
POLL_S = 2.0


def main() -> None:
    args = parser().parse_args()
    try:
        sys.exit(submit(args))
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    make = argparse.ArgumentParser("python -m jobs.submit", description="Exit status: 0 if the job succeeded, 1 if it "
                                   "failed, 3 if it was stopped; with --no-wait and --dry-run 0.")  # fmt: skip
    add = make.add_argument
    add("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="of the cluster's dashboard (%(default)s)")  # fmt: skip
    add("--name", help="the job's submission id; a sweep numbers its jobs; default: train-<time>")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for the driver and all workers; no secrets")
    add("--sweep", action="store_true", help="one job for each combination of values like seed=0,1,2")
    add("--dry-run", action="store_true", help="check, print what would be submitted, and stop")
    add("--no-wait", action="store_true", help="do not follow the job to its end")
    add("--manifest", type=Path, metavar="FILE", help="write KubeRay's RayJob for `kubectl apply -f FILE`, and stop")
    add("--anyway", action="store_true", help="also where the cluster is too small now, because it grows")
    add("overrides", nargs="*", help="of jobs.train, after --")
    return make


def submit(args: argparse.Namespace) -> int:
    """The exit status. Raises ConfigError where nothing was submitted."""
    env = dict(pair.partition("=")[::2] for pair in args.env)
    jobs = [
        make_job(overrides, args.name, env)
        for overrides in (expand(args.overrides) if args.sweep else [args.overrides])
    ]
    if args.sweep:
        jobs = [replace(job, name=f"{jobs[0].name}-{i}") for i, job in enumerate(jobs)]
    if args.manifest:
        manifest.write(args.manifest, jobs)
        print(f"kubectl apply -f {args.manifest}")
        return 0
    client = connect(args.address, needed=not args.dry_run)
    nodes = alive(args.address) if client else []
    Console(width=max(100, Console().width)).print(table(jobs[0], nodes, len(jobs)))
    problem = shortage(jobs[0].specs, nodes) if client else ""
    if problem and not args.anyway:
        raise ConfigError(f"{problem}; --anyway submits all the same")
    if args.dry_run:
        for job in jobs:
            print(
                yaml.safe_dump({job.name: {"entrypoint": job.entrypoint, "runtime_env": job.runtime_env}}, width=1000)
            )
        return 0
    refuse_running(client, jobs)
    if len(jobs) > 1:
        jobs = under_one_parent(jobs)
    for job in jobs:
        try:
            client.submit_job(entrypoint=job.entrypoint, submission_id=job.name, runtime_env=job.runtime_env,
                              metadata=job.metadata)  # fmt: skip
        except RuntimeError as error:
            raise ConfigError(f"the cluster does not take {job.name}: {error}") from error
        print(f"submitted {job.name}: {job.entrypoint}")
        print(f"  stop it with: ray job stop --address {args.address} {job.name}", flush=True)
    if args.no_wait:
        return 0
    return max(EXIT[follow(client, job.name, show=len(jobs) == 1)] for job in jobs)


def connect(address: str, needed: bool) -> JobSubmissionClient | None:
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file "
            "that holds it if that is not ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        if not needed:
            print(f"no Ray cluster answers at {address}; what it has is not known")
            return None
        raise ConfigError(f"no Ray cluster answers at {address}: start one with `ray start --head`, or give --address, "
                          "the URL of its dashboard") from error  # fmt: skip


def alive(address: str) -> list[dict[str, float]]:
    return [node.resources_total for node in list_nodes(address, filters=[("state", "=", "ALIVE")], timeout=30)]


def table(job: RayJob, nodes: Sequence[dict[str, float]], jobs: int) -> Table:
    """What a job asks for, role by role, and what the cluster has in all."""
    out = Table(title=f"{job.name}: what {'each of the jobs' if jobs > 1 else 'the job'} asks for")
    for name in ("role", "workers", "CPU each", "GPU each", "CPU", "GPU"):
        out.add_column(name, justify="left" if name == "role" else "right")
    for spec in job.specs:
        each = spec.num_cpus, spec.num_gpus
        out.add_row(spec.name, str(spec.replicas), *(f"{x:g}" for x in each), *(f"{spec.replicas * x:g}" for x in each))
    out.add_section()
    totals = (sum(spec.replicas * getattr(spec, key) for spec in job.specs) for key in ("num_cpus", "num_gpus"))
    out.add_row("asked for", str(sum(spec.replicas for spec in job.specs)), "", "", *(f"[bold]{x:g}" for x in totals))
    if nodes:
        there = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        out.add_row(f"cluster, {len(nodes)} nodes", "", "", "", *(f"[bold]{x:g}" for x in there))
    return out


def refuse_running(client: JobSubmissionClient, jobs: Sequence[RayJob]) -> None:
    """Two trainings in one folder would destroy each other's checkpoints."""
    folders = {job.config.run_dir for job in jobs}
    if len(folders) < len(jobs):
        raise ConfigError("the jobs of a sweep need a run_dir each; with --sweep, run_dir is the folder of them all")
    for other in client.list_jobs():
        if not other.status.is_terminal() and other.metadata and other.metadata.get("run_dir") in folders:
            raise ConfigError(f"job {other.submission_id} trains in run_dir={other.metadata['run_dir']} already")


def under_one_parent(jobs: Sequence[RayJob]) -> list[RayJob]:
    """The jobs of a sweep with one MLflow run above theirs, which says what varies."""
    tracking = jobs[0].config.tracking
    if tracking.uri is None:
        return list(jobs)
    sets = [set(job.overrides) for job in jobs]
    varied = {job.name: " ".join(o for o in job.overrides if o not in set.intersection(*sets)) for job in jobs}
    with tempfile.TemporaryDirectory() as spool:
        with Tracking.open(tracking.uri, tracking.experiment, params=varied, tags={"job": "sweep"}, required=True,
                           spool=Path(spool)) as parent:  # fmt: skip
            print(f"the jobs' MLflow runs are shown under run {parent.run_id}")
    return [replace(job, overrides=(*job.overrides, f"tracking.parent={parent.run_id}")) for job in jobs]


def follow(client: JobSubmissionClient, name: str, show: bool) -> JobStatus:
    """Waits for the job's end; show: with its log. Ctrl-C stops the waiting, not the job."""
    try:
        if show:
            try:
                asyncio.run(stream(client, name))
            except Exception as error:  # the log is a comfort; the status counts
                print(f"the log of {name} cannot be followed any more: {error}", file=sys.stderr)
        while not (status := client.get_job_status(name)).is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise ConfigError(f"no longer following {name}, which goes on") from None
    print(f"{name}: {status}", flush=True)
    return status


async def stream(client: JobSubmissionClient, name: str) -> Any:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)


if __name__ == "__main__":
    main()
