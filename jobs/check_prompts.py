"""Read every one of your prompts before a training does: what is wrong with which row.

python -m jobs.check_prompts prompts=table prompts.path=outputs/drags.parquet
"""

from __future__ import annotations

from jobs.build import validate
from jobs.cli import ConfigError, job
from jobs.config import TrainConfig
from jobs.plugins import make_source
from rollout.prompts import PromptError


@job("check_prompts", TrainConfig)
def main(config: TrainConfig) -> None:
    """Prints every faulty row and how many prompts each split has; exit status 1 where a row is faulty."""
    settings, c = validate(config), config.prompts
    if c.kind == "sprites":
        raise ConfigError("prompts=sprites are drawn, with nothing to check; choose prompts=folder or prompts=table")
    source = make_source(c.kind, c.path, c.world_seed, settings.size, settings.frames)
    faulty = 0
    for split, count in source.splits.counts.items():
        for index in range(count):
            try:
                source.prompt(split, index)
            except PromptError as error:
                faulty += 1
                print(error)
    train, heldout = source.splits.counts.values()
    if faulty:
        raise PromptError(f"{faulty} of {train + heldout} rows of {c.path} cannot be used; mend them or take them out")
    print(f"{c.path}: {train} prompts to train on, {heldout} held out")


if __name__ == "__main__":
    main()
