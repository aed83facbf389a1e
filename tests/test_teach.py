"""Supervised teaching: a policy whose control weighs nothing learns to feel its drag, from drags that are true."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from imageio.v3 import imwrite
from jobs_cases import run_job
from safetensors.torch import load_file
from test_learner import settings
from test_wan_train import SMALL, where
from tiny import SETTINGS
from wan_cases import write_folder

from policy.policy import DragPolicy, build_transformer, load_policy
from policy.pretrain import flow_loss
from rl.report import write_mp4
from rl.teacher import Lessons, Teacher
from rollout.folder import FolderPrompts
from rollout.prompts import DragPrompt, PromptError
from rollout.seeds import torch_generator

SIZE, FRAMES = 32, 9


def way(index: int) -> np.ndarray:
    """From the middle to the left or the right, px [T, 2]."""
    end = 6 if np.random.default_rng(index % 2**31).integers(2) else 26
    return np.linspace((16, 16), (end, 16), FRAMES)


def film(index: int) -> np.ndarray:
    """A red square on its way."""
    y, x = np.mgrid[:SIZE, :SIZE]
    video = np.full((FRAMES, SIZE, SIZE, 3), 20, np.uint8)
    for frame, (at_x, at_y) in zip(video, way(index)):
        frame[(abs(x - at_x) < 5) & (abs(y - at_y) < 5)] = (250, 60, 60)
    return video


class Squares:
    """A `PromptSource` of squares. shuffled: their drags are those of other squares."""

    def __init__(self, shuffled: bool = False) -> None:
        self.shuffled = shuffled

    def prompt(self, split, index):
        tracks = way(index + self.shuffled)[:, None].astype(np.float32)
        return DragPrompt(film(index)[0], "", tracks, np.ones((FRAMES, 1), bool), f"square/{index}")

    def truth(self, prompt):
        return film(int(prompt.id.split("/")[1]))


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A policy with the shipped codec and a fresh transformer that does not feel its control."""
    codec, path = load_policy("policy/weights/tiny").codec, tmp_path_factory.mktemp("idle")
    torch.manual_seed(0)
    model = build_transformer(codec.channels, codec.channels + 2, heads=2, head_dim=32, layers=2, ffn=128)
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.02)
        model.patch_embedding.weight[:, codec.channels :] = 0
    DragPolicy(replace(SETTINGS, codec_channels=codec.channels, codec_width=96), model, codec).save(path)
    return str(path)


def teacher(path, shuffled=False, batch=8, **changed) -> Teacher:
    s = settings(**{"lr": 3e-3, "beta": 0.0, "ema": 0.9, "micro_batch": 8, **changed})
    made = Teacher(path, None, s, 1, lambda: Squares(shuffled), Lessons(batch, 4, 0.0, 0.7), 0)
    made.join(0, made.address())
    return made


@torch.no_grad()
def felt(made: Teacher) -> float:
    """By how much a drag to the other side makes the loss on true videos larger."""
    loss, prompts = [], [Squares().prompt("heldout", i) for i in range(8)]
    mirrored = [replace(p, tracks=(32, 0) + (-1, 1) * p.tracks) for p in prompts]
    for asked in (prompts, mirrored):
        asked = [replace(p, tracks=p.tracks.astype(np.float32)) for p in asked]
        example = made._examples(prompts, asked)
        loss.append(flow_loss(made.policy.net, made.policy, example, made.lessons, torch_generator(0)).item())
    return loss[1] - loss[0]


@pytest.mark.slow
def test_true_drags_are_learnt_to_be_felt_and_shuffled_ones_are_not(idle):
    found = {}
    for shuffled in (False, True):
        made = teacher(idle, shuffled)
        before = made.measure()
        assert before["loss"] == before["loss_still"] and felt(made) == 0
        for _ in range(60):
            made.teach()
        after = made.measure()
        assert after["loss"] < 0.3 * before["loss"]
        found[shuffled] = felt(made), after["loss_still"] - after["loss"]
    assert found[False][0] > 0.3 and found[False][1] > 0.2
    assert found[True][0] < 0.3 * found[False][0]


