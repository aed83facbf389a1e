import json
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from reward_cases import WORLD, batch_of, film, static

from jobs.train_scorer import corrupted, train_scorer
from rewards.contract import RewardError
from rewards.corruptions import TRAINED, Scene
from rewards.degradation import SHIPPED, Degradation, DegradationModel, load, save

SCENES = range(12)


@pytest.fixture(scope="module")
def shipped():
    return Degradation()


def score(term, make, scenes=SCENES, **fields):
    return term(batch_of([make(i) for i in scenes], scenes, **fields))


def corrupt(index, kind, level):
    video, tracks = film(index), WORLD.prompt("heldout", index).tracks
    scenes = [Scene(tracks[t], tracks[0]) for t in range(len(video))]
    rng = np.random.default_rng(index)
    return np.stack([video[0], *(corrupted(f, kind, level, rng, s) for f, s in zip(video[1:], scenes[1:]))])


def test_the_shipped_scorer_orders_levels_of_blur_in_every_scene(shipped):
    levels = [score(shipped, lambda i, sigma=sigma: blurred(i, sigma)).score for sigma in (0, 0.5, 1, 1.5, 2.2)]
    assert (np.diff(levels, axis=0) < 0).mean() > 0.97
    assert np.mean(levels[0]) > 0.75 > 0.6 > np.mean(levels[2])


def blurred(index, sigma):
    video = film(index)
    later = [cv2.GaussianBlur(f, (0, 0), sigma) if sigma else f for f in video[1:]]
    return np.stack([video[0], *later])


@pytest.mark.parametrize("kind", TRAINED)
def test_inside_a_scene_a_ruined_clip_scores_below_a_clean_one(shipped, kind):
    frames = [10, 11, 12]
    clean, ruined = (
        score(shipped, lambda i, level=level: corrupt(i, kind, level), frames=frames) for level in (0, 0.9)
    )
    assert (ruined.score < clean.score).mean() > 0.8


def test_legitimate_motion_is_not_degradation(shipped):
    moving, still = score(shipped, film), score(shipped, static)
    assert moving.score.mean() > still.score.mean() - 0.1
    assert np.abs(moving.frame_score[:, 12] - moving.frame_score[:, 2]).mean() < 0.15


@pytest.mark.parametrize("colour", ["black", "grey", "noise"])
def test_frames_that_are_no_pictures_score_low(shipped, colour):
    rng = np.random.default_rng(0)
    picture = {"black": 0, "grey": 128, "noise": rng.integers(0, 256, (64, 64, 3))}[colour]
    empty = np.broadcast_to(np.uint8(picture), film(0).shape)
    assert score(shipped, lambda i: empty).score.max() < 0.3


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(shipped):
    alone = [score(shipped, film, [i]).frame_score for i in (0, 1)]
    together = score(shipped, film, [0, 1, 0, 1]).frame_score
    np.testing.assert_allclose(together, np.concatenate(alone * 2), atol=1e-5)


def test_a_mirrored_video_gets_the_same_score(shipped):
    plain = batch_of([film(0)], [0])
    mirrored = replace(plain, video=plain.video[:, :, :, ::-1].copy(), first_frame=plain.first_frame[:, :, ::-1].copy())
    np.testing.assert_allclose(shipped(mirrored).frame_score, shipped(plain).frame_score, atol=1e-5)


def test_only_scored_frames_get_a_score(shipped):
    output = score(shipped, film, frames=[3, 4])
    assert np.isfinite(output.frame_score).sum() == 2 * len(SCENES)
    np.testing.assert_allclose(output.score, output.frame_score[:, 3:5].mean(1), rtol=1e-5)


def test_larger_pictures_are_resized(shipped):
    small = batch_of([film(0)], [0])
    video = np.stack([[cv2.resize(f, (128, 128), interpolation=cv2.INTER_CUBIC) for f in clip] for clip in small.video])
    large = replace(small, video=video, first_frame=video[:, 0])
    assert abs(shipped(large).score[0] - shipped(small).score[0]) < 0.15


def test_it_scores_at_least_seven_hundred_frames_per_second(shipped):
    batch = batch_of([film(i) for i in range(8)] * 4, list(range(8)) * 4)
    shipped(batch)
    started = time.process_time()
    shipped(batch)
    assert batch.scored.sum() / (time.process_time() - started) > 700


def test_saved_weights_load_to_the_same_scores(tmp_path):
    torch.manual_seed(0)
    model = DegradationModel().eval()
    save(model, tmp_path)
    x = torch.from_numpy(film(0))
    assert torch.equal(load(tmp_path).embed(x), model.embed(x))


def test_weights_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    with pytest.raises(RewardError, match=r"config.json is missing; make one with `python -m jobs.train_scorer`"):
        Degradation(tmp_path / "nowhere")
    save(DegradationModel(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "output_dim": 32}))
    with pytest.raises(RewardError, match="broken or do not fit"):
        Degradation(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RewardError, match="broken or do not fit"):
        Degradation(tmp_path)


def test_the_shipped_weights_are_small_and_have_a_card():
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 600_000
    assert "inside a scene" in (SHIPPED / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_a_short_training_already_orders_blur(tmp_path):
    losses = []
    table = train_scorer(160, 96, 4e-3, 0, tmp_path, lambda step, metrics: losses.append(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0] and table["blur"][1] > 0.5
    assert Degradation(tmp_path).model.config["image_size"] == 64
