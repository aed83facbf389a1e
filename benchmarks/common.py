"""What the benchmarks share: clocks, tables, and the mathematics of an iteration in one process."""

from __future__ import annotations

import importlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from jobs.build import learner_settings, loop_settings, make_kernel, policy_source, rollout_settings, term_weights
from jobs.plugins import make_terms
from policy.causal import freeze
from rl.learner import Learner
from rl.loop import chunks, credit
from rl.reward_worker import GroupScores, RewardWorker
from rollout.group import GroupSampler
from rollout.plan import NoisePlan
from rollout.records import GroupRollout, Replay
from rollout.sprites import SpriteWorld

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def read_config(*overrides: str) -> Any:
    """The configuration of `python -m jobs.train overrides`."""
    importlib.import_module("jobs.train")  # registers the schema
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides=list(overrides)))


class BareEngine:
    """What the learner asks of DeepSpeed's engine, in plain PyTorch: gradients add up until the boundary.

    gradient: of the last update, before clipping.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self.module, self.optimizer, self.grad_clip, self.boundary = module, optimizer, grad_clip, True

    def __call__(self, *inputs: Any) -> Tensor:
        return self.module(*inputs)

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.boundary = boundary

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        if self.boundary:
            self.gradient = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None])
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


class BareLearner(Learner):
    """The learner's mathematics without DeepSpeed."""

    def join(self, rank: int = 0, address: tuple[str, int] | None = None) -> None:
        net, s = self.policy.net, self.settings
        self.rank, self.reference = rank, self.policy.reference() if s.beta else None
        freeze(net.model, s.freeze)
        self.engine = BareEngine(net, self._optimizer()(net.parameters()), s.grad_clip)
        self.averaged = {name: p.detach().clone() for name, p in self.policy.state_dict().items()}


class Bare:
    """One iteration as functions in one process: no fleet, no DeepSpeed, no weight sync, no tracking.

    overrides: of the training's configuration.
    """

    def __init__(self, *overrides: str) -> None:
        self.config = c = read_config(*overrides)
        self.learner = BareLearner(policy_source(c.policy), c.policy.weights, make_kernel(c), learner_settings(c), 1)
        self.learner.join()
        self.policy, self.loop = self.learner.policy, loop_settings(c)
        self.sampler = GroupSampler(self.policy, rollout_settings(c))
        self.judge = RewardWorker(partial(make_terms, c.rewards), c.fps)
        self.world = SpriteWorld(self.policy.settings.size, self.policy.settings.frames, seed=c.prompts.world_seed)

    def rollout(
        self, iteration: int, plan: Callable[[int, NoisePlan], NoisePlan] = lambda i, plan: plan
    ) -> tuple[list[GroupRollout], list[list[Replay]]]:
        """plan: what the i-th prompt's plan is changed into."""
        groups, replays, i = [], [], itertools.count()
        for chunk in chunks(self.loop, iteration):
            prompts = [self.world.prompt("train", index) for index in chunk]
            plans = [plan(next(i), self.sampler.plan(self.config.seed, iteration, p.id)) for p in prompts]
            found = self.sampler.rollout(prompts, plans, self.learner.version)
            groups += found[0]
            replays.append(found[1])
        return groups, replays

    def score(self, groups: Sequence[GroupRollout]) -> list[GroupScores]:
        return self.judge.score(groups, 0)

    def learn(self, replays: list[list[Replay]], scores: Sequence[GroupScores], iteration: int = 0) -> dict[str, float]:
        return self.learner.update(replays, credit(scores, term_weights(self.config), self.loop, iteration))

    def learn_again(self, replays: list[list[Replay]], scores: Sequence[GroupScores]) -> None:
        """The same groups once more, as if they were fresh; with learner.lr=0."""
        self.learner.version = 0
        self.learn(replays, scores)

    def iteration(self, iteration: int) -> dict[str, float]:
        groups, replays = self.rollout(iteration)
        return self.learn(replays, self.score(groups), iteration)


class FrameCounter:
    """Counts rows x latent frames that the network evaluates, as a forward hook."""

    def __init__(self, module: nn.Module) -> None:
        self.frames = 0
        module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.frames += inputs[0].shape[0] * inputs[0].shape[2]

    def taken(self) -> int:
        """The frames since the last call."""
        frames, self.frames = self.frames, 0
        return frames


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returned, and the CPU time of this process for it: other processes on the machine do not count."""
    started = time.process_time()
    return work(), time.process_time() - started


def alternate(repeats: int, sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU-seconds of each side, A B A B, after a first run of each that is not counted."""
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, work in sides.items():
            seen[name].append(cpu_seconds(work)[1])
    return {name: statistics.median(seconds[1:]) for name, seconds in seen.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in head) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def figure(name: str, measured: float, bound: str) -> dict[str, Any]:
    """A line of the summary; bound: ">= 1.3" or "<= 1.2"."""
    sign, limit = bound.split()
    held = measured >= float(limit) if sign == ">=" else measured <= float(limit)
    return {"figure": name, "measured": measured, "to reach": bound, "reached": "yes" if held else "no"}


def write(name: str, about: str, rows: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]] = (),
          machine: str = f"{platform.machine()}, one thread per process") -> None:  # fmt: skip
    """benchmarks/results/<name>.json and .md; prints the latter."""
    RESULTS.mkdir(exist_ok=True)
    found = {"about": about, "machine": machine, "rows": list(rows), "figures": list(figures)}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = f"{about}\n\nMachine: {machine}.\n\n{table(rows)}" + (f"\n{table(figures)}" if figures else "")
    (RESULTS / f"{name}.md").write_text(text)
    print(text, flush=True)
