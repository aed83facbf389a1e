"""The loss of a selected transition: PPO's clipped ratio, and a penalty that keeps the policy near a frozen
reference.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from policy.transition import Kernel


def clipped_ratio_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 +- clip) A) per member, and rho (PPO, arXiv 1707.06347, eq. 7). All [..., G].

    The log-probs are means over the coordinates, so rho is the geometric mean of the coordinates' ratios.
    """
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage), ratio


def behaviour_weight(logp: Tensor, behaviour_logp: Tensor, cap: float) -> Tensor:
    """pi_prox / pi_behav, at most cap, without gradient: what the loss of a stale group is multiplied by. All [..., G].

    The decoupled objective of AReaL, arXiv 2505.24298, sec. 5.2 (after Hilton et al., arXiv 2110.00641): the ratio that
    is clipped is that to the policy which the update begins with (logp), so that the trust region is around it and not
    around the older policy that generated the group (behaviour_logp); this factor corrects for who generated it.
    """
    return (logp - behaviour_logp).exp().clamp(max=cap).detach()


def velocity_divergence(v: Tensor, reference: Tensor) -> Tensor:
    """|v - v_ref|^2 / 2, mean over all but the first axis: the KL between unit-variance Gaussians around the
    velocities, [R].

    It is taken on the whole latent and not in the exploration subspace: outside of it the policy is deterministic,
    and what the subspace does not see is where an unwatched picture decays.
    """
    return (v - reference).square().flatten(1).mean(1) / 2


@cache
def gradient_scale(kernel: Kernel, s: float, s2: float, normalised: bool = False) -> float:
    """The weight std / |d mean / d v| that makes every step's log-prob gradient equally long; without std for the ratio
    of `ratio_norm`.

    Cf. Flash-GRPO, arXiv 2605.15980; LongCat-Video, arXiv 2510.22200, eq. 22.
    """
    slope, std = kernel.inside(torch.zeros(1), torch.ones(1), s, s2)
    return (1.0 if normalised else std) / abs(slope.item())


@cache
def spread(kernel: Kernel, s: float, s2: float) -> float:
    """Standard deviation of the selected transition, in the exploration subspace."""
    return kernel.inside(torch.zeros(1), torch.zeros(1), s, s2)[1]


def ratio_norm(log_ratio: Tensor, drift: Tensor, std: Tensor) -> Tensor:
    """std (log rho + |mu - mu_old|^2 / (2 std^2)): RatioNorm of GRPO-Guard, arXiv 2510.22319. [A, M] from log_ratio
    [A, M], drift (the second summand) [A, 1] and std [A, 1].

    For x = mu_old + std z this is mean(z (mu - mu_old)): its mean over z is 0 and its spread that of the step in mu,
    where log rho lies below 0 on average and varies with 1 / std, so that a clip meets good members too late. Its
    gradient no longer has the factor 1 / std; `gradient_scale` divides it by |d mean / d v| (the paper: by dt, which is
    that of an ODE step).
    """
    return std * (log_ratio + drift)


def adapt_beta(beta: float, divergence: float, target: float) -> float:
    """The next weight of the divergence: larger where the divergence is above its target, smaller below.

    beta' = beta (1 + 0.1 clip(divergence / target - 1, +-0.2)), the proportional controller of Ziegler et al., arXiv
    1909.08593, sec. 2.2, a smooth form of PPO's doubling and halving, arXiv 1707.06347, sec. 4.
    """
    return beta * (1 + 0.1 * min(max(divergence / target - 1, -0.2), 0.2))
