"""Write a policy's transformer for others to use: as a folder that stock diffusers loads, or in Wan2.1's own names.

python -m jobs.export policy.weights=outputs/train/latest/checkpoints/step_000030/policy.safetensors out=exported
python -m jobs.export policy.path=/models/self_forcing_dmd.pt in_channels=36 out=/models/self_forcing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.cli import job, require
from jobs.config import PolicyConfig, settings_of
from policy.files import check_fit, read_weights
from policy.lora import LoraSettings, add_lora, load_lora, lora_state, merge_own_lora
from policy.wan_formats import LAYOUTS, locate, merge_lora, read_wan, write_wan

from diffusers import WanTransformer3DModel  # isort: skip  (after policy.wan_formats has readied torchvision)

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ExportConfig:
    policy: PolicyConfig
    download: bool
    in_channels: int | None
    dtype: str | None
    adapter: str | None
    layout: str
    out: str


@job("export", ExportConfig)
def main(config: ExportConfig) -> None:
    """Reads policy.path in any format, with policy.weights in place of its own if given, and writes `out`."""
    validate(config)
    model = read_wan(locate(config.policy.path, config.download), DTYPES[config.dtype], config.in_channels)
    lora = config.policy.lora.rank > 0
    if lora:
        add_lora(model, settings_of(LoraSettings, config.policy.lora))
    if config.policy.weights:
        state = read_weights(config.policy.weights)
        check_fit(lora_state(model) if lora else model.state_dict(), state, config.policy.weights)
        (load_lora if lora else WanTransformer3DModel.load_state_dict)(model, state)
    if lora:
        merge_own_lora(model)
    if config.adapter:
        model = merge_lora(model, config.adapter)
    write_wan(model, config.out, config.layout)
    print(f"wrote {config.out}: {model.num_parameters():,} parameters, {config.layout} names")


def validate(config: ExportConfig) -> None:
    """Raises ConfigError naming the key, before anything is read."""
    rules = [
        (config.layout in LAYOUTS, f"layout={config.layout} is none of {', '.join(LAYOUTS)}"),
        (config.dtype in DTYPES, f"dtype={config.dtype} is none of {', '.join(filter(None, DTYPES))}"),
        (not Path(config.out).exists(), f"out={config.out} exists; remove it or choose another"),
    ]
    require(rules)


if __name__ == "__main__":
    main()
