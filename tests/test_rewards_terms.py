import numpy as np
import pytest
from reward_cases import batch_of, film, static

from rewards.contract import RewardError
from rewards.guards import Background
from rewards.terms import Term, policy_fault, score
from rewards.trajectory import Trajectory


def mean_brightness(batch):
    return batch.video.mean((2, 3, 4)) / 255


def broken(batch):
    raise ConnectionError("the scorer does not answer")


@pytest.fixture
def black_and_good():
    black = film(0)
    black[4:] = 0
    return batch_of([black, film(1)], [0, 1])


def test_a_black_or_constant_clip_gets_the_worst_score_in_every_term_and_is_flagged(black_and_good):
    terms = [Term("trajectory", Trajectory()), Term("shift", lambda b: [3.0, 4.0], range=(-1.0, 5.0))]
    outputs, faults = score(terms, black_and_good)
    assert not faults
    assert outputs["trajectory"].score[0] == 0 and outputs["trajectory"].score[1] > 0.9
    assert outputs["shift"].score.tolist() == [-1, 4]
    assert (outputs["trajectory"].frame_score[0, 1:] == 0).all()
    assert outputs["trajectory"].metrics["policy_fault"].tolist() == [1, 0]


def test_a_fault_outside_the_scored_frames_belongs_to_nobody():
    black = film(0)
    black[4:] = 0
    assert not policy_fault(batch_of([black], [0], frames=[2, 3])).any()
    assert policy_fault(batch_of([black], [0], frames=[3, 4])).all()
    assert not policy_fault(batch_of([static(0)], [0])).any()


def test_a_flat_given_picture_is_not_the_policys_fault():
    video = np.full_like(film(0), 90)
    assert not policy_fault(batch_of([video], [0], first_frame=video[:1])).any()


def test_a_term_that_raises_is_not_scored_and_its_text_is_reported(black_and_good):
    outputs, faults = score([Term("remote", broken), Term("light", mean_brightness)], black_and_good)
    assert np.isnan(outputs["remote"].score).all() and outputs["remote"].frame_score is None
    assert faults == {"remote": "ConnectionError: the scorer does not answer"}
    assert np.isfinite(outputs["light"].score).all()


def test_a_term_that_returns_nonsense_is_a_system_fault_too(black_and_good):
    outputs, faults = score([Term("short", lambda batch: [1.0])], black_and_good)
    assert np.isnan(outputs["short"].score).all() and "'short' must return one score per clip" in faults["short"]


def test_a_frame_without_a_score_is_no_fault():
    plain = batch_of([film(0)], [0])
    outputs, faults = score(
        [Term("trajectory", Trajectory())], batch_of([film(0)], [0], target_visible=np.zeros_like(plain.target_visible))
    )
    assert not faults and np.isnan(outputs["trajectory"].score).all()
    assert outputs["trajectory"].metrics["policy_fault"].tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "canary"}, "a canary is never trained on, set weight: 0"),
        ({"role": "judge"}, "role must be 'train' or 'canary', not 'judge'"),
        ({"floor": 0.0}, "floor must be above 0"),
        ({"range": (1.0, 0.0)}, r"range must be \(worst, best\)"),
    ],
)
def test_a_term_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(RewardError, match=f"reward 'mine': {message}"):
        Term("mine", Background(), **options)
