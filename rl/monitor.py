"""What every machine of a run is busy with: metrics `system/<node>/...`, sampled by one small actor per Ray node.

    with monitoring("ray") as sample:
        tracking.log({**metrics, **sample()}, step)

`sample` never waits: it gives what the nodes have answered since the last call and asks them anew, so that a figure is
the mean over about an iteration. A node that joins is watched from the next call on, one that is lost is forgotten.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

QUERY = ("--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")
Metrics = dict[str, float]


class Gauge:
    """Reads one machine."""

    def read(self) -> Metrics:
        """cpu_percent (since the last call; of all cores), memory_gb (in use), disk_free_gb (of the working directory),
        network_gb (sent and received since boot); per GPU gpu_<i>_percent and gpu_<i>_memory_gb."""
        network = psutil.net_io_counters()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_gb": psutil.virtual_memory().used / 2**30,
            "disk_free_gb": shutil.disk_usage(".").free / 2**30,
            "network_gb": (network.bytes_sent + network.bytes_recv) / 2**30,
        }
        for i, (percent, mib) in enumerate(_gpus()):
            found |= {f"gpu_{i}_percent": percent, f"gpu_{i}_memory_gb": mib / 2**10}
        return found


def _gpus() -> list[tuple[float, float]]:
    """Utilisation in percent and memory in use in MiB; nothing where nvidia-smi is missing, late or refuses."""
    try:
        told = subprocess.run(["nvidia-smi", *QUERY], capture_output=True, text=True, timeout=5, check=True).stdout
        return [tuple(map(float, line.split(","))) for line in told.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


@dataclass
class _Node:
    name: str
    gauge: ray.actor.ActorHandle
    reading: ray.ObjectRef


class _Nodes:
    """Those of the Ray cluster, by id."""

    def __init__(self) -> None:
        self.watched: dict[str, _Node] = {}

    def sample(self) -> Metrics:
        found = {}
        for key, node in list(self.watched.items()):
            if not ray.wait([node.reading], timeout=0)[0]:
                continue
            try:
                found |= _named(node.name, ray.get(node.reading))
                node.reading = node.gauge.read.remote()
            except RayError:  # the node is lost, or its actor; a node that lives is taken up again below
                del self.watched[key]
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] not in self.watched:
                self.watched[node["NodeID"]] = self._watch(node["NodeID"], node["NodeManagerHostname"])
        return found

    def _watch(self, key: str, host: str) -> _Node:
        taken = host in {node.name for node in self.watched.values()}
        here = NodeAffinitySchedulingStrategy(key, soft=False)
        gauge = ray.remote(Gauge).options(num_cpus=0, scheduling_strategy=here).remote()
        return _Node(f"{host}-{key[:6]}" if taken else host, gauge, gauge.read.remote())

    def close(self) -> None:
        for node in self.watched.values():
            ray.kill(node.gauge)


@contextmanager
def monitoring(backend: str | None) -> Iterator[Callable[[], Metrics]]:
    """A function that samples. backend: "ray" (inside a session), "inline" (this machine), None (nothing)."""
    if backend is None:
        yield dict
    elif backend == "inline":
        gauge, host = Gauge(), socket.gethostname()
        yield lambda: _named(host, gauge.read())
    else:
        nodes = _Nodes()
        try:
            yield nodes.sample
        finally:
            nodes.close()


def _named(host: str, reading: Metrics) -> Metrics:
    host = re.sub(r"[^\w\-.]", "_", host, flags=re.ASCII)
    return {f"system/{host}/{name}": value for name, value in reading.items()}
