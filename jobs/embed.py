"""Compute the text embeddings of your prompts, once, on a machine that has the text encoder.

python -m jobs.embed policy=wan_1_3b policy.path=/models/wan prompts=folder prompts.path=examples/drags
"""

from __future__ import annotations

import torch

from jobs.build import policy_source
from jobs.cli import ConfigError, job
from jobs.config import TrainConfig
from jobs.plugins import make_source
from policy.wan import read_texts


@job("embed", TrainConfig)
def main(config: TrainConfig) -> None:
    """Writes what policy.wan.text_cache lacks; later runs read it there and need no encoder."""
    source, c = policy_source(config.policy), config.prompts
    if source.wan is None:
        raise ConfigError("policy.wan is null: this policy reads no text; choose policy=wan_1_3b")
    prompts = make_source(c.kind, c.path, c.world_seed, source.wan.size, source.wan.frames)
    texts = {""}
    if c.kind != "sprites":  # whose prompts have no text
        counts = prompts.splits.counts.items()
        texts |= {prompts.prompt(split, i).text for split, count in counts for i in range(count)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = read_texts(source.path, source.wan, device=device)
    missing = encoder.missing(sorted(texts))
    encoder(sorted(texts))
    print(f"{encoder.cache}: {len(missing)} texts embedded, {len(texts) - len(missing)} were there")


if __name__ == "__main__":
    main()
