"""Which settings a run may change when it goes on, and what it changed."""

from __future__ import annotations

from typing import Any

from jobs.cli import ConfigError
from rl.tracking import flatten

FIXED = {
    "seed": "it chooses the prompts and their noise",
    "policy": "weights and optimizer were made for it, and its first weights are what the divergence is measured from",
    "learner.ranks": "the optimizer's state and the generators are stored per rank",
    "learner.zero_stage": "the optimizer's state is laid out by it",
    "learner.bf16": "the optimizer's state is laid out by it",
    "learner.freeze": "the optimizer's state is that of the weights that are trained",
}
FREE = {  # of the policy: how it is computed, not what it is
    "policy.wan.attention",
    "policy.wan.decode_rows",
    "policy.wan.gradient_checkpointing",
    "policy.wan.text_cache",
}
SILENT = {"run_dir", "resume"}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line `key: old -> new` for every setting that a resumed run changes; everything that is not FIXED may be.

    before, now: whole configurations, nested. Raises ConfigError naming the first key that must stay as it was.
    """
    old, new = flatten(before), flatten(now)
    lines = []
    for key in sorted((old.keys() | new.keys()) - SILENT):
        line = f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        if old.get(key) == new.get(key):
            continue
        for fixed, why in FIXED.items():
            # A key that was absent is one of a later version, or of a setting that is refused by another key.
            if key in old and key not in FREE and f"{key}.".startswith(f"{fixed}."):
                raise ConfigError(f"{line}: a run that goes on cannot change {fixed}, because {why}; "
                                  "restore it, or choose another run_dir")  # fmt: skip
        lines.append(line)
    return lines
