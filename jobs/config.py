"""The schema of the training configuration: every key, its type; the defaults live in conf/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from omegaconf import MISSING

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], *parts: Any) -> Settings:
    """The settings that a library function takes, read by name from the parts of the configuration that have them;
    lists become tuples.
    """
    values = {f.name: getattr(part, f.name) for f in fields(kind) for part in parts if hasattr(part, f.name)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass
class WanConfig:
    """What `policy.wan.WanSettings` says."""

    height: int
    width: int
    frames: int
    block: int
    sigmas: list[float]
    window: int | None
    sink: int
    features: str
    background: str
    drag_sigma: float
    drag_window: float
    base: str | None
    text_cache: str
    text_length: int
    dtype: str
    codec_dtype: str
    decode_rows: int | None
    attention: str
    gradient_checkpointing: bool


@dataclass
class LoraConfig:
    """What `policy.lora.LoraSettings` says; rank 0: the transformer's own weights are trained."""

    rank: int
    alpha: float
    targets: list[str]


@dataclass
class PolicyConfig:
    """wan: null = the folder's policy.json tells what it holds."""

    path: str
    weights: str | None
    wan: WanConfig | None
    lora: LoraConfig


@dataclass
class PromptsConfig:
    kind: str
    path: str | None
    world_seed: int


@dataclass
class RolloutConfig:
    select: str
    explore: str
    group_size: int
    prompts_per_iteration: int
    prompts_per_task: int
    kernel: str
    eta: float
    amplitude: float
    horizon: int
    cell: int
    radius: float
    antithetic: bool
    renoise: bool
    compile: bool


@dataclass
class TermConfig:
    """fn: {_target_: ...} of a class or factory, or a string naming a function or class ("module:function",
    "file.py:function"); args: its keyword arguments then. range: [worst, best] score. role: train or canary.
    fleet: of workers that hold the term: null = one of its own, else a name; terms with the same name share, and
    "reward" is that of cluster.reward. worker: what the fleet has instead of the settings of cluster.reward.
    """

    fn: Any = MISSING
    args: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    floor: float = 0.05
    range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    role: str = "train"
    fleet: str | None = None
    worker: dict[str, Any] = field(default_factory=dict)


@dataclass
class LearnerConfig:
    lr: float
    decay_iterations: int | None
    betas: list[float]
    eps: float
    weight_decay: float
    grad_clip: float
    beta: float
    kl_target: float | None
    clip: float
    ratio_norm: bool
    ema: float
    equalise_steps: bool
    micro_batch: int
    updates_per_rollout: int
    reward_to_go: bool
    advantage_clip: float
    advantage_std: str
    best_and_worst: int | None
    permute_advantages: bool
    ranks: int
    zero_stage: int
    bf16: bool
    freeze: list[str]
    ratio_tolerance: float


@dataclass
class RoleConfig:
    replicas: int
    num_cpus: float
    num_gpus: float
    timeout_s: float
    retries: int


@dataclass
class RewardRoleConfig(RoleConfig):
    """batch_size: most clips that a term is given at once; null = all. memory_gb: what a worker may hold before it is
    replaced; null = anything. runtime_env: Ray's, for its processes: packages, py_modules, working_dir, env_vars."""

    batch_size: int | None
    memory_gb: float | None
    runtime_env: dict[str, Any]


@dataclass
class ClusterConfig:
    """placement: null, colocated or apart; see `rl.placement`."""

    backend: str
    address: str
    fault_share: float
    placement: str | None
    stall_s: float
    rollout: RoleConfig
    reward: RewardRoleConfig
    learner: RoleConfig


@dataclass
class TrackingConfig:
    """system_metrics: log what every node is busy with. register: the name in MLflow's model registry under which the
    tuned policy is exported with its report; null = it is not. parent: id of the MLflow run that this one is shown
    under, as those of a sweep are; null = none."""

    uri: str | None
    experiment: str
    required: bool
    system_metrics: bool
    register: str | None
    parent: str | None


@dataclass
class EvaluateConfig:
    """every: iterations between evaluations of a training; null = only before and after it. patience: evaluations in a
    row in which the reward rises and a canary falls before that is an alarm. stop: and the end of the training.
    """

    prompts: int
    seed: int
    batch: int
    strips: int
    every: int | None
    patience: int
    stop: bool


@dataclass
class LoopConfig:
    """keep_checkpoints: how many of those saved last stay, besides every `keep_every`-th step (null: none) and the best
    on held-out prompts. checkpoint_url: where they are copied to, anything that fsspec writes; null = nowhere.
    max_recoveries: how often the job goes back to its last checkpoint, where the learner or results are lost for good.
    grace_s: from SIGTERM or SIGINT until the process ends, whatever it still does.
    """

    iterations: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int | None
    checkpoint_url: str | None
    max_recoveries: int
    grace_s: float


@dataclass
class AsyncConfig:
    """What `rl.pipeline` and `rl.objective.behaviour_weight` say."""

    max_staleness: int
    weight_cap: float


def with_key(key: str, kind: type) -> Callable[[type], type]:
    """Makes a dataclass with one more field, whose name is a keyword of Python: getattr(config, key) reads it."""

    def decorate(schema: type) -> type:
        schema.__annotations__[key] = kind
        setattr(schema, key, field(init=False, repr=False, compare=False))
        return dataclass(schema)

    return decorate


@with_key("async", AsyncConfig)
class TrainConfig:
    seed: int
    run_dir: str | None
    resume: str
    policy: PolicyConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    rewards: dict[str, Any]  # of TermConfig; plain, so that `+rewards.mine.fn=...` can add one
    learner: LearnerConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    evaluate: EvaluateConfig
    train: LoopConfig
    fps: float = 8.0
