import numpy as np
import pytest
from reward_cases import WORLD, batch_of, film, rank_correlation, shifted, static, vanished

from rewards.contract import RewardError
from rewards.trajectory import Trajectory

CAP = 0.15 * WORLD.size
CLEAR = [i for i in range(40) if (p := WORLD.prompt("heldout", i)).visible.all() and p.tracks.shape[1] == 1][:16]
"""Scenes with one drag."""


def score(make, indices=CLEAR, term=None, **fields):
    return (term or Trajectory())(batch_of([make(i) for i in indices], indices, **fields))


def test_perfect_beats_one_pixel_beats_two_pixels_beats_static_in_every_scene():
    perfect = score(film).score
    one, two = (score(lambda i, px=px: film(i, shifted((0.6 * px, -0.8 * px)))).score for px in (1, 2))
    still = score(static).score
    assert (perfect > one).all() and (one > two).all() and (two > still).all()
    assert perfect.mean() > 0.98 and still.mean() < 0.3


def test_a_vanished_object_scores_as_the_worst_there_is():
    assert score(lambda i: film(i, vanished)).score.max() < 0.05


def test_an_object_that_vanishes_halfway_scores_half():
    def make(index):
        video = film(index, vanished)
        video[:7] = film(index)[:7]
        return video

    output = score(make)
    np.testing.assert_allclose(output.score, 0.5, atol=0.05)
    np.testing.assert_allclose(output.metrics["lost"], 0.5, atol=0.05)


def test_the_score_is_the_capped_distance():
    offset = np.float32([2.4, 3.2])
    output = score(lambda i: film(i, shifted(offset)))
    distance = np.linspace(0, 1, WORLD.frames)[1:] * np.linalg.norm(offset)
    np.testing.assert_allclose(output.frame_score[:, 1:].mean(0), 1 - distance / CAP, atol=0.02)
    np.testing.assert_allclose(output.metrics["error_px"], distance.mean(), atol=0.2)
    squared = score(lambda i: film(i, shifted(offset)), term=Trajectory(mode="squared"))
    np.testing.assert_allclose(squared.frame_score[:, 1:].mean(0), 1 - distance**2 / CAP**2, atol=0.02)


def test_inside_groups_the_score_ranks_clips_by_their_true_deviation():
    correlations, shuffled = [], []
    rng = np.random.default_rng(0)
    for index in CLEAR[:8]:
        offsets = rng.normal(size=(8, 2))
        offsets *= (rng.uniform(0, 8, 8) / np.linalg.norm(offsets, axis=1))[:, None]
        noisy = [np.clip(film(index, shifted(o)) + rng.normal(0, 8, (1, 64, 64, 3)), 0, 255) for o in offsets]
        scores = Trajectory()(batch_of([v.astype(np.uint8) for v in noisy], [index] * 8)).score
        correlations.append(rank_correlation(-np.linalg.norm(offsets, axis=1), scores))
        shuffled.append(rank_correlation(-np.linalg.norm(offsets, axis=1), rng.permutation(scores)))
    assert np.mean(correlations) > 0.9 > 0.5 > abs(np.mean(shuffled))


def test_only_the_scored_frames_are_tracked_and_count():
    video = film(CLEAR[0])
    video[8:] = static(CLEAR[0])[8:]
    early, late = (Trajectory()(batch_of([video], CLEAR[:1], frames=frames)) for frames in ([5, 6], [11, 12]))
    assert early.score > 0.98 > 0.5 > late.score
    assert np.isfinite(early.frame_score[0]).nonzero()[0].tolist() == [5, 6]


def test_frames_in_which_no_target_is_visible_have_no_score():
    plain = batch_of([film(CLEAR[0])], CLEAR[:1])
    visible = plain.target_visible.copy()
    visible[:, 4:] = False
    output = score(film, CLEAR[:1], target_visible=visible)
    assert np.isnan(output.frame_score[0, 4:]).all() and output.score > 0.98
    visible[:, 1:] = False
    assert np.isnan(score(film, CLEAR[:1], target_visible=visible).score).all()


def test_padding_points_change_nothing():
    two = next(i for i in range(40) if WORLD.prompt("heldout", i).tracks.shape[1] == 2)
    alone = Trajectory()(batch_of([film(CLEAR[0])], CLEAR[:1])).score
    padded = Trajectory()(batch_of([film(CLEAR[0]), film(two)], [CLEAR[0], two])).score
    assert alone[0] == padded[0]


def test_a_tracker_that_returns_nonsense_costs_the_cap():
    class Nonsense:
        def track(self, video, points, frames, guess):
            return np.full((len(frames), *points.shape), np.nan, np.float32), np.ones((len(frames), len(points)), bool)

    assert score(film, term=Trajectory(tracker=Nonsense())).score.max() == 0


@pytest.mark.parametrize("options", [{"alpha": 0}, {"mode": "cubic"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(RewardError, match="alpha > 0 and mode"):
        Trajectory(**options)
