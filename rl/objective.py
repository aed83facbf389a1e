"""The loss of a selected transition: PPO's clipped ratio, and a penalty that keeps the policy near a frozen
reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.transition import Kernel


def clipped_ratio_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 +- clip) A) per member, and rho (PPO, arXiv 1707.06347, eq. 7). All [..., G].

    The log-probs are means over the coordinates, so rho is the geometric mean of the coordinates' ratios.
    """
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage), ratio


def velocity_divergence(v: Tensor, reference: Tensor) -> Tensor:
    """|v - v_ref|^2 / 2, mean over all but the first axis: the KL between unit-variance Gaussians around the
    velocities, [R].

    It is taken on the whole latent and not in the exploration subspace: outside of it the policy is deterministic,
    and what the subspace does not see is where an unwatched picture decays.
    """
    return (v - reference).square().flatten(1).mean(1) / 2


def gradient_scale(kernel: Kernel, s: float, s2: float) -> float:
    """The weight std / |d mean / d v| that makes every step's log-prob gradient equally long.

    Cf. Flash-GRPO, arXiv 2605.15980; LongCat-Video, arXiv 2510.22200, eq. 22.
    """
    slope, std = kernel.inside(torch.zeros(1), torch.ones(1), s, s2)
    return std / abs(slope.item())
