"""The rollout worker as the fleet runs it: with weights that arrive from the learner."""

from __future__ import annotations

from rl.weights import Weights, install
from rollout.worker import RolloutWorker


class SyncedRolloutWorker(RolloutWorker):
    """A rollout worker that takes the learner's weights."""

    def load_weights(self, weights: Weights) -> str:
        """Returns the digest of what the policy holds afterwards."""
        held = install(self.policy, weights)
        self.version = weights.version
        return held
