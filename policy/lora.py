"""Low-rank adapters on a transformer: the base stays as it is, and with the adapter off it is the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchvision_cpu import ensure_torchvision

ensure_torchvision()

from diffusers import WanTransformer3DModel  # noqa: E402


@dataclass(frozen=True)
class LoraSettings:
    """rank, alpha: the update of a weight is alpha / rank * B A. targets: names of the linear layers, or their ends
    (to_q, ffn.net.2).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets:
            raise ValueError(f"policy.lora needs a rank of at least 1 and targets, not {self.rank} and {self.targets}")


def add_lora(model: WanTransformer3DModel, settings: LoraSettings) -> None:
    """Adds adapters that change nothing yet, in float32 and the same ones in every process; they alone are trained.

    Raises ValueError where the targets name no linear layer of the model.
    """
    from peft import LoraConfig  # here, as it takes seconds that training all weights does not need

    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"policy.lora.targets={list(settings.targets)}: {str(error).splitlines()[0]}") from error
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()


def lora_state(model: WanTransformer3DModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters alone, under PEFT's names; the model's own tensors, or those of a state of its names."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state)


def load_lora(model: WanTransformer3DModel, state: Mapping[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, dict(state))


def merge_own_lora(model: WanTransformer3DModel) -> None:
    """Adds the adapters to the weights that they belong to and takes them away."""
    model.fuse_lora()
    model.unload_lora()


class WithoutAdapter(nn.Module):
    """A `CausalWan` as it was before its adapters: the same weights, run with them off."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, *args, **kwargs) -> Tensor:
        trained = [(p, p.requires_grad) for p in self.net.parameters()]
        self.net.model.disable_adapters()
        try:
            return self.net(*args, **kwargs)
        finally:
            self.net.model.enable_adapters()  # which unfreezes them all
            for p, trains in trained:
                p.requires_grad_(trains)
