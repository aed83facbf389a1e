import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.contract import RewardError
from rewards.metrics import THRESHOLDS, end_point_error, tap_vid

SIZE = (256, 256)
COORDINATES = hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(0, 255, width=32))
FLAGS = hnp.arrays(np.bool_, (4, 3))


def one_point(*distances):
    """A track at x = 100 whose predictions are so many px away, from frame 1 on."""
    tracks = np.full((len(distances) + 1, 1, 2), 100, np.float32)
    positions = tracks.copy()
    positions[1:, 0, 0] += np.float32(distances)
    return positions, tracks


def flags(*values):
    return np.array([True, *values])[:, None]


def test_a_prediction_three_px_off_is_right_for_the_three_larger_thresholds():
    positions, tracks = one_point(3, 3)
    metrics = tap_vid(positions, flags(True, True), tracks, flags(True, True), SIZE)
    assert metrics.delta_avg == pytest.approx(3 / 5)
    assert metrics.average_jaccard == pytest.approx(3 / 5)  # too far: not a hit, and a false positive: 0 / (2 + 2)
    assert metrics.occlusion_accuracy == 1


def test_a_hidden_point_that_was_found_is_a_false_positive():
    positions, tracks = one_point(0, 0, 0)
    metrics = tap_vid(positions, flags(True, True, True), tracks, flags(True, True, False), SIZE)
    assert metrics.average_jaccard == pytest.approx(2 / 3)
    assert metrics.delta_avg == 1 and metrics.occlusion_accuracy == pytest.approx(2 / 3)


def test_delta_avg_does_not_ask_whether_the_point_was_called_visible_and_jaccard_does():
    positions, tracks = one_point(0, 0)
    metrics = tap_vid(positions, flags(True, False), tracks, flags(True, True), SIZE)
    assert (metrics.delta_avg, metrics.average_jaccard, metrics.occlusion_accuracy) == (1, 0.5, 0.5)


def test_a_mixture_counted_by_hand():
    # Distances .5, 1.5, 6, 20 px; the third is called hidden, the last is hidden and called visible.
    positions, tracks = one_point(0.5, 1.5, 6, 20)
    metrics = tap_vid(positions, flags(True, True, False, True), tracks, flags(True, True, True, False), SIZE)
    assert metrics.delta_avg == pytest.approx(np.mean([1, 2, 2, 3, 3]) / 3)
    # Hits 1, 2, 2, 2, 2; false positives: the hidden one always, at 1 px also the second.
    assert metrics.average_jaccard == pytest.approx(np.mean([1 / 5, 2 / 4, 2 / 4, 2 / 4, 2 / 4]))
    assert metrics.occlusion_accuracy == 0.5


def test_distances_are_those_of_a_picture_stretched_to_256():
    positions, tracks = one_point(0.9, 0.9)
    seen = flags(True, True)
    small, large = (tap_vid(positions, seen, tracks, seen, (64, width)).delta_avg for width in (64, 256))
    assert small == pytest.approx(3 / 5) and large == 1  # .9 of 64 px is 3.6 of 256


def test_the_given_frame_does_not_count_unless_asked_for():
    positions, tracks = one_point(100, 0)
    seen = flags(True, True)
    assert tap_vid(positions, seen, tracks, seen, SIZE).delta_avg == 0.5
    everywhere = tap_vid(positions, seen, tracks, seen, SIZE, evaluated=np.ones_like(seen))
    assert everywhere.delta_avg == pytest.approx(2 / 3)


def test_end_point_error_is_the_mean_distance_of_what_is_visible_and_was_found():
    positions, tracks = one_point(3, 5, np.nan, 50)
    error = end_point_error(positions, tracks, flags(True, True, True, False))
    assert error == pytest.approx(8 / 3)  # the given frame counts, with 0
    assert np.isnan(end_point_error(positions, tracks, np.zeros((5, 1), bool)))


def test_a_lost_point_is_wrong_at_every_threshold():
    positions, tracks = one_point(np.nan)
    assert tap_vid(positions, flags(False), tracks, flags(True), SIZE) == (0, 0, 0)


def test_every_video_of_a_batch_gets_its_own_numbers():
    rng = np.random.default_rng(0)
    tracks = rng.uniform(0, 255, (5, 6, 3, 2)).astype(np.float32)
    positions = tracks + rng.normal(0, 4, tracks.shape)
    found, visible = rng.random((2, 5, 6, 3)) < 0.7
    together = tap_vid(positions, found, tracks, visible, SIZE)
    for b in range(5):
        alone = tap_vid(positions[b], found[b], tracks[b], visible[b], SIZE)
        np.testing.assert_array_equal([m[b] for m in together], alone)
    np.testing.assert_allclose(end_point_error(positions, tracks, visible)[0],
                               end_point_error(positions[0], tracks[0], visible[0]))  # fmt: skip


@given(COORDINATES, FLAGS, COORDINATES, FLAGS)
def test_they_equal_a_loop_over_the_points(positions, found, tracks, visible):
    metrics = tap_vid(positions, found, tracks, visible, SIZE)
    jaccards, deltas = [], []
    for threshold in THRESHOLDS:
        hit = close = false = shown = 0
        for t in range(1, 4):
            for n in range(3):
                near = np.linalg.norm(positions[t, n] - tracks[t, n]) < threshold
                shown += visible[t, n]
                close += visible[t, n] and near
                hit += visible[t, n] and near and found[t, n]
                false += found[t, n] and not (visible[t, n] and near)
        jaccards.append(hit / (shown + false) if shown + false else np.nan)
        deltas.append(close / shown if shown else np.nan)
    np.testing.assert_allclose(metrics.average_jaccard, np.mean(jaccards), rtol=1e-6)
    np.testing.assert_allclose(metrics.delta_avg, np.mean(deltas), rtol=1e-6)


@given(COORDINATES, FLAGS, COORDINATES, FLAGS, st.permutations(range(3)))
def test_they_lie_in_0_to_1_and_do_not_depend_on_the_order_of_points(positions, found, tracks, visible, order):
    metrics = tap_vid(positions, found, tracks, visible, SIZE)
    for value in metrics:
        assert np.isnan(value) or 0 <= value <= 1
    assert np.isnan(metrics.delta_avg) or metrics.average_jaccard <= metrics.delta_avg + 1e-6
    shuffled = tap_vid(positions[:, order], found[:, order], tracks[:, order], visible[:, order], SIZE)
    np.testing.assert_array_equal(shuffled, metrics)


@given(COORDINATES, FLAGS)
def test_the_truth_is_perfect_and_calling_everything_hidden_is_worthless(tracks, visible):
    perfect = tap_vid(tracks, visible, tracks, visible, SIZE)
    blind = tap_vid(tracks, np.zeros_like(visible), tracks, visible, SIZE)
    assert perfect.occlusion_accuracy == 1
    if visible[1:].any():
        assert (perfect.average_jaccard, perfect.delta_avg, blind.average_jaccard) == (1, 1, 0)


@given(COORDINATES, FLAGS, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_offset_is_its_own_end_point_error(tracks, visible, dx, dy):
    error = end_point_error(tracks + np.array([dx, dy]), tracks, visible)
    if visible.any():
        np.testing.assert_allclose(error, np.hypot(dx, dy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["positions", "found", "visible"])
def test_shapes_that_disagree_are_refused(part):
    positions, tracks = one_point(1, 2)
    values = {"positions": positions, "found": flags(True, True), "tracks": tracks, "visible": flags(True, True)}
    values[part] = values[part][1:]
    with pytest.raises(RewardError, match="must"):
        tap_vid(**values, size=SIZE)
