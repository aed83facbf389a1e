"""Weights that ZeRO-3 spreads over the ranks: what a rank holds of each, and the whole again.

A weight is spread by its numbers in a row, equally many on each rank; the last rank's are filled up with zeros.
Without ZeRO-3 a rank holds all of it, and the functions here return what they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import all_gather, get_rank, get_world_size

GATHERED = 100_000_000
"""Numbers of weights that a rank may hold whole beyond those in use: they are needed again soon."""


def is_spread(p: nn.Parameter) -> bool:
    return hasattr(p, "ds_tensor")


def held(p: nn.Parameter) -> Tensor:
    """What this rank holds of the weight: [n] numbers where it is spread."""
    return p.ds_tensor.detach() if is_spread(p) else p.detach()


def whole(p: nn.Parameter, part: Tensor) -> Tensor:
    """The tensor of the weight's shape of which each rank gives its `part`; where it is spread all ranks must call."""
    if not is_spread(p):
        return part
    parts = [torch.empty_like(part) for _ in range(get_world_size())]
    all_gather(parts, part.contiguous())
    return torch.cat(parts)[: p.ds_numel].view(p.ds_shape)


def part_of(p: nn.Parameter, tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor of the weight's shape, on the weight's device."""
    if not is_spread(p):
        return tensor.to(p.device)
    size = p.ds_tensor.numel()
    filled = tensor.new_zeros(size * get_world_size())
    filled[: tensor.numel()] = tensor.flatten()
    return filled[get_rank() * size :][:size].to(p.device)
