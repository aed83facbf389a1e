"""The jobs on a tiny random Wan folder: what a user of the production policy runs, but for the weights."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import reduce
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from jobs_cases import run_job
from safetensors.torch import load_file
from wan_cases import write_folder

from policy.wan_formats import read_wan, to_original
from rl.report import write_mp4

PAGE = Path(__file__).parents[1] / "docs/wan.md"
FRAMES = 9
SMALL = [
    "experiment=wan_tiny_random", "cluster=inline", "~rewards.background", "~rewards.degradation",
    "rollout.group_size=3", "rollout.prompts_per_iteration=2", "rollout.prompts_per_task=1", "train.iterations=1",
    "evaluate.prompts=1", "evaluate.batch=1", "evaluate.strips=1", "learner.freeze=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A Wan of 36 input channels, and a folder of prompts with wide pictures and texts."""
    home = tmp_path_factory.mktemp("wan")
    write_folder(home / "wan", in_channels=36)
    drags, rng = home / "drags", np.random.default_rng(0)
    drags.mkdir()
    rows = []
    for i, text in enumerate(("a cat walks left", "a dog", "a cat")):
        cv2.imwrite(str(drags / f"{i}.png"), rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        track = [[20 + t, 16 + i] for t in range(FRAMES)]
        split = "heldout" if i == 2 else "train"
        rows.append({"image": f"{i}.png", "text": text, "tracks": [track], "split": split})
    (drags / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "clips").mkdir()
    write_mp4(home / "clips/0.mp4", rng.integers(0, 256, (FRAMES, 40, 60, 3), dtype=np.uint8), 16.0)
    row = {"video": "0.mp4", "text": "a dog", "tracks": rows[0]["tracks"]}
    (home / "clips/prompts.jsonl").write_text(json.dumps(row) + "\n")
    return home


def where(home, run):
    return [f"policy.path={home / 'wan'}", f"policy.wan.text_cache={home / 'cache'}", f"run_dir={run}",
            "tracking.uri=null"]  # fmt: skip


def learnt(run):
    """The metrics of the run's one iteration."""
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([value for value in line.values() if isinstance(value, float)]).all()
    assert line["train/grad_norm"] > 0
    return line


def test_an_iteration_runs_on_the_production_policys_parts(home, tmp_path):
    run = tmp_path / "run"
    assert run_job("train", *SMALL, *where(home, run)) == 0
    assert learnt(run)["train/ratio_deviation"] <= 1e-5
    tuned, base = load_file(run / "checkpoints/step_000001/policy.safetensors"), read_wan(home / "wan").state_dict()
    assert tuned.keys() == base.keys() and any(not torch.equal(tuned[name], base[name]) for name in base)
    assert json.loads((run / "summary.json").read_text())["heldout"]["track_error_px"]["base"] > 0


@pytest.mark.slow
def test_adapters_and_bfloat16_learn_from_wide_pictures_and_texts_and_are_exported_merged(home, tmp_path, capsys):
    run, cache = tmp_path / "run", f"policy.wan.text_cache={tmp_path / 'cache'}"
    shape = ["policy.wan.width=48", "policy.wan.dtype=bfloat16", "prompts=folder", f"prompts.path={home / 'drags'}"]
    lora = ["policy.lora.rank=2", "policy.lora.targets=[to_q,to_v]"]
    assert run_job("embed", *SMALL, *where(home, run), cache, *shape) == 0
    assert "4 texts embedded, 0 were there" in capsys.readouterr().out
    blind = shutil.copytree(home / "wan", tmp_path / "blind")
    shutil.rmtree(blind / "text_encoder")
    path = f"policy.path={blind}"
    assert run_job("train", *SMALL, *where(home, run), cache, path, *shape, *lora, "learner.ratio_tolerance=0.1") == 0
    assert learnt(run)["train/ratio_deviation"] > 0
    weights = run / "checkpoints/step_000001/policy.safetensors"
    assert all("lora_" in name for name in load_file(weights))
    tuned = [path, f"policy.weights={weights}", *lora]
    assert run_job("export", "policy=wan_1_3b", *tuned, f"out={tmp_path / 'out'}") == 0
    merged, base = WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict(), read_wan(blind).state_dict()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed and all(re.search(r"to_[qv]\.weight$", name) for name in changed)


@pytest.mark.slow
def test_weights_in_bfloat16_learn_with_float32_copies(home, tmp_path):
    run = tmp_path / "run"
    changed = [f"policy.wan.text_cache={tmp_path / 'cache'}", "policy.wan.dtype=bfloat16", "learner=wan"]
    assert run_job("train", *SMALL, *where(home, run), *changed, "learner.lr=0.01", "learner.ema=0") == 0
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["train/ratio_deviation"] <= 0.1
    tuned = load_file(run / "checkpoints/step_000001/policy.safetensors")
    base = read_wan(home / "wan", torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in tuned.items()} == {name: p.dtype for name, p in base.items()}
    assert any((tuned[name] != base[name]).any() for name in base)


@pytest.mark.parametrize(("override", "named"), [
    ("policy.wan.dtype=bfloat16", "learner.bf16=false would train policy.wan.dtype=bfloat16 without float32 copies"),
    ("policy.wan.width=48", "prompts=sprites are square, but the policy's pictures are (32, 48)"),
    ("policy.wan.frames=10", "policy.wan.frames=10 must be one given frame and whole blocks of 4"),
    ("policy.path=nowhere", "nowhere holds no vae/"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_named_in_one_line(home, tmp_path, capsys, override, named):
    assert (
        run_job(
            "train", *SMALL, *where(home, tmp_path / "run"), f"policy.wan.text_cache={tmp_path / 'cache'}", override
        )
        == 1
    )
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error:") and named in line


COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    for command in block.replace("\\\n", " ").splitlines()
]
SHAPE = [
    "policy.wan.height=32", "policy.wan.width=48", f"policy.wan.frames={FRAMES}", "policy.wan.window=2",
    "policy.wan.drag_sigma=4.0", "policy.wan.text_length=16", "cluster=inline", "learner.ranks=1", "tracking.uri=null",
]  # fmt: skip
TINY = {
    "teach": ["teach.steps=1", "teach.batch=1", "teach.heldout=1"],
    "export": None, "plan": None,  # as documented
}  # fmt: skip
LOOP = [
    "rollout.group_size=3", "rollout.prompts_per_iteration=2", "rollout.prompts_per_task=1", "train.iterations=1",
    "evaluate.prompts=1", "evaluate.batch=1", "evaluate.strips=1", "~rewards.background",
]  # fmt: skip


@pytest.mark.slow
def test_the_documented_commands_run_one_after_the_other(home, tmp_path):
    """With the tiny folder and few small frames in place of the real ones; nothing else is changed."""
    state = {f"model.{to_original(name)}": tensor for name, tensor in read_wan(home / "wan").state_dict().items()}
    torch.save({"generator_ema": state}, tmp_path / "student.pt")
    shutil.copy(home / "wan/transformer/config.json", tmp_path)  # weights of this size do not show their heads
    places = {
        "/models/wan": home / "wan", "/models/self_forcing_dmd.pt": tmp_path / "student.pt",
        "/data/drags": home / "drags", "/data/clips": home / "clips", "/data/texts": tmp_path / "texts",
        "outputs": tmp_path, "step_000030": "step_000001", "step_002000": "step_000001",
    }  # fmt: skip

    def run(job: str, *overrides: str) -> None:
        given = [reduce(lambda w, place: w.replace(place, str(places[place])), places, word) for word in overrides]
        name = job.removeprefix("jobs.")
        if (small := TINY.get(name, LOOP)) is not None:
            given = [f"run_dir={tmp_path / job}", *given, *SHAPE, *small]
        last = {word.split("=")[0]: word for word in given}
        assert run_job(name, *last.values()) == 0, f"{job} {overrides}"

    assert len(COMMANDS) == 12
    for _, _, job, *overrides in COMMANDS:
        run(job, *overrides)
    for name in ("wan_tuned", "wan_lora_tuned"):
        exported = WanTransformer3DModel.from_pretrained(tmp_path / name, torch_dtype=torch.bfloat16)
        assert exported.config.in_channels == 36
    (adapters,) = [words for words in COMMANDS if "run_dir=outputs/wan_lora" in words]
    taught = ("policy.path=outputs/wan_taught_model", "policy.wan.base=/models/wan", "run_dir=outputs/taught_lora")
    run(*adapters[2:], *taught)
