"""docs/rewards.md does what it says: its reward is written as shown, and its commands run, at the smallest size."""

from __future__ import annotations

import re
import shlex
import threading
from dataclasses import fields
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from safetensors.numpy import save_file
from test_example_rewards import Judge

from jobs.config import RewardRoleConfig, TermConfig
from rewards.contract import RewardBatch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/rewards.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
JOBS = [command for command in COMMANDS if command.startswith("python -m jobs.")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A stranger's folder: the page's reward, weights, and the service at the page's address."""
    home = tmp_path_factory.mktemp("stranger")
    (home / "mine.py").write_text(re.search(r"```python\n(# mine.py\n.*?)```", PAGE, re.S)[1])
    (home / "examples").symlink_to(ROOT / "examples")
    save_file({"weight": np.ones(6, np.float32), "bias": np.zeros(1, np.float32)}, home / "colours.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.troubles, server.asked = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield home, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("command", JOBS)
def test_a_command_of_the_page_runs_as_it_stands(command, home, small_run, tmp_path, monkeypatch):  # noqa: F811
    folder, port = home
    monkeypatch.chdir(folder)
    _, _, module, *overrides = shlex.split(command.replace(":8009/", f":{port}/"))
    if module == "jobs.train":
        more = [*small_run, "train.iterations=1", "tracking.uri=null"]
        assert run_job("train", *more, *overrides, f"run_dir={tmp_path}") == 0
    else:
        more = ["scenes=2", "replicas=2", f"run_dir={tmp_path}"]
        assert run_job(module.removeprefix("jobs."), *overrides, *more) in (0, 2)
        assert (tmp_path / "report.html").exists()


def test_the_page_names_every_field_and_setting():
    for kind in (RewardBatch, TermConfig, RewardRoleConfig):
        for field in fields(kind):
            assert f"`{field.name}`" in PAGE, f"docs/rewards.md does not mention {kind.__name__}.{field.name}"


def test_the_other_commands_name_what_exists():
    for command in COMMANDS:
        _, _, module, *files = shlex.split(command)
        if module == "pytest":
            assert all((ROOT / file).exists() for file in files)
        else:
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
