"""What a single key cannot tell of itself: rules, each with the line that a user reads where it does not hold."""

from __future__ import annotations

from jobs.config import AsyncConfig, LearnerConfig, RolloutConfig
from policy.transition import KERNELS
from rl.advantage import STDS
from rollout.group import EXPLORES
from rollout.plan import SELECTS

Rule = tuple[object, str]


def rollout_rules(r: RolloutConfig) -> list[Rule]:
    return [
        (r.select in SELECTS, f"rollout.select={r.select} is none of {', '.join(SELECTS)}"),
        (r.explore in EXPLORES, f"rollout.explore={r.explore} is none of {', '.join(EXPLORES)}"),
        (r.kernel in KERNELS, f"rollout.kernel={r.kernel} is none of {', '.join(KERNELS)}"),
        (r.group_size >= 2, f"rollout.group_size={r.group_size}: a group needs at least 2 members to compare"),
        (0 < r.eta <= 1, f"rollout.eta={r.eta} must lie in (0, 1]: with 0 nothing is explored"),
        (r.amplitude > 0, f"rollout.amplitude={r.amplitude} must be above 0"),
        (
            not r.renoise or r.eta == 1,
            f"rollout.renoise=true draws fresh noise at every step, which is rollout.eta=1, not {r.eta}",
        ),
        (r.cell >= 1, f"rollout.cell={r.cell} (latent pixels) must be at least 1"),
        (r.radius >= 0, f"rollout.radius={r.radius} (px; 0: everywhere) must be at least 0"),
        (r.horizon >= 0, f"rollout.horizon={r.horizon} must be at least 0"),
        (not r.antithetic or r.group_size % 2 == 0, "rollout.antithetic needs an even rollout.group_size"),
        (
            r.prompts_per_task >= 1 and r.prompts_per_iteration % r.prompts_per_task == 0,
            f"rollout.prompts_per_iteration={r.prompts_per_iteration} must be a "
            f"multiple of rollout.prompts_per_task={r.prompts_per_task}",
        ),
    ]


def learner_rules(l: LearnerConfig) -> list[Rule]:
    return [
        (l.zero_stage in (0, 1, 2, 3), f"learner.zero_stage={l.zero_stage} must be 0, 1, 2 or 3"),
        (
            l.micro_batch >= 1 and l.updates_per_rollout >= 1,
            "learner.micro_batch and learner.updates_per_rollout must be at least 1",
        ),
        (
            l.decay_iterations is None or l.decay_iterations >= 1,
            f"learner.decay_iterations={l.decay_iterations} must be at least 1, or null for a constant rate",
        ),
        (l.beta >= 0, f"learner.beta={l.beta} must be at least 0"),
        (len(l.betas) == 2, f"learner.betas={l.betas} must be the two decays of Adam"),
        (l.advantage_clip > 0, f"learner.advantage_clip={l.advantage_clip} must be above 0"),
        (l.clip > 0, f"learner.clip={l.clip} must be above 0"),
        (0 <= l.ema < 1, f"learner.ema={l.ema} must lie in [0, 1)"),
        (
            l.kl_target is None or (l.kl_target > 0 and l.beta > 0),
            f"learner.kl_target={l.kl_target} (null: beta stays) must be above 0, and learner.beta={l.beta} too",
        ),
        (l.advantage_std in STDS, f"learner.advantage_std={l.advantage_std} is none of {', '.join(STDS)}"),
    ]


def async_rules(a: AsyncConfig) -> list[Rule]:
    return [
        (a.max_staleness >= 0, f"async.max_staleness={a.max_staleness} must be at least 0"),
        (a.weight_cap >= 1, f"async.weight_cap={a.weight_cap} must be at least 1, the weight of a fresh group"),
    ]
