"""The commands of docs/cluster.md: those of `jobs.submit` run without a cluster, those of Ray are parsed by Ray's own
command line. tests/test_submit_cluster.py runs the like of them against a cluster."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from ray.scripts.scripts import cli

from jobs import submit

PAGE = (Path(__file__).parents[1] / "docs/cluster.md").read_text()
COMMANDS = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
RAY = [words[1:] for words in COMMANDS if words[0] == "ray"]
SUBMITS = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "jobs.submit"]]


def test_the_page_shows_no_other_commands():
    rest = [words for words in COMMANDS if words[0] != "ray" and words[:3] != ["python", "-m", "jobs.submit"]]
    assert rest == [["kubectl", "apply", "-f", "job.yaml"]]
    assert len(RAY) >= 5 and len(SUBMITS) >= 5


@pytest.mark.parametrize("words", RAY, ids=" ".join)
def test_ray_knows_the_command_with_its_options(words):
    command = cli
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert command.make_context(command.name, list(words), resilient_parsing=False).params


def test_an_option_that_ray_does_not_know_is_found():
    with pytest.raises(BaseException, match="nonsense"):
        cli.commands["start"].make_context("start", ["--nonsense"])


@pytest.mark.parametrize("words", SUBMITS, ids=" ".join)
def test_a_job_of_the_page_is_accepted(words, monkeypatch, tmp_path, capsys):
    words = [str(tmp_path / word) if word == "job.yaml" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["jobs.submit", "--address", "http://127.0.0.1:1", "--dry-run", *words])
    with pytest.raises(SystemExit) as end:
        submit.main()
    output = capsys.readouterr().out
    assert end.value.code == 0
    if "--manifest" in words:
        assert yaml.safe_load((tmp_path / "job.yaml").read_text())["metadata"]["name"] == "first"
    else:
        assert output.count("entrypoint: python -m jobs.train") == (6 if "--sweep" in words else 1)


def test_what_the_page_says_of_exit_statuses_is_so():
    assert sorted(submit.EXIT.values()) == [0, 1, 3]
