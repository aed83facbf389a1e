"""`python -m jobs.plan`: what it reads, prints and refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from jobs_cases import run_job
from wan_cases import SETTINGS, wan_policy, write_folder

from policy.wan_formats import read_wan, to_original
from rl.meta import meta_parts


def plan(capsys, *overrides) -> tuple[int, str, str]:
    capsys.readouterr()
    status = run_job("plan", *overrides)
    return status, *capsys.readouterr()


def test_the_plan_is_printed_for_1_8_and_32_gpus_without_weights(capsys):
    status, out, _ = plan(capsys, "policy=wan_1_3b")
    assert status == 0 and "1,419.1 M weights" in out
    assert all(word in out for word in ("1 GPU ", "8 GPUs", "32 GPUs", "optimizer", "KV cache", "iteration, s"))
    small = ("policy.wan.height=240", "policy.wan.width=416", "policy.lora.rank=8")
    status, out, _ = plan(capsys, "policy=wan_1_3b", *small, "gpus=[1]")
    assert status == 0 and "8 GPUs" not in out and "10.9 M trained, 390 tokens" in " ".join(out.split())
    status, out, _ = plan(capsys)
    assert status == 0 and "2.0 M weights, 0.3 M trained" in out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text-to-video Wan, whose control channels are added when it is read."""
    return write_folder(tmp_path_factory.mktemp("wan"))


def test_a_wan_that_is_there_is_planned_from_its_files_and_not_from_its_weights(folder, tmp_path, capsys):
    policy = wan_policy(folder)
    count = policy.net.model.num_parameters()
    state = {f"model.{to_original(name)}": tensor for name, tensor in read_wan(folder).state_dict().items()}
    torch.save({"generator_ema": state}, tmp_path / "student.pt")
    shutil.copy(folder / "transformer/config.json", tmp_path)  # weights of this size do not show their heads
    student = wan_policy(tmp_path / "student.pt", base=str(folder), text_cache=str(folder / "text_cache"))
    student.save(tmp_path / "saved")
    for path, base in ((folder, None), (tmp_path / "student.pt", str(folder)), (tmp_path / "saved", None)):
        settings = replace(SETTINGS, base=base)
        model, codec = meta_parts(str(path), settings)
        assert (sum(p.numel() for p in model.parameters()), model.config.in_channels) == (count, 36)
        assert all(p.is_meta for p in (*model.parameters(), *codec.parameters()))
        assert sum(p.numel() for p in codec.parameters()) == sum(p.numel() for p in policy.codec.parameters())
    shape = f"{count / 1e6:,.1f} M weights"
    small = ("policy.wan.height=32", "policy.wan.width=48", "gpus=[1]")
    for given in (
        ["policy=wan_1_3b", f"policy.path={folder}", *small],
        [f"policy.path={tmp_path / 'saved'}", "gpus=[1]"],
    ):
        status, out, _ = plan(capsys, *given)
        assert status == 0 and shape in out and "6 tokens" in " ".join(out.split())
    shutil.rmtree(tmp_path / "saved/vae")
    status, _, err = plan(capsys, "policy=wan_1_3b", f"policy.path={tmp_path / 'saved'}", *small)
    assert status == 1 and "holds no vae/" in err


@pytest.mark.parametrize(("overrides", "named"), [
    (["policy=wan_1_3b", "rollout.group_size=64"], r"rollout.group_size=64 needs"),
    (["policy=wan_1_3b", "gpu.memory_gib=24"], "no group fits"),
    (["policy=wan_1_3b", "policy.wan.gradient_checkpointing=false"], "which learner.micro_batch"),
    (["policy.path=null"], "policy.path is null"),
    (["policy.path=nowhere"], "nowhere is no policy folder"),
    (["policy=wan_1_3b", "policy.path=nowhere"], "nowhere holds no vae/"),
    (["policy=wan_1_3b", "policy.wan.frames=80"], "policy.wan.frames=80"),
    (["policy=wan_1_3b", "policy.wan.attention=sparse"], "policy.wan.attention=sparse"),
    (["policy=wan_1_3b", "policy.wan.decode_rows=0"], "policy.wan.decode_rows=0"),
    (["cluster=inline"], "cluster.backend=inline"),
    (["gpu.efficiency=35"], "gpu.efficiency=35"),
    (["learner.zero_stage=4"], "learner.zero_stage=4"),
    (["policy=wan_1_3b", "policy.lora.rank=4", "policy.lora.targets=[q_proj]"], "policy.lora.targets"),
    (["policy.lora.rank=-1"], "policy.lora needs a rank"),
    (["rollout.select=branch"], "rollout.select"),
    (["rollout.prompts_per_task=0"], "rollout.prompts_per_task=0"),
    (["rollout.eta=0"], "rollout.eta=0"),
    (["learner.micro_batch=0"], "learner.micro_batch"),
])  # fmt: skip
def test_what_cannot_fit_or_is_wrong_ends_in_one_line_that_names_the_key(capsys, overrides, named):
    status, _, err = plan(capsys, *overrides)
    lines = err.strip().splitlines()
    assert status == 1 and len(lines) == 1 and named in lines[0], err
    assert lines[0].startswith("error: ")
