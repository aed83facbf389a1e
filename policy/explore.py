"""Exploration subspaces: where the noise of the selected transition lives.

A subspace has orthonormal directions U. `project` takes states to coordinates, `lift` takes coordinates back; both
work on [P, C, f, h, w] and on [P, G, C, f, h, w]. Noise outside U is zero and the transition there is the ODE step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Subspace(Protocol):
    def project(self, x: Tensor) -> Tensor: ...
    def lift(self, coordinates: Tensor) -> Tensor: ...
    def noise(self, generators: list[list[torch.Generator]]) -> Tensor:
        """Standard normal coordinates [P, G, ...], row (p, g) drawn from its own generator."""
        ...

    def mean_square(self, coordinates: Tensor) -> Tensor:
        """Mean of the squares over the coordinates, [P, G]."""
        ...

    def rows(self, index: Tensor) -> Subspace: ...


@dataclass(frozen=True)
class Basis:
    """Explicit directions: `vectors` [P, D, C, f, h, w], orthonormal or zero; coordinates [P, (G,) D], zero along the
    latter.
    """

    vectors: Tensor

    def project(self, x: Tensor) -> Tensor:
        group = "g" if x.ndim == 6 else ""
        return torch.einsum(f"pdcfhw,p{group}cfhw->p{group}d", self.vectors, x)

    def lift(self, coordinates: Tensor) -> Tensor:
        group = "g" if coordinates.ndim == 3 else ""
        return torch.einsum(f"pdcfhw,p{group}d->p{group}cfhw", self.vectors, coordinates)

    def noise(self, generators: list[list[torch.Generator]]) -> Tensor:
        drawn = _draw(generators, self.vectors.shape[1:2], self.vectors.device)
        return drawn * self._live().unsqueeze(1)

    def mean_square(self, coordinates: Tensor) -> Tensor:
        return coordinates.square().sum(-1) / self._live().sum(1, keepdim=True).clamp(min=1)

    def rows(self, index: Tensor) -> Basis:
        return Basis(self.vectors[index])

    def _live(self) -> Tensor:
        """bool [P, D]"""
        return self.vectors.flatten(2).any(2)


@dataclass(frozen=True)
class Cells:
    """Means over cells of `size` x `size` latent pixels, scaled to unit norm; size 1 is white noise.

    inside: bool [P, 1, f, h/size, w/size], the cells that belong to the subspace. Coordinates [P, (G,) C, f, h/size,
    w/size], zero where not inside.
    """

    size: int
    channels: int
    inside: Tensor

    def project(self, x: Tensor) -> Tensor:
        cells = F.avg_pool2d(x.flatten(0, -4), self.size).unflatten(0, x.shape[:-3]) * self.size
        return cells * self._inside(cells)

    def lift(self, coordinates: Tensor) -> Tensor:
        wide = coordinates.repeat_interleave(self.size, -1).repeat_interleave(self.size, -2)
        return wide / self.size

    def noise(self, generators: list[list[torch.Generator]]) -> Tensor:
        drawn = _draw(generators, (self.channels, *self.inside.shape[2:]), self.inside.device)
        return drawn * self._inside(drawn)

    def mean_square(self, coordinates: Tensor) -> Tensor:
        count = self.inside.flatten(1).sum(1) * self.channels
        return coordinates.square().flatten(2).sum(2) / count[:, None]

    def rows(self, index: Tensor) -> Cells:
        return Cells(self.size, self.channels, self.inside[index])

    def _inside(self, like: Tensor) -> Tensor:
        return self.inside if like.ndim == 5 else self.inside.unsqueeze(1)


def tangent_basis(v: Tensor, moved: Tensor, live: Tensor) -> Basis:
    """The directions in which the policy's own prediction moves when its control moves.

    v [P, C, f, h, w]: the prediction; moved [P, D, C, f, h, w]: the predictions with the drag shifted by one pixel,
    one per frame and axis; live bool [P, D]: False where nothing of the drag can be seen, and so nothing moves but
    rounding. Returns their differences, orthonormalised (QR); zero where not live, and where the drag moves nothing (a
    control that weighs nothing). "Where could the object be a bit to
    the left", in the policy's terms.
    """
    differences = (moved - v.unsqueeze(1)).flatten(2).double()
    live = live & (differences.norm(dim=2) > 1e-4 * v.double().flatten(1).norm(dim=1)[:, None])
    order = live.int().argsort(stable=True, dim=1, descending=True)  # the live ones first: no other may bend them
    rows = torch.arange(len(v), device=v.device)[:, None]
    vectors = torch.linalg.qr(differences[rows, order].transpose(1, 2)).Q.transpose(1, 2)
    vectors = vectors[rows, order.argsort(1)] * live[:, :, None]
    return Basis(vectors.float().unflatten(2, v.shape[1:]).contiguous())


def cells_near(
    tracks: Tensor, visible: Tensor, latent: tuple[int, int], stride: int, size: int, channels: int, radius: float
) -> Cells:
    """Cells within `radius` px of a visible drag point (all cells if radius is 0; always the nearest one).

    tracks [P, f, N, 2] px, visible bool [P, f, N], for the frames of the block; latent: (h, w); stride: px per latent
    pixel.
    """
    if latent[0] % size or latent[1] % size:
        raise ValueError(f"rollout.cell={size} does not divide the latent picture {latent[0]}x{latent[1]}")
    axes = [((torch.arange(n // size) + 0.5) * size * stride - 0.5) for n in latent]
    y, x = torch.meshgrid(*axes, indexing="ij")
    if not radius:
        inside = torch.ones(*tracks.shape[:2], *x.shape, dtype=torch.bool)
    else:
        centre = torch.stack((x, y), -1).to(tracks)
        far = (centre[None, None, :, :, None] - tracks[:, :, None, None]).norm(dim=-1)
        far = far.masked_fill(~visible[:, :, None, None], torch.inf).amin(-1)
        inside = (far <= radius) | (far == far.amin((2, 3), keepdim=True))
    return Cells(size, channels, inside[:, None].to(tracks.device))


def _draw(generators: list[list[torch.Generator]], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.stack([torch.randn(shape, generator=g) for g in row]) for row in generators]).to(device)
