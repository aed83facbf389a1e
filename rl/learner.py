"""The DeepSpeed learner: re-evaluates the selected transitions and updates the policy. One object per rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy.causal import freeze
from policy.policy import PolicySource, load_policy
from policy.transition import Kernel
from rl.advantage import Advantages
from rl.objective import clipped_ratio_loss, gradient_scale, velocity_divergence
from rl.weights import Weights, pack
from rollout.records import Replay
from rollout.replay import ReplayBatch, batches


@dataclass(frozen=True)
class LearnerSettings:
    """lr: falls linearly from this to 0 at `decay_iterations` (None: constant), so that the last steps settle.

    beta: weight of the divergence from the reference. clip: of the ratio. ema: decay of the averaged weights (0: none).
    eps: of Adam; weights whose gradient is rounding alone (key biases) must not move by the learning rate.
    equalise_steps: weight every action by `gradient_scale`. micro_batch: replays per forward pass.
    updates_per_rollout: optimizer steps on one batch. freeze: patterns (`*`, `?`, of diffusers' names) of weights that
    are not trained. ratio_tolerance: largest |ratio - 1| that is allowed before the first update.
    """

    lr: float
    decay_iterations: int | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    beta: float
    clip: float
    ema: float
    equalise_steps: bool
    micro_batch: int
    updates_per_rollout: int
    zero_stage: int
    bf16: bool
    freeze: tuple[str, ...]
    ratio_tolerance: float


def deepspeed_config(settings: LearnerSettings, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration as a pure function of ours; micro-batches are accumulated by hand, their number
    varies.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "gradient_clipping": settings.grad_clip,
        "steps_per_print": 10**9,
        "bf16": {"enabled": settings.bf16},
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Learner:
    """Rank `rank` of `ranks`. Call `join` on all ranks at once before anything else."""

    def __init__(
        self, policy: str | PolicySource, weights: str | None, kernel: Kernel, settings: LearnerSettings, ranks: int
    ) -> None:
        self.kernel, self.settings, self.ranks = kernel, settings, ranks
        self.policy = load_policy(policy, weights)
        self.version = 0

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen."""
        with socket.socket() as s:
            s.bind(("127.0.0.1" if self.ranks == 1 else "", 0))
            host = "127.0.0.1" if self.ranks == 1 else socket.gethostbyname(socket.gethostname())
            return host, s.getsockname()[1]

    def join(self, rank: int, address: tuple[str, int]) -> None:
        """Builds the engine; returns when all ranks have."""
        self.rank = rank
        gpu = torch.cuda.is_available()
        os.environ.update(
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
            RANK=str(rank),
            WORLD_SIZE=str(self.ranks),
            LOCAL_RANK="0",
        )
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
        import deepspeed
        import deepspeed.ops

        if (
            not gpu
        ):  # else DeepSpeed compiles a shared-memory operator for minutes, and a killed build hangs every later one
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(
                "nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=5)
            )
        net, s = self.policy.net, self.settings
        self.reference = self.policy.reference().to("cuda" if gpu else "cpu")
        freeze(net.model, s.freeze)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
        self.engine = deepspeed.initialize(model=net, optimizer=optimizer, config=deepspeed_config(s, self.ranks))[0]
        self.averaged = {name: p.detach().clone() for name, p in self.policy.state_dict().items()}

    def update(self, replays: Sequence[Sequence[Replay]], advantages: Advantages) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps on this rank's replays (chunks as the workers made them).

        Returns means over this rank's actions. Raises ValueError when the replay's log-probs differ from the
        rollout's by more than `ratio_tolerance` before the first update: rollout and learner then do not run the same
        policy.
        """
        flat = [replay for chunk in replays for replay in chunk]
        work = [ReplayBatch(tuple(flat[i] for i in indices)) for indices in batches(flat, self.settings.micro_batch)]
        total = sum(len(replay.actions) for replay in flat)
        old: list[list[Tensor]] = []
        stats = {"lr": self._set_lr()}
        for epoch in range(self.settings.updates_per_rollout):
            sums = torch.zeros(4)
            deviations: list[Tensor] = []
            for i, batch in enumerate(work):
                v = batch.velocity(self.policy, self.engine)
                logp = batch.log_probs(self.kernel, v)
                if epoch == 0:
                    old.append([lp.detach() for lp in logp])
                    deviations += [((a - b).exp() - 1).abs().max() for a, b in zip(old[i], batch.rollout_log_probs())]
                with torch.no_grad():
                    v_ref = batch.velocity(self.policy, self.reference)
                loss, parts = self._loss(batch, v, v_ref, logp, old[i], advantages)
                sums += parts
                self.engine.set_gradient_accumulation_boundary(i == len(work) - 1)
                self.engine.backward(loss / total)
                if i == len(work) - 1:
                    if epoch == 0:
                        stats["ratio_deviation"] = self._check(deviations)
                    stats["grad_norm"] = self._grad_norm()
                self.engine.step()
            self._average()
            stats |= dict(zip(("policy_loss", "kl", "clip_fraction", "ratio"), (sums / total).tolist()))
        self.version += 1
        return stats

    def _loss(self, batch: ReplayBatch, v, v_ref, logp, old, advantages: Advantages) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the batch's actions, and the sums of (policy loss, divergence, clip fraction, ratio)."""
        loss, parts = torch.zeros(()), torch.zeros(4)
        for j, actions in enumerate(batch.actions):
            divergence = velocity_divergence(v[j], v_ref[j])
            for r, action in enumerate(actions):
                group = advantages.get(action.group_id, {}).get(action.block)
                scale = gradient_scale(self.kernel, action.s, action.s2) if self.settings.equalise_steps else 1.0
                if group is None:
                    own, ratio = torch.zeros(1), torch.ones(1)
                else:
                    a = torch.tensor(group[list(action.members)]).to(v[j])
                    own, ratio = clipped_ratio_loss(logp[j][r], old[j][r], a, self.settings.clip)
                loss = loss + scale * own.mean() + self.settings.beta * divergence[r]
                clipped = ((ratio - 1).abs() > self.settings.clip).float().mean()
                parts += torch.stack((own.mean(), divergence[r], clipped, ratio.mean())).detach().cpu()
        return loss, parts

    def _check(self, deviations: Sequence[Tensor]) -> float:
        deviation = torch.stack(list(deviations)).max().item()  # torch's max, because Python's would hide a NaN
        if not deviation <= self.settings.ratio_tolerance:
            raise ValueError(
                f"replay and rollout disagree: |ratio - 1| = {deviation:.2e} before the first update, above "
                f"learner.ratio_tolerance={self.settings.ratio_tolerance:.0e}"
            )
        return deviation

    def _set_lr(self) -> float:
        s = self.settings
        lr = s.lr * max(0.0, 1 - self.version / s.decay_iterations) if s.decay_iterations else s.lr
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _grad_norm(self) -> float:
        """Before clipping, over all ranks. ZeRO shards gradients and knows their norm only after its step: its last
        one.
        """
        if self.settings.zero_stage:
            return float(self.engine.get_global_grad_norm() or 0.0)
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        ).item()

    def _average(self) -> None:
        for name, p in self.policy.state_dict().items():
            self.averaged[name].lerp_(p.detach(), 1 - self.settings.ema)

    def weights(self, averaged: bool = False) -> Weights | None:
        """Rank 0: the present (or averaged) weights; other ranks: None."""
        state = self.averaged if averaged else self.policy.state_dict()
        return pack(state, self.version) if self.rank == 0 else None

    def save(self, path: str) -> None:
        """Writes policy.safetensors (the averaged weights, diffusers' names) and learner/; all ranks must call."""
        root = Path(path)
        rng = {"torch": torch.get_rng_state()}
        self.engine.save_checkpoint(
            str(root / "learner"), tag="engine", client_state={"version": self.version, "rng": rng}, save_latest=False
        )
        if self.rank == 0:
            save_file(self.averaged, root / "policy.safetensors")

    def load(self, path: str) -> int:
        """Restores what `save` wrote; returns the version."""
        root = Path(path)
        _, client = self.engine.load_checkpoint(str(root / "learner"), tag="engine")
        self.version = client["version"]
        torch.set_rng_state(client["rng"]["torch"])
        self.averaged = load_file(root / "policy.safetensors")
        return self.version

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