def test_a_teacher_goes_on_bit_for_bit(idle, tmp_path):
    straight, resumed, fresh = (teacher(idle, batch=2, micro_batch=1) for _ in range(3))
    straight.teach()
    straight.save(str(tmp_path))
    assert resumed.load(str(tmp_path))[-1] == 1
    told = [made.teach() for made in (straight, resumed, fresh)]
    assert told[0] == told[1] != told[2]
    states = [made.policy.state_dict() for made in (straight, resumed, fresh)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of rows with videos."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for i in range(3):
        write_mp4(folder / f"{i}.mp4", film(i), 8.0)
        tracks = (way(i) + 0.5) * 8 - 0.5  # the film is shown 8 times as large
        row = {"video": f"{i}.mp4", "text": "a dog", "tracks": [tracks.tolist()]}
        rows.append(row | {"split": "heldout" if i == 2 else "train"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_rows_video_is_its_truth_and_its_first_frame_the_picture(clips):
    source = FolderPrompts(clips, SIZE, FRAMES)
    for split, index, number in (("train", 1, 1), ("train", 3, 1), ("heldout", 0, 2)):
        prompt = source.prompt(split, index)
        truth = source.truth(prompt)
        assert truth.shape == (FRAMES, SIZE, SIZE, 3) and np.array_equal(truth[0], prompt.first_frame)
        assert abs(truth.astype(float) - film(number)).mean() < 4  # of H.264
        assert abs(truth.astype(float) - film(number)[::-1]).mean() > 8
    wide = FolderPrompts(clips, (16, SIZE), FRAMES)
    prompt = wide.prompt("train", 0)
    assert wide.truth(prompt).shape == (FRAMES, 16, SIZE, 3) and prompt.tracks[0, 0].tolist() == [16, 8]


@pytest.mark.parametrize(("changed", "named"), [
    ({"video": "none.mp4"}, "video 'none.mp4' is not a file"),
    ({"video": "prompts.jsonl"}, "video 'prompts.jsonl' cannot be read, or has fewer than 9 frames"),
    ({"image": "0.png"}, "give image or video, not both"),
    ({"video": 3}, "video 3 is not a file"),
])  # fmt: skip
def test_a_video_that_cannot_be_is_refused_with_file_and_line(clips, tmp_path, changed, named):
    for file in clips.glob("*.mp4"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    good = {"video": "0.mp4", "tracks": [way(0).tolist()]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | changed) + "\n")
    with pytest.raises(PromptError, match=r"prompts\.jsonl:2: ") as caught:
        FolderPrompts(tmp_path, SIZE, FRAMES)
    assert named in str(caught.value)


def test_a_folder_of_which_some_rows_have_videos_is_refused(clips, tmp_path):
    (tmp_path / "0.mp4").write_bytes((clips / "0.mp4").read_bytes())
    imwrite(tmp_path / "0.png", film(0)[0])
    rows = [{name: f"0.{kind}", "tracks": [way(0).tolist()]} for name, kind in (("video", "mp4"), ("image", "png"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PromptError, match="1 of 2 rows have a video"):
        FolderPrompts(tmp_path, SIZE, FRAMES)


@pytest.mark.slow
def test_the_job_teaches_a_text_to_video_wan_resumes_and_its_weights_are_trained_on(clips, tmp_path, capsys):
    write_folder(tmp_path / "wan")  # of 16 channels
    run = tmp_path / "taught"
    common = [*where(tmp_path, run), "experiment=wan_tiny_random", "cluster=inline"]
    lessons = [*common, f"prompts.path={clips}", "learner.decay_iterations=null", "teach.batch=2", "teach.heldout=1",
               "teach.checkpoint_every=1"]  # fmt: skip
    assert run_job("teach", *lessons, "teach.steps=1") == 0 and run_job("teach", *lessons, "teach.steps=2") == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "train/loss" in line] == [1, 2]
    first = next(line for line in steps if line["step"] == 0)
    assert first["heldout/loss"] == first["heldout/loss_still"]
    weights = run / "checkpoints/step_000002/policy.safetensors"
    assert load_file(weights)["patch_embedding.weight"][:, 16:].any()
    other = [*where(tmp_path, tmp_path / "tuned"), "prompts=folder", f"prompts.path={clips}"]
    assert run_job("train", *SMALL, *other, f"policy.weights={weights}") == 0
    capsys.readouterr()
    assert run_job("teach", *lessons, "teach.steps=3", "policy.lora.rank=4") == 1
    assert "policy.lora.rank" in capsys.readouterr().err


def test_a_row_without_a_video_is_named(idle):
    class Pictures(Squares):
        def truth(self, prompt):
            return None

    made = Teacher(idle, None, settings(beta=0.0), 1, Pictures, Lessons(1, 1, 0.0, 0.7), 0)
    made.join(0, made.address())
    with pytest.raises(PromptError, match="has no video to learn from"):
        made.teach()
