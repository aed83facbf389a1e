"""From a checked configuration to the parts of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.cli import ConfigError, require
from jobs.config import PolicyConfig, RoleConfig, TrainConfig, settings_of
from jobs.plugins import make_source, make_terms, read_fleets, read_sources, read_terms
from jobs.rules import async_rules, learner_rules, rollout_rules
from policy.lora import LoraSettings
from policy.policy import PolicySource, Settings
from policy.transition import Kernel
from policy.wan import WanSettings
from rl.advantage import TermWeight
from rl.fleet import Fleet, FleetSpec, make_fleet
from rl.judges import Judges
from rl.learner import Learner, LearnerSettings, join
from rl.loop import LoopSettings
from rl.placement import STRATEGIES, reserved
from rl.ray_fleet import ray_session
from rl.reward_worker import RewardWorker
from rl.rollout_worker import SyncedRolloutWorker
from rl.stall import WATCHDOG
from rollout.group import RolloutSettings
from rollout.prompts import DragPrompt


def validate(c: TrainConfig) -> Settings:
    """Checks what no single key can: raises ConfigError naming the keys, before anything is started."""
    r, l = c.rollout, c.learner
    settings = policy_source(c.policy).settings()
    blocks, terms = len(settings.sizes) - 1, read_terms(c.rewards)
    rules = [
        *rollout_rules(r),
        *learner_rules(l),
        *async_rules(getattr(c, "async")),
        (r.horizon < blocks, f"rollout.horizon={r.horizon} must lie in 0..{blocks - 1}"),
        (
            r.prompts_per_iteration // max(1, r.prompts_per_task) % l.ranks == 0,
            f"learner.ranks={l.ranks} must divide the number of rollout "
            "tasks, rollout.prompts_per_iteration / rollout.prompts_per_task",
        ),
        (c.cluster.backend in ("inline", "ray"), f"cluster.backend={c.cluster.backend} must be inline or ray"),
        (
            c.cluster.backend == "ray" or l.ranks == 1,
            f"learner.ranks={l.ranks} needs cluster=local or ray: ranks are processes",
        ),
        (
            l.best_and_worst is None or 1 <= l.best_and_worst <= r.group_size // 2,
            f"learner.best_and_worst={l.best_and_worst} (null: all learn) must lie in 1..{r.group_size // 2}, half of "
            "rollout.group_size",
        ),
        (
            any(t.role == "train" for t in terms.values()),
            "rewards: no term has role: train, nothing would be learnt",
        ),
        (
            c.prompts.kind in ("sprites", "folder", "table"),
            f"prompts.kind={c.prompts.kind} must be sprites, folder or table",
        ),
        (
            c.prompts.kind != "sprites" or isinstance(settings.size, int),
            f"prompts=sprites are square, but the policy's pictures are {settings.size}",
        ),
        (c.prompts.kind != "folder" or c.prompts.path, "prompts.path is missing: the folder with prompts.jsonl"),
        (c.prompts.kind != "table" or c.prompts.path, "prompts.path is missing: the Parquet or the dataset on disk"),
        (
            c.train.iterations >= 1 and c.train.checkpoint_every >= 1,
            "train.iterations and train.checkpoint_every must be at least 1",
        ),
        (
            c.train.keep_checkpoints >= 1 and (c.train.keep_every is None or c.train.keep_every >= 1),
            "train.keep_checkpoints and train.keep_every (null: none) must be at least 1",
        ),
        (c.train.max_recoveries >= 0, f"train.max_recoveries={c.train.max_recoveries} must be at least 0"),
        (
            c.tracking.register is None or (c.tracking.uri and not {*"/:%"} & {*c.tracking.register}),
            f"tracking.register={c.tracking.register} (null: no) must have none of / : %, and needs tracking.uri",
        ),
        (c.fps > 0, f"fps={c.fps} must be above 0"),
        (c.seed >= 0, f"seed={c.seed} must be at least 0"),
        (
            c.cluster.learner.replicas == 1 and c.cluster.learner.retries == 0,
            "cluster.learner.replicas and .retries have no effect: learner.ranks says how many ranks there are, "
            "train.max_recoveries what happens when one is lost",
        ),
        (c.train.grace_s > 0, f"train.grace_s={c.train.grace_s} must be above 0"),
        (
            c.cluster.placement in (None, *STRATEGIES),
            f"cluster.placement={c.cluster.placement} must be {', '.join(STRATEGIES)} or null",
        ),
        (c.cluster.stall_s > 0, f"cluster.stall_s={c.cluster.stall_s} must be above 0"),
        (0 <= c.cluster.fault_share < 1, f"cluster.fault_share={c.cluster.fault_share} must lie in [0, 1)"),
        (
            c.evaluate.prompts >= 1 and c.evaluate.batch >= 1 and c.evaluate.strips >= 0,
            "evaluate.prompts and evaluate.batch must be at least 1, evaluate.strips at least 0",
        ),
        (
            (c.evaluate.every is None or c.evaluate.every >= 1) and c.evaluate.patience >= 1,
            "evaluate.every (null: never) and evaluate.patience must be at least 1",
        ),
    ]
    require(rules)
    fleet_specs(c)
    read_sources(terms)
    make_source(c.prompts.kind, c.prompts.path, c.prompts.world_seed, settings.size, settings.frames)
    return settings


def policy_source(c: PolicyConfig) -> PolicySource:
    """Raises ValueError naming the key that cannot be."""
    lora = settings_of(LoraSettings, c.lora) if c.lora.rank else None
    if c.wan is None:
        return PolicySource(c.path, None, lora)
    wan = settings_of(WanSettings, c.wan)
    cache, base = (p and str(Path(p).resolve()) for p in (wan.text_cache, wan.base))
    return PolicySource(str(Path(c.path).resolve()), replace(wan, text_cache=cache, base=base), lora)


def term_weights(c: TrainConfig) -> dict[str, TermWeight]:
    return {name: TermWeight(t.weight, t.floor) for name, t in read_terms(c.rewards).items() if t.role == "train"}


def make_kernel(c: TrainConfig) -> Kernel:
    return Kernel(c.rollout.kernel, c.rollout.eta, c.rollout.amplitude)


def rollout_settings(c: TrainConfig) -> RolloutSettings:
    r = c.rollout
    return RolloutSettings(
        r.select, r.group_size, r.explore, make_kernel(c), r.horizon, r.cell, r.radius, r.antithetic, r.renoise
    )


def loop_settings(c: TrainConfig) -> LoopSettings:
    return LoopSettings(
        seed=c.seed,
        iterations=c.train.iterations,
        prompts_per_iteration=c.rollout.prompts_per_iteration,
        prompts_per_task=c.rollout.prompts_per_task,
        reward_to_go=c.learner.reward_to_go,
        advantage_clip=c.learner.advantage_clip,
        permute=c.learner.permute_advantages,
        checkpoint_every=c.train.checkpoint_every,
        evaluate_every=c.evaluate.every,
        advantage_std=c.learner.advantage_std,
        best_and_worst=c.learner.best_and_worst,
        max_staleness=getattr(c, "async").max_staleness,
        max_recoveries=c.train.max_recoveries,
    )


def learner_settings(c: TrainConfig) -> LearnerSettings:
    return settings_of(LearnerSettings, c.learner, getattr(c, "async"))


def first_prompt(c: TrainConfig, settings: Settings) -> DragPrompt:
    """What rewards are tried on before anything else."""
    source = make_source(c.prompts.kind, c.prompts.path, c.prompts.world_seed, settings.size, settings.frames)
    return source.prompt("train", 0)


@contextmanager
def session(c: TrainConfig) -> Iterator[None]:
    if c.cluster.backend == "inline":
        yield
    else:
        WATCHDOG.after_s = c.cluster.stall_s
        with ray_session(c.cluster.address):
            yield


@contextmanager
def places(c: TrainConfig) -> Iterator[None]:
    """Those of `cluster.placement`, for all workers of a training."""
    with reserved(list(fleet_specs(c).values()), c.cluster.placement if c.cluster.backend == "ray" else None):
        yield


def make_rollout_fleet(c: TrainConfig, settings: Settings) -> Fleet:
    source = partial(make_source, c.prompts.kind, c.prompts.path, c.prompts.world_seed, settings.size, settings.frames)
    args = (policy_source(c.policy), c.policy.weights, rollout_settings(c), source, c.seed, c.rollout.compile)
    return make_fleet(c.cluster.backend, SyncedRolloutWorker, fleet_specs(c)["rollout"], args)


def make_judges(c: TrainConfig) -> Judges:
    """The reward fleets. The text of users' files goes along: their workers need not see this machine's disk."""
    terms, specs, fleets, held = read_terms(c.rewards), fleet_specs(c), {}, {}
    sources = read_sources(terms)
    for name, (names, role) in read_fleets(terms, c.cluster.reward).items():
        make = partial(make_terms, {n: asdict(terms[n]) for n in names}, {n: sources[n] for n in names})
        args = (make, c.fps, role.batch_size)
        fleets[name], held[name] = make_fleet(c.cluster.backend, RewardWorker, specs[name], args), names
    return Judges(fleets, held, c.cluster.fault_share)


def make_learner(c: TrainConfig) -> Fleet:
    args = (policy_source(c.policy), c.policy.weights, make_kernel(c), learner_settings(c), c.learner.ranks)
    return join_learner(c, Learner, args)


def join_learner(c: Any, kind: type[Learner], args: tuple) -> Fleet:
    """The ranks of a learner, joined. c: a configuration with policy, learner and cluster. ConfigError where weights of
    bfloat16 would be all that is kept of an update.
    """
    if c.policy.wan and c.policy.wan.dtype == "bfloat16" and not (c.learner.bf16 or c.policy.lora.rank):
        raise ConfigError(
            "learner.bf16=false would train policy.wan.dtype=bfloat16 without float32 copies; give learner.bf16=true, "
            "or train adapters with policy.lora.rank"
        )
    fleet = make_fleet(c.cluster.backend, kind, learner_spec(c), args)
    join(fleet)
    return fleet


def fleet_specs(c: TrainConfig) -> dict[str, FleetSpec]:
    """What every fleet of a training asks for, by name: "rollout", those that judge, "learner"."""
    # A reward call that was late once would be late again: an iteration waits for it once.
    reward = {
        name: _spec(name, role, retry_timeouts=False, memory_gb=role.memory_gb, runtime_env=role.runtime_env)
        for name, (_, role) in read_fleets(read_terms(c.rewards), c.cluster.reward).items()
    }
    return {"rollout": _spec("rollout", c.cluster.rollout), **reward, "learner": learner_spec(c)}


def learner_spec(c: Any) -> FleetSpec:
    """c: as `join_learner` takes it."""
    ranks = replace(c.cluster.learner, replicas=c.learner.ranks, retries=0)
    return _spec("learner", ranks, replace=False)


def _spec(name: str, role: RoleConfig, **more: Any) -> FleetSpec:
    return FleetSpec(
        name,
        role.replicas,
        role.num_cpus,
        role.num_gpus,
        role.timeout_s,
        start_timeout_s=300,
        retries=role.retries,
        **more,
    )
