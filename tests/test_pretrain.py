import json

import pytest
import torch
from jobs_cases import run_job

from policy.policy import load_policy

TINY = [
    "size=32", "frames=5",
    "codec.channels=8", "codec.width=16", "codec.steps=12", "codec.batch=8",
    "transformer.heads=1", "transformer.layers=1", "transformer.ffn=32",
]  # fmt: skip
STAGES = {name: [f"stages.{name}.{key}" for key in ("steps=3", "batch=2", "pool=16")] for name in ("clean", "late")}
ALL = [*TINY, *STAGES["clean"], *STAGES["late"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    assert run_job("pretrain", *ALL, f"out={out}") == 0
    return out


def weights(path):
    policy = load_policy(path)
    return {**policy.state_dict(), **{f"codec.{k}": v for k, v in policy.codec.state_dict().items()}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_pretraining_writes_a_policy_after_every_stage_and_a_record(base):
    assert same(weights(base), weights(base / "late")) and not same(weights(base), weights(base / "clean"))
    lines = [json.loads(line) for line in (base / "pretrain.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["codec", "codec", "codec", "clean", "clean", "late", "late"]
    assert lines[2]["heldout_psnr"] > 0 and all("loss" in line for line in lines if "heldout_psnr" not in line)


def test_a_base_made_stage_by_stage_is_the_base_made_in_one_go(base, tmp_path):
    run = lambda out, *overrides: run_job("pretrain", *TINY, f"out={tmp_path / out}", *overrides)  # noqa: E731
    assert run("codec", "~stages.clean", "~stages.late") == 0
    assert run("clean", *STAGES["clean"], "~stages.late", f"init={tmp_path / 'codec'}") == 0
    assert run("late", *STAGES["late"], "~stages.clean", f"init={tmp_path / 'clean'}") == 0
    assert same(weights(tmp_path / "clean"), weights(base / "clean")) and same(
        weights(tmp_path / "late"), weights(base)
    )


def test_another_seed_makes_another_base(base, tmp_path):
    assert run_job("pretrain", *ALL, "seed=1", f"out={tmp_path}") == 0
    assert not same(weights(tmp_path), weights(base))
