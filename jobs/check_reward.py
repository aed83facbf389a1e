"""The reward doctor: scores a fixed battery of good, wrong and cheating videos, and says what is wrong with a reward.

python -m jobs.check_reward +rewards.mine.fn=mine.py:judge                # beside the shipped terms
python -m jobs.check_reward rewards=none +rewards.mine.fn=mine.py:judge   # alone

Writes report.html (every video beside its scores) and summary.json (for CI) into `run_dir`. Exit status: 0 when every
verdict passes, 2 when one fails, 1 when the check itself cannot run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from jobs.cli import ROOT, job, require
from jobs.plugins import make_terms
from rewards.battery import LEVELS, SHIFTS, Stage
from rewards.doctor import MIX, Limits, check_accept, diagnose, examine
from rl.doctor_report import Checkup, print_checkup, summary, write_page
from rl.run_folder import RunFolder
from rollout.doctored import duplicated, shifted, vanished
from rollout.sprites import Scene, SpriteWorld

START = -0.93
"""Direction in which objects leave their target, radians: along neither axis."""


@dataclass
class CheckRewardConfig:
    seed: int
    run_dir: str | None
    fps: float
    scenes: int
    replicas: int
    shown: int
    limits: Limits
    rewards: dict[str, Any]  # of TermConfig
    accept: dict[str, dict[str, str]]


@job("check_reward", CheckRewardConfig)
def main(config: CheckRewardConfig) -> None:
    rules = [
        (config.rewards, "rewards: there is nothing to check; add +rewards.mine.fn=mine.py:judge"),
        (MIX not in config.rewards, f"rewards.{MIX}: the name stands for all terms together; take another"),
        (config.scenes >= 2, f"scenes={config.scenes}: at least 2 are needed to see clips influence each other"),
        (config.replicas >= 2, f"replicas={config.replicas}: at least 2 are needed to see noise"),
    ]
    require(rules)
    terms, console = make_terms(config.rewards), Console()
    check_accept(terms, config.accept)
    shipped = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/rewards/default.yaml"))
    others = make_terms({name: spec for name, spec in shipped.items() if name not in config.rewards})
    world = SpriteWorld()
    stages = [stage(world, config.seed * 1_000_000 + i, config.replicas) for i in range(config.scenes)]
    found = {}
    for term in (*terms, *others):
        with console.status(f"scoring with {term.name}"):
            found[term.name] = examine(term, stages)
    checkup = Checkup(terms, stages, found, diagnose(terms, found, config.limits, config.accept))
    folder = RunFolder.at(config.run_dir, "check_reward")
    folder.write_summary(summary(checkup))
    page = write_page(folder.path, checkup, config.shown, config.fps)
    print_checkup(checkup, console)
    console.print(f"wrote {page}", soft_wrap=True, highlight=False)
    if not checkup.passed:
        sys.exit(2)


def stage(world: SpriteWorld, index: int, replicas: int) -> Stage:
    """Held-out scene `index` as the battery needs it."""

    def draw(edit: Callable[[Scene], Scene]) -> np.ndarray:
        return world.render("heldout", index, edit)

    angles = START + 2 * np.pi * np.arange(replicas) / replicas
    directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    drawn = {name: draw(shifted(px * directions[0])) for name, px in (("truth", 0), *SHIFTS.items())}
    drawn |= {"vanished": draw(vanished), "duplicated": draw(duplicated)}
    group = np.stack([[draw(shifted(px * direction)) for direction in directions] for px, _ in LEVELS])
    return Stage(world.prompt("heldout", index), drawn, group)


if __name__ == "__main__":
    main()
