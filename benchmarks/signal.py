"""How much signal a gradient estimate has, for every way of selecting and of exploring, on two bases.

python -m benchmarks.signal

An estimate is the gradient of one iteration of one prompt, without the divergence from the reference. With signal g and
noise e of equal law in each, the cosine c of two independent estimates is |g|^2 / (|g|^2 + |e|^2), so c / (1 - c) adds
up over estimates that are averaged: per CPU-second it says what a setting buys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Bare, cpu_seconds, write
from benchmarks.study.order import AMPLITUDES
from benchmarks.study.trial import Training, Trial

ARMS = tuple((select, explore) for select in ("trunk", "video", "frame", "all")
             for explore in ("tangent", "coarse", "white"))  # fmt: skip
TRAINED_S = 8.0


def cosines(gradients: Sequence[Tensor]) -> tuple[float, float]:
    """Mean cosine over the pairs [D], and its standard error by leaving out one estimate at a time."""
    unit = F.normalize(torch.stack(list(gradients)).double(), dim=1)
    table, n = unit @ unit.T, len(unit)
    pairs = table.sum() - table.trace()
    without = torch.stack([(pairs - 2 * (table[i].sum() - table[i, i])) / ((n - 1) * (n - 2)) for i in range(n)])
    return float(pairs / (n * (n - 1))), float(((without - without.mean()).square().sum() * (n - 1) / n).sqrt())


def measure(
    base: str, weights: Mapping[str, Tensor] | None, arms: Sequence[tuple[str, str]], estimates: int, *more: str
) -> list[dict[str, Any]]:
    """weights: of the base, None for the shipped one. more: overrides of the training's configuration."""
    rows = []
    for select, explore in arms:
        parts = Bare(f"rollout.select={select}", f"rollout.explore={explore}",
                     f"rollout.amplitude={AMPLITUDES[explore]}", "rollout.group_size=8",
                     "rollout.prompts_per_iteration=1", "rollout.prompts_per_task=1", "learner.lr=0", "learner.beta=0",
                     "seed=300", *more)  # fmt: skip
        if weights is not None:
            parts.policy.load_state_dict(weights)
        gradients, spent = [], 0.0
        parts.iteration(estimates)  # the first one also warms up
        for i in range(estimates):
            _, seconds = cpu_seconds(lambda: parts.iteration(i))  # noqa: B023
            gradients.append(parts.learner.engine.gradient)
            spent += seconds / estimates
        cosine, error = cosines(gradients)
        rows.append({"base": base, "select": select, "explore": explore, "cosine": cosine, "standard error": error,
                     "cpu_s": spent, "signal per CPU-s": cosine / (1 - cosine) / spent})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def trained(seconds: float, *more: str) -> dict[str, Tensor]:
    """The shipped policy after a training of so many CPU-seconds with the default select and explore."""
    training = Training(
        Trial("trunk", "tangent", 1e-3, 4.0, AMPLITUDES["tangent"], 1, 8, 301, (seconds,), "dev", 0), *more
    )
    training.train(seconds)
    return {name: p.detach().clone() for name, p in training.bare.policy.state_dict().items()}


def main() -> None:
    torch.set_num_threads(1)
    rows = measure("shipped", None, ARMS, 8)
    rows += measure("trained", trained(TRAINED_S), ARMS, 8)
    about = (
        "Gradients of eight iterations of one prompt each (groups of 8): mean cosine over their pairs, its standard "
        "error (jackknife), CPU-seconds of an iteration, and cosine / (1 - cosine) per CPU-second, which adds up over "
        f"iterations. Amplitudes: {', '.join(f'{k} {v:g}' for k, v in AMPLITUDES.items())}. Bases: the shipped policy, "
        f"and the same after {TRAINED_S:g} CPU-seconds of training with trunk and tangent."
    )
    write("signal", about, rows)


if __name__ == "__main__":
    main()
