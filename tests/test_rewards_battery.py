import numpy as np
import pytest
from doctor_cases import STAGES
from reward_cases import WORLD, film

from rewards.battery import GRAIN, HACKS, LEVELS, SHIFTS, Stage, batch_of
from rewards.contract import RewardError


@pytest.mark.parametrize("s", range(len(STAGES)))
def test_every_entry_starts_at_the_given_frame_and_only_the_truth_is_the_truth(s):
    stage, truth = STAGES[s], film(s)
    videos = stage.battery()
    assert list(videos) == ["truth", *SHIFTS, *HACKS]
    for name, video in videos.items():
        assert video.dtype == np.uint8 and video.shape == truth.shape
        np.testing.assert_array_equal(video[0], WORLD.prompt("heldout", s).first_frame)
        assert (video == truth).all() == (name == "truth"), name


def test_a_battery_is_the_same_every_time_and_leaves_its_stage_alone():
    before = {name: video.copy() for name, video in STAGES[0].drawn.items()}
    once, twice = STAGES[0].battery(), STAGES[0].battery()
    for name in once:
        np.testing.assert_array_equal(once[name], twice[name])
    for name, video in before.items():
        np.testing.assert_array_equal(STAGES[0].drawn[name], video)


def test_the_hacks_are_what_their_names_say():
    videos, truth = STAGES[0].battery(), film(0)
    light, colour = (lambda v: v.mean((1, 2, 3)), lambda v: np.ptp(v, axis=-1).mean())
    assert (videos["static"] == truth[0]).all()
    assert (np.diff(light(videos["flicker"])) * np.tile([1, -1], 6) > 10).all()
    assert colour(videos["over-saturation"][1:]) > 1.5 * colour(truth[1:])
    assert (videos["NaN frame"][6] == 0).all() and (videos["NaN frame"][7] == truth[7]).all()
    assert (videos["reversed"][1:] == truth[-2::-1]).all()
    assert (videos["frozen tail"][6:] == truth[6]).all() and (videos["frozen tail"][:7] == truth[:7]).all()
    assert (videos["vanishing"][:6] == truth[:6]).all() and (videos["vanishing"][6:] != truth[6:]).any((1, 2, 3)).all()


def test_clips_of_one_level_of_a_group_differ_by_direction_and_by_grain_that_nobody_sees():
    group, shifted = (x.astype(np.float32) for x in (STAGES[0].group(), STAGES[0].shifted))
    grain = (group[0] - shifted[0])[:, 1:]
    assert 0.8 * GRAIN < grain.std() < 1.2 * GRAIN
    away = np.abs(group - film(0)).mean((1, 2, 3, 4, 5))
    assert len(away) == len(LEVELS) and (np.diff(away) > 0).all()


def test_drags_with_fewer_points_are_padded():
    two = next(i for i in range(40) if WORLD.prompt("heldout", i).tracks.shape[1] == 2)
    one = next(i for i in range(40) if WORLD.prompt("heldout", i).tracks.shape[1] == 1)
    batch = batch_of([WORLD.prompt("heldout", i) for i in (one, two)], [film(one), film(two)])
    assert batch.point_mask.tolist() == [[True, False], [True, True]]


def test_a_stage_without_all_its_videos_is_refused():
    stage = STAGES[0]
    with pytest.raises(RewardError, match=r"drawn\['vanished'\] must be a video \[13, 64, 64, 3\]"):
        Stage(stage.drag, {"truth": stage.drawn["truth"]} | {n: stage.drawn[n] for n in SHIFTS}, stage.shifted)
    with pytest.raises(RewardError, match=r"shifted must be \[4, R, 13, 64, 64, 3\], not \[3, "):
        Stage(stage.drag, stage.drawn, stage.shifted[:3])
