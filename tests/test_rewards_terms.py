from dataclasses import replace

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
    assert outputs["remote"].score[0] == 0, "a black clip is the policy's fault, whoever stumbles over it"
    assert np.isnan(outputs["remote"].score[1]) and outputs["remote"].frame_score is None
    assert faults["remote"].text == "ConnectionError: the scorer does not answer" and list(faults) == ["remote"]
    assert faults["remote"].clips.tolist() == [False, True]
    assert np.isfinite(outputs["light"].score).all()


class Fussy:
    """Raises on the clips it is told to, whatever their company; counts its calls."""

    def __init__(self, *bad: str, largest: int = 1000) -> None:
        self.bad, self.largest, self.sizes = bad, largest, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.largest:
            raise MemoryError("too many at once")
        if set(self.bad) & set(batch.sample_id):
            raise RuntimeError(f"cannot read {set(self.bad) & set(batch.sample_id)}")
        return {"score": batch.video.mean((2, 3, 4)) / 255, "seed": batch.seed}


@pytest.fixture
def eight():
    return batch_of([film(i) for i in range(8)], list(range(8)))


def test_a_term_that_fails_on_one_clip_loses_that_clip_alone(eight):
    sound, fussy = Fussy(), Fussy(eight.sample_id[5])
    (whole, _), (rest, faults) = (score([Term("fussy", fn)], eight) for fn in (sound, fussy))
    assert faults["fussy"].clips.tolist() == [b == 5 for b in range(8)]
    assert faults["fussy"].text == f"RuntimeError: cannot read {{{eight.sample_id[5]!r}}}"
    for field in ("score", "frame_score"):
        kept, lost = getattr(rest["fussy"], field), getattr(whole["fussy"], field)
        assert np.isnan(kept[5]).all() and np.array_equal(np.delete(kept, 5, 0), np.delete(lost, 5, 0), equal_nan=True)
    assert np.isnan(rest["fussy"].metrics["seed"][5]) and rest["fussy"].metrics["seed"][6] == 6
    assert fussy.sizes == [8, 4, 4, 2, 1, 1, 2]


def test_a_batch_that_does_not_fit_is_scored_in_halves(eight):
    outputs, faults = score([Term("big", Fussy(largest=3))], eight)
    assert not faults and np.isfinite(outputs["big"].score).all()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_scores_do_not_depend_on_the_size_of_a_batch(eight, size):
    terms = [Term("trajectory", Trajectory()), Term("background", Background()), Term("light", Fussy())]
    whole, parts = score(terms, eight).outputs, score(terms, eight, size).outputs
    for name, output in whole.items():
        assert np.array_equal(parts[name].score, output.score, equal_nan=True)
        assert np.array_equal(parts[name].frame_score, output.frame_score, equal_nan=True)
        assert parts[name].metrics.keys() == output.metrics.keys()


def test_a_training_term_never_sees_the_true_video_and_a_canary_does(eight):
    def sees(batch):
        return [float(batch.truth is not None)] * len(batch)

    shown = replace(eight, truth=eight.video)
    outputs, _ = score([Term("mine", sees), Term("watch", sees, weight=0, role="canary")], shown)
    assert outputs["mine"].score.max() == 0 and outputs["watch"].score.min() == 1


def test_a_term_that_returns_nonsense_is_a_system_fault_too(black_and_good):
    outputs, faults = score([Term("short", lambda batch: [1.0])], black_and_good)
    assert np.isfinite(outputs["short"].score).all() and not faults, "one score for one clip is right"
    outputs, faults = score([Term("deep", lambda batch: [[1.0]])], black_and_good)
    assert np.isnan(outputs["deep"].score[1]) and "'deep' must return one score per clip" in faults["deep"].text


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
    with pytest.raises(RewardError, match=rf"rewards\.mine[.:] ?{message}"):
        Term("mine", Background(), **options)
