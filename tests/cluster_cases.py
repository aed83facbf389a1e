"""A Ray cluster of one node with a dashboard, as `ray start --head` makes it, on ports of its own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
START_S = 120.0


@dataclass(frozen=True)
class RunningCluster:
    """address: of its dashboard. env: for commands that talk to it."""

    address: str
    env: dict[str, str]

    def command(self, *words: str) -> subprocess.Popen[str]:
        """A command of a user in the repository's root, `python` and `ray` being those of this environment."""
        return subprocess.Popen([BIN / words[0], *words[1:]], cwd=ROOT, env=self.env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def run(self, *words: str, timeout_s: float = 240) -> tuple[int, str]:
        with self.command(*words) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{words} took over {timeout_s} s: {process.communicate()[0]}") from None
            return process.returncode, output


@contextmanager
def ray_head(num_cpus: int = 5) -> Iterator[RunningCluster]:
    """Started here and ended with the block; other clusters of this machine are not touched, as `ray stop` would."""
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as home:  # names of sockets are short
        yield from _ray_head(Path(home), num_cpus)


def _ray_head(home: Path, num_cpus: int) -> Iterator[RunningCluster]:
    sockets = [socket.create_server(("", 0)) for _ in range(5)]
    gcs, dashboard, agent, grpc, client = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    address = f"http://127.0.0.1:{dashboard}"
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
           "RAY_AUTH_TOKEN_PATH": str(token), "RAY_API_SERVER_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0",
           "PYTHONPATH": ""}  # fmt: skip
    env.pop("RAY_ADDRESS", None)
    command = [BIN / "ray", "start", "--head", "--block", f"--num-cpus={num_cpus}", f"--port={gcs}",
               f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
               f"--dashboard-agent-grpc-port={grpc}", f"--ray-client-server-port={client}",
               f"--temp-dir={home / 'ray'}", "--object-store-memory=300000000"]  # fmt: skip
    log = home / "ray.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    cluster = RunningCluster(address, env)
    try:
        deadline = time.monotonic() + START_S
        while cluster.run("ray", "job", "list", "--address", address)[0] != 0:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        yield cluster
    finally:
        process.terminate()  # ends the node's processes
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
