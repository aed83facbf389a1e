"""One denoising transition x_s -> x_s' of a flow-matching policy: how it is sampled and how it is scored.

Conventions: x_s = (1-s) x0 + s eps with s from 1 (noise) to 0 (data); the network predicts v = eps - x0, so
x0^ = x - s v and eps^ = x + (1-s) v.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from policy.explore import Subspace

KERNELS = ("cps", "flow_sde", "dance")


def shifted_schedule(steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels 1 = s_0 > ... > s_N = 0 with Wan's time shift: s = a u / (1 + (a-1) u), u uniform."""
    levels = [1 - i / steps for i in range(steps + 1)]
    return tuple(shift * u / (1 + (shift - 1) * u) for u in levels)


def check_schedule(sigmas: Sequence[float]) -> None:
    """Raises ValueError unless 1 = s_0 > s_1 > ... > s_N = 0."""
    falling = all(a > b for a, b in itertools.pairwise(sigmas))
    if len(sigmas) < 2 or sigmas[0] != 1 or sigmas[-1] != 0 or not falling:
        raise ValueError(f"schedule {list(sigmas)} must fall strictly from 1 to 0")


@dataclass(frozen=True)
class Kernel:
    """The law of the selected transition.

    name "cps": mean = (1-s') x0^ + s' cos(eta pi/2) eps^, std = s' sin(eta pi/2) (Flow-CPS, arXiv 2509.05952). eta =
    0 is the Euler ODE step, eta = 1 Self-Forcing's fresh-noise renoise; the marginal std is s' for every eta. name
    "flow_sde": Euler-Maruyama of Flow-GRPO's SDE (arXiv 2505.05470), sigma = eta sqrt(s/(1-s)), the pole at s = 1
    replaced by s' inside 1-s as in its code. It overshoots the marginal std in few steps. name "dance": DanceGRPO's
    SDE (arXiv 2505.07818) with constant sigma = eta.

    amplitude scales std. With an amplitude other than 1 the mean stays on the ODE step: the marginal is not kept
    then, which a subspace of few dimensions does not feel, and a larger std reads the reward's slope above the
    scorer's noise.
    """

    name: str = "cps"
    eta: float = 0.5
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise ValueError(f"kernel {self.name!r} is none of {', '.join(KERNELS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")

    def moments(self, x: Tensor, v: Tensor, s: float, s2: float) -> tuple[Tensor, float]:
        """Mean (like x) and standard deviation of p(x_s2 | x_s) on the whole space."""
        if s2 <= 0:
            raise ValueError("the last transition (s' = 0) is deterministic and cannot be selected")
        x0, noise = x - s * v, x + (1 - s) * v
        if self.name == "cps":
            angle = self.eta * math.pi / 2
            return (1 - s2) * x0 + s2 * math.cos(angle) * noise, s2 * math.sin(angle)
        step = s2 - s
        if self.name == "flow_sde":
            g2 = self.eta**2 * s / (1 - (s if s < 1 else s2))
            return x + v * step + g2 / (2 * s) * noise * step, math.sqrt(g2 * -step)
        drift = v + 0.5 * self.eta**2 * noise / s
        return x + drift * step, self.eta * math.sqrt(-step)

    def inside(self, x: Tensor, v: Tensor, s: float, s2: float) -> tuple[Tensor, float]:
        """Mean (like x) and std as the exploration subspace sees them; outside it the step is that of an unselected
        one."""
        mean, std = self.moments(x, v, s, s2)
        return (mean, std) if self.amplitude == 1 else (ode_step(x, v, s, s2), std * self.amplitude)


def ode_step(x: Tensor, v: Tensor, s: float, s2: float) -> Tensor:
    """The deterministic Euler step of the probability-flow ODE."""
    return x + (s2 - s) * v


def transition(
    kernel: Kernel,
    subspace: Subspace,
    x: Tensor,
    v: Tensor,
    s: float,
    s2: float,
    noise: Tensor | None = None,
    coordinates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples (`noise` given) or scores (`coordinates` given) the selected transition; one function, so both agree.

    x, v [P, C, f, h, w]: the state that P groups share. noise / coordinates [P, G, ...]: standard normal / sampled
    coordinates in the subspace. Returns (coordinates [P, G, ...], log-prob [P, G]): the Gaussian log-density in fp32,
    as a MEAN over the coordinates.
    """
    x, v = x.float(), v.float()
    mean, std = kernel.inside(x, v, s, s2)
    centre = subspace.project(mean).unsqueeze(1)
    if coordinates is None:
        coordinates = (centre + std * noise).detach()
    z2 = subspace.mean_square(coordinates - centre) / std**2
    return coordinates, -0.5 * (z2 + math.log(2 * math.pi)) - math.log(std)


def place(subspace: Subspace, after: Tensor, coordinates: Tensor) -> Tensor:
    """The states [P, G, C, f, h, w] whose coordinates in the subspace are the given ones [P, G, ...]; outside it they
    are `after` [P, C, f, h, w], where an unselected step leads."""
    moved = coordinates - subspace.project(after).unsqueeze(1)
    return after.unsqueeze(1) + subspace.lift(moved)
