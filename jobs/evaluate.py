"""Measure a policy on held-out prompts: pure ODE sampling, fixed noise, metrics and canaries.

python -m jobs.evaluate policy.weights=outputs/train/latest/checkpoints/step_000030/policy.safetensors evaluate.seed=7
"""

from __future__ import annotations

import numpy as np

from jobs.build import first_prompt, make_judges, make_rollout_fleet, session, validate
from jobs.cli import job
from jobs.config import TrainConfig
from rl.fleet import closing
from rl.heldout import HeldOut, measure
from rl.report import side_by_side, write_mp4
from rl.run_folder import RunFolder


@job("evaluate", TrainConfig)
def main(config: TrainConfig) -> None:
    settings = validate(config)
    folder = RunFolder.at(config.run_dir, "evaluate")
    e = config.evaluate
    with session(config), closing(make_rollout_fleet(config, settings), make_judges(config)) as (rollout, judges):
        judges.dry_run(first_prompt(config, settings))
        found = measure(rollout, judges, HeldOut(e.prompts, e.seed, e.batch, e.strips))
        metrics, films = found.metrics, found.films(e.strips)
    means = {
        name: {"mean": float(np.nanmean(v)), "se": float(np.nanstd(v) / np.sqrt(np.isfinite(v).sum()))}
        for name, v in metrics.items()
    }
    for i in range(len(films.prompts)):
        rows = (
            [("policy", films.videos[i])]
            if films.truths is None
            else [("truth", films.truths[i]), ("policy", films.videos[i])]
        )
        write_mp4(folder.videos / f"{i:03d}.mp4", side_by_side([v for _, v in rows]), config.fps)
    for name, row in means.items():
        print(f"{name:28s} {row['mean']:8.4f} +- {row['se']:.4f}")
    folder.write_summary({"prompts": e.prompts, "seed": e.seed, "metrics": means})
    print(f"wrote {folder.path}")


if __name__ == "__main__":
    main()
