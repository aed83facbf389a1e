"""Every command in the documentation is one that exists and whose settings exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/weights/*/MODEL_CARD.md"))]
COMMANDS = [
    pytest.param(command, id=f"{page.name}: {command}"[:80])
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for command in block.replace("\\\n", " ").splitlines()
    if command.strip() and not command.startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_exists_with_its_settings(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] in ("ray", "kubectl") or words[2] == "jobs.submit":
        return  # tests/test_docs_cluster.py
    assert words[:2] == ["python", "-m"], f"the documentation shows `{command}`, which this test does not know"
    if not words[2].startswith("jobs."):  # pytest with files, or a benchmark
        assert all((ROOT / file).exists() for file in words[3:] or [f"{words[2].replace('.', '/')}.py"])
        return
    name = words[2].removeprefix("jobs.")
    importlib.import_module(words[2])  # registers the schema
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        OmegaConf.to_container(compose(name, overrides=words[3:]), resolve=True)


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_experiment_is_a_valid_configuration(experiment):
    from jobs.build import validate

    importlib.import_module("jobs.train")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        validate(OmegaConf.to_object(compose("train", overrides=[f"experiment={experiment}"])))


def test_every_link_of_the_readme_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
