"""Make videos: from the sprite world, or from a folder with your own pictures and drags.

python -m jobs.generate prompts=folder prompts.path=examples/drags policy.weights=.../policy.safetensors
"""

from __future__ import annotations

import imageio.v3 as iio

from jobs.build import make_rollout_fleet, session, validate
from jobs.cli import job
from jobs.config import TrainConfig
from rl.fleet import as_completed, closing, fetch
from rl.report import draw_drag, filmstrip, write_mp4
from rl.run_folder import RunFolder


@job("generate", TrainConfig)
def main(config: TrainConfig) -> None:
    """Writes videos/<n>.mp4 and <n>.png of the first `evaluate.prompts` held-out prompts that `evaluate.seed`
    chooses.
    """
    settings, e = validate(config), config.evaluate
    folder = RunFolder.at(config.run_dir, "generate")
    indices = [e.seed * 1_000_000 + i for i in range(e.prompts)]
    chunks = [indices[i : i + e.batch] for i in range(0, len(indices), e.batch)]
    with session(config), closing(make_rollout_fleet(config, settings)) as (rollout,):
        tasks = {rollout.submit("generate", "heldout", chunk, e.seed): chunk[0] - indices[0] for chunk in chunks}
        for task in as_completed(tasks):
            films = fetch(task.result()[0])
            for i, (prompt, video) in enumerate(zip(films.prompts, films.videos), tasks[task]):
                drawn = draw_drag(video, prompt.tracks, max(256, video.shape[1]))
                write_mp4(folder.videos / f"{i:03d}.mp4", drawn, config.fps)
                iio.imwrite(folder.videos / f"{i:03d}.png", filmstrip([("policy", video)], prompt.tracks))
    print(f"wrote {e.prompts} videos to {folder.videos}")


if __name__ == "__main__":
    main()
