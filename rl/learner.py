"""The DeepSpeed learner: re-evaluates the selected transitions and updates the policy. One object per rank."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import ReduceOp

from policy.causal import freeze
from policy.policy import PolicySource, load_policy
from policy.transition import Kernel
from rl.advantage import Advantages
from rl.fleet import Fleet, fetch
from rl.objective import (
    adapt_beta,
    behaviour_weight,
    clipped_ratio_loss,
    gradient_scale,
    ratio_norm,
    spread,
    velocity_divergence,
)
from rl.rng import load_rng, save_rng
from rl.safe_load import tensors_only
from rl.shards import GATHERED, held, part_of, whole
from rl.weights import Recent, Weights, pack
from rollout.records import Replay
from rollout.replay import ReplayBatch, batches, in_parts

AVERAGED = "learner/averaged.safetensors"
"""The averaged weights in float32, in checkpoints of a policy of bfloat16."""
RNG = "learner/rng_{rank}.pt"


@dataclass(frozen=True)
class LearnerSettings:
    """lr: falls linearly from this to 0 at `decay_iterations` (None: constant), so that the last steps settle.

    beta: weight of the divergence from the reference (0: there is no reference, and no divergence is known). kl_target:
    divergence that `adapt_beta` steers to, from beta on (None: beta stays). clip: of the ratio. ratio_norm: clip the
    normalised ratio in place of the plain one. ema: decay of the averaged weights (0: none).
    eps: of Adam; weights whose gradient is rounding alone (key biases) must not move by the learning rate.
    equalise_steps: weight every action by `gradient_scale`. micro_batch: replays per forward pass.
    updates_per_rollout: optimizer steps on one batch. freeze: patterns (`*`, `?`, of diffusers' names) of weights that
    are not trained. ratio_tolerance: largest |ratio - 1| of fresh groups that is allowed before the first update.
    max_staleness: updates that a group may be older than the policy; as many earlier versions of the weights are kept.
    weight_cap: of `behaviour_weight`.
    """

    lr: float
    decay_iterations: int | None
    betas: tuple[float, float]
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
    zero_stage: int
    bf16: bool
    freeze: tuple[str, ...]
    ratio_tolerance: float
    max_staleness: int
    weight_cap: float


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
        "zero_optimization": {
            "stage": settings.zero_stage,
            "stage3_max_live_parameters": GATHERED,
            "stage3_max_reuse_distance": GATHERED,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@dataclass(frozen=True)
class Evaluation:
    """A batch of replays under the policy that the update began with: v [A, C, f, h, w], logp [A, M]; and the
    reference's velocity. fresh [A, 1]: whether this very policy generated them; weight [A, M]: `behaviour_weight`, 1
    where it did; deviation [A, M]: |ratio - 1| to the policy that did.
    """

    v: Tensor
    logp: Tensor
    fresh: Tensor
    weight: Tensor
    deviation: Tensor
    reference: Tensor | None


def credit_of(batch: ReplayBatch, advantages: Advantages) -> Tensor:
    """Advantages of the batch's actions, [A, M]; 0 where the group was not scored."""
    rows = []
    for action in batch.actions:
        group, members = advantages.get(action.group_id, {}).get(action.block), list(action.members)
        rows.append(np.zeros(len(members), np.float32) if group is None else group[members])
    return torch.from_numpy(np.stack(rows))


def join(learner: Fleet) -> None:
    """Brings the ranks together; returns when all have built their engines."""
    address = fetch(learner.broadcast("address")[0])
    learner.scatter("join", [(rank, address) for rank in range(learner.spec.replicas)])


class Learner:
    """Rank `rank` of `ranks`. Call `join` on all ranks at once before anything else."""

    def __init__(
        self, policy: str | PolicySource, weights: str | None, kernel: Kernel, settings: LearnerSettings, ranks: int
    ) -> None:
        self.kernel, self.settings, self.ranks = kernel, settings, ranks
        self.policy = load_policy(policy, weights)
        self.version, self.beta, self.recent = 0, settings.beta, Recent(settings.max_staleness)
        self.updating = False

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen."""
        with socket.socket() as s:
            s.bind(("127.0.0.1" if self.ranks == 1 else "", 0))
            # Ray's, because the host's own name is a loopback address on many machines.
            host = "127.0.0.1" if self.ranks == 1 else ray.util.get_node_ip_address()
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
        if not gpu:
            self.policy.gather()
        self.reference = self.policy.reference().to("cuda" if gpu else "cpu") if s.beta else None
        if self.reference and s.bf16 and s.zero_stage == 3:  # whose policy is all of bfloat16: else they begin apart
            for p in self.reference.parameters():
                p.data = p.data.bfloat16()
        freeze(net.model, s.freeze)
        self.types = {name: p.dtype for name, p in self.policy.weights().items()}
        config = deepspeed_config(s, self.ranks)
        self.engine = deepspeed.initialize(model=net, optimizer=self._optimizer(), config=config)[0]
        # In float32 whatever the policy's type: a step of the average is finer than bfloat16 can tell.
        self.averaged = {name: held(p).float().clone() for name, p in self.policy.weights().items()}

    def _optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        """Makes AdamW after the engine has cast the weights: those that diffusers keeps in float32 in a policy of
        bfloat16 get their own values back, else the policy that learns is not the one that rolls out.
        """
        s, net = self.settings, self.policy.net
        names = {*net.model._keep_in_fp32_modules} if s.bf16 and s.zero_stage < 3 else set()  # ZeRO-3 shards one type
        kept = {p: p.data for name, p in net.named_parameters() if names & {*name.split(".")}}

        def make(_: Any) -> torch.optim.Optimizer:
            for p, own in kept.items():
                p.data = own.to(p.device, torch.float32)
            groups: dict[torch.dtype, list[Tensor]] = {}  # the engine flattens a group, so it must be of one type
            for p in net.parameters():
                if p.requires_grad:
                    groups.setdefault(p.dtype, []).append(p)
            params = [{"params": group} for group in groups.values()]
            return torch.optim.AdamW(params, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

        return make

    def update(self, replays: Sequence[Sequence[Replay]], advantages: Advantages) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps on this rank's replays (chunks as the workers made them).

        Returns means over this rank's actions. Raises ValueError when the log-probs of a fresh replay differ from the
        rollout's by more than `ratio_tolerance` before the first update: rollout and learner then do not run the same
        policy; and where a replay is more than `max_staleness` updates old.
        """
        s, self.updating = self.settings, True
        flat = [replay for chunk in replays for replay in chunk]
        ages = [self.version - replay.version for replay in flat]
        if not 0 <= min(ages) <= max(ages) <= s.max_staleness:
            raise ValueError(f"groups of {min(ages)} to {max(ages)} updates ago reached the learner at version "
                             f"{self.version}, where async.max_staleness={s.max_staleness}")  # fmt: skip
        if s.max_staleness:
            self.weights()  # so that they are kept where no rollout worker asked for them
        passes = batches(flat, s.micro_batch)
        if s.zero_stage > 1:  # with it the ranks meet in every pass
            passes = in_parts(passes, int(self._over_ranks(len(passes), ReduceOp.MAX)))
        work = [ReplayBatch(tuple(flat[i] for i in indices)) for indices in passes]
        total = sum(len(replay.actions) for replay in flat)
        before: list[Evaluation] = []
        stats = {"lr": self._set_lr()}
        for epoch in range(s.updates_per_rollout):
            sums = torch.zeros(5)
            for i, batch in enumerate(work):
                v = batch.velocity(self.policy, self.engine)
                logp = batch.log_probs(self.kernel, v)
                if epoch == 0:
                    before.append(self._evaluation(batch, v.detach(), logp.detach()))
                loss, parts = self._loss(batch, v, logp, before[i], advantages)
                sums += parts
                last = i == len(work) - 1
                if last and epoch == 0:
                    stats["ratio_deviation"] = self._check(before)
                stats |= self._descend(loss / total, last)
            stats |= dict(
                zip(("policy_loss", "kl", "clip_fraction", "ratio", "behaviour_weight"), (sums / total).tolist())
            )
        if s.kl_target:
            stats["beta"] = self.beta
            self.beta = adapt_beta(self.beta, self._over_ranks(stats["kl"]) / self.ranks, s.kl_target)
        self.version, self.updating = self.version + 1, False
        return stats if self.reference else stats | {"kl": math.nan}

    def _descend(self, loss: Tensor, last: bool) -> dict[str, float]:
        """Adds the loss's gradient to that of this update; the last one moves the weights, and tells its norm."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        sharded = self.settings.zero_stage > 0  # then the engine knows the norm, after its step
        norm = self._grad_norm() if last and not sharded else 0.0
        self.engine.step()
        if not last:
            return {}
        self._average()
        return {"grad_norm": float(self.engine.get_global_grad_norm()) if sharded else norm}

    @torch.no_grad()
    def _evaluation(self, batch: ReplayBatch, v: Tensor, logp: Tensor) -> Evaluation:
        fresh = torch.tensor([[r.version == self.version] for r in batch.replays for _ in r.actions])
        behaviour = batch.rollout_log_probs()
        weight = torch.where(fresh, 1.0, behaviour_weight(logp, behaviour, self.settings.weight_cap))
        reference = batch.velocity(self.policy, self.reference) if self.reference else None
        return Evaluation(v, logp, fresh, weight, ((logp - behaviour).exp() - 1).abs(), reference)

    def _loss(
        self, batch: ReplayBatch, v: Tensor, logp: Tensor, before: Evaluation, advantages: Advantages
    ) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the batch's actions, and the sums of (policy loss, divergence, clip fraction, ratio,
        behaviour weight)."""
        s, steps = self.settings, [(a.s, a.s2) for a in batch.actions]
        scales = [gradient_scale(self.kernel, *step, s.ratio_norm) if s.equalise_steps else 1.0 for step in steps]
        new, old = logp, before.logp
        if s.ratio_norm:
            std = torch.tensor([[spread(self.kernel, *step)] for step in steps])
            new, old = ratio_norm(new - old, batch.drift(self.kernel, v, before.v), std), torch.zeros_like(old)
        own, ratio = clipped_ratio_loss(new, old, credit_of(batch, advantages), s.clip)
        own = before.weight * own
        divergence = torch.zeros(len(v)) if before.reference is None else velocity_divergence(v, before.reference)
        clipped = ((ratio - 1).abs() > s.clip).float()
        each = (own, divergence, clipped, ratio, before.weight)
        parts = torch.stack([part.reshape(len(v), -1).mean(1).sum() for part in each])
        return (torch.tensor(scales) * own.mean(1) + self.beta * divergence).sum(), parts.detach()

    def _check(self, before: Sequence[Evaluation]) -> float:
        """The largest deviation. That of a stale group says how far the policy has moved on since."""
        # torch's max, because Python's would hide a NaN, and so would a plain 0
        own = torch.stack([torch.where(e.fresh, e.deviation, 0 * e.deviation).max() for e in before]).max().item()
        if not own <= self.settings.ratio_tolerance:
            raise ValueError(
                f"replay and rollout disagree: |ratio - 1| = {own:.2e} before the first update, above "
                f"learner.ratio_tolerance={self.settings.ratio_tolerance:.0e}"
            )
        return max(e.deviation.max().item() for e in before)

    def _set_lr(self) -> float:
        s = self.settings
        lr = s.lr * max(0.0, 1 - self.version / s.decay_iterations) if s.decay_iterations else s.lr
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _grad_norm(self) -> float:
        """Before clipping."""
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        ).item()

    def _over_ranks(self, value: float, operation: ReduceOp.RedOpType = ReduceOp.SUM) -> float:
        reduced = torch.tensor(float(value), device=self.policy.device)
        torch.distributed.all_reduce(reduced, operation)
        return reduced.item()

    def _average(self) -> None:
        for name, p in self.policy.weights().items():
            self.averaged[name].lerp_(held(p).float(), 1 - self.settings.ema)

    def _state(self, averaged: bool) -> dict[str, Tensor]:
        """The present weights, or the averaged ones in float32, whole, on the CPU; empty on all ranks but 0, and all
        must call.
        """
        state = {}
        for name, p in self.policy.weights().items():
            tensor = whole(p, self.averaged[name] if averaged else held(p))
            if self.rank == 0:
                state[name] = tensor.cpu()
        return state

    def _typed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the types of the policy that rolls out."""
        return {name: tensor.to(self.types[name]) for name, tensor in state.items()}

    def weights(self, averaged: bool = False, version: int | None = None) -> Weights | None:
        """Rank 0: the averaged weights, the present ones, or those of a `version` that is kept; other ranks: None. All
        ranks must call."""
        if version not in (None, self.version):
            return self.recent.get(version)
        if not averaged and self.version in self.recent.packed:
            return self.recent.get(self.version)
        state = self._typed(self._state(averaged))
        kept = self.recent.count > 0 and not averaged  # others are sent before the next update
        weights = pack(state, self.version, copy=kept) if self.rank == 0 else None
        return weights if averaged else self.recent.add(self.version, weights)

    def save(self, path: str) -> int:
        """Writes policy.safetensors (the averaged weights, diffusers' names) and learner/, with the weights that groups
        under way are generated by; all ranks must call. Returns the version. RuntimeError where an update has failed
        half-way."""
        if self.updating:
            raise RuntimeError(f"the update after version {self.version} has not come to its end: nothing to save")
        root = Path(path)
        client = {"version": self.version, "beta": self.beta}
        self.engine.save_checkpoint(str(root / "learner"), tag="engine", client_state=client, save_latest=False)
        save_rng(root / RNG.format(rank=self.rank))  # the engine keeps rank 0's client state alone
        averaged = self._state(averaged=True)
        if self.rank == 0:
            save_file(self._typed(averaged), root / "policy.safetensors")
            if self.settings.bf16:
                save_file(averaged, root / AVERAGED)
            self.recent.save(root / "learner", self.version)
        return self.version

    def load(self, path: str) -> list[int]:
        """Restores what `save` wrote; returns the versions of the weights that it has, its own last. ValueError where
        a file holds more than tensors."""
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        root, s = Path(path), self.settings
        with tensors_only(LossScaler, ZeroStageEnum, fragment_address):
            _, client = self.engine.load_checkpoint(str(root / "learner"), tag="engine")
        self.version = client["version"]
        load_rng(root / RNG.format(rank=self.rank))
        if s.kl_target:
            self.beta = client["beta"]
        averaged = root / (AVERAGED if s.bf16 else "policy.safetensors")
        state = load_file(averaged)
        self.averaged = {name: part_of(p, state[name]) for name, p in self.policy.weights().items()}
        self.recent.load(root / "learner", self.rank)
        self.updating = False
        return [*self.recent.packed, self.version]

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
