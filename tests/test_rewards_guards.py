import warnings
from dataclasses import replace

import numpy as np
import pytest
from reward_cases import WORLD, batch_of, duplicated, film, panned, static, vanished

from rewards.contract import RewardError, RewardOutput
from rewards.corruptions import discs
from rewards.guards import Background, Gated
from rewards.trajectory import Trajectory

SCENES = range(16)
LATE = [9, 10, 11, 12]


def score(make, term=None, **fields):
    return (term or Background())(batch_of([make(i) for i in SCENES], SCENES, **fields))


def with_a_hole(index):
    """The true video with a grey patch where the objects started."""
    video, tracks = film(index), WORLD.prompt("heldout", index).tracks
    for t in range(1, len(video)):
        patch = discs(video[t].shape, tracks[0], 9) * (1 - discs(video[t].shape, tracks[t], 12))
        video[t] = video[t] + patch[..., None] * (128.0 - video[t])
    return video


def test_panning_the_picture_scores_far_below_moving_the_object():
    true, pan = score(film).score, score(panned).score
    assert (true > pan).all() and true.mean() - pan.mean() > 0.4
    followed = score(panned, Trajectory()).score  # what the trajectory alone would have paid for it
    assert followed.mean() > 0.7


def test_an_object_that_is_copied_instead_of_moved_scores_below_one_that_leaves():
    true, copy = (score(make, frames=LATE) for make in (film, lambda i: film(i, duplicated)))
    assert (true.score > copy.score).all() and (true.score - copy.score).mean() > 0.2
    assert np.mean(copy.metrics["vacated_rmse"]) > 2 * np.mean(true.metrics["vacated_rmse"])
    assert score(lambda i: film(i, duplicated), Trajectory()).score.mean() > 0.95


def test_a_hole_where_the_object_was_costs_score():
    true, hole = (score(make, frames=LATE).score for make in (film, with_a_hole))
    assert (true > hole).mean() > 0.8 and (true - hole).mean() > 0.05


def test_the_background_does_not_care_what_happens_to_the_object_where_it_should_be():
    np.testing.assert_allclose(score(film).score, score(lambda i: film(i, vanished)).score, atol=0.03)


def test_a_picture_that_is_all_objects_still_has_a_background():
    batch = batch_of([film(0)], [0])
    everywhere = np.stack(np.meshgrid(np.arange(0, 64, 8.0), np.arange(0, 64, 8.0)), -1).reshape(-1, 2)
    tracks = np.broadcast_to(everywhere, (1, batch.video.shape[1], *everywhere.shape)).astype(np.float32)
    dense = replace(batch, target_tracks=tracks, target_visible=np.ones(tracks.shape[:3], bool),
                    point_mask=np.ones(tracks.shape[::2][:2], bool))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the mean of nothing
        Background()(dense)


def test_a_gated_term_needs_scores_of_frames():
    with pytest.raises(RewardError, match="RewardOutput with a frame_score"):
        score(film, Gated(lambda batch: np.ones(len(batch)), Trajectory()))


def test_a_gated_term_counts_only_where_the_object_is():
    def one(batch):
        frames = np.where(batch.scored, np.float32(1), np.nan)
        return RewardOutput(np.ones(len(batch), np.float32), frames, {"mine": np.zeros(len(batch), np.float32)})

    gated = Gated(one, Trajectory())
    true, still, gone = (score(make, gated, frames=LATE) for make in (film, static, lambda i: film(i, vanished)))
    assert true.score.mean() > 0.95 and still.score.mean() < 0.2 and gone.score.max() < 0.05
    assert {"mine", "gate", "ungated"} == set(true.metrics) and (still.metrics["ungated"] == 1).all()
    assert np.isnan(true.frame_score[:, :9]).all()


def test_a_gate_without_a_visible_target_is_open():
    def one(batch):
        return RewardOutput(np.ones(len(batch), np.float32), np.where(batch.scored, np.float32(1), np.nan))

    hidden = np.zeros_like(batch_of([static(i) for i in SCENES], SCENES).target_visible)
    assert (score(static, Gated(one, Trajectory()), target_visible=hidden).score == 1).all()
