import numpy as np
import pytest
import torch
from reward_cases import batch_of, film

from rewards.contract import RewardError, RewardOutput, as_output, over_scored, resolve


@pytest.fixture(scope="module")
def batch():
    return batch_of([film(0), film(1)], [0, 1], frames=[3, 4])


@pytest.mark.parametrize(
    "value",
    [
        [0.25, 0.5],
        (0.25, 0.5),
        np.array([0.25, 0.5]),
        torch.tensor([0.25, 0.5], requires_grad=True),
        torch.tensor([0.25, 0.5], dtype=torch.bfloat16),
        {"score": [0.25, 0.5], "sharpness": [3.0, 4.0]},
        RewardOutput(np.float32([0.25, 0.5])),
    ],
)
def test_everything_that_means_one_score_per_clip_is_accepted(value, batch):
    output = as_output(value, batch, "mine")
    assert output.score.dtype == np.float32
    np.testing.assert_allclose(output.score, [0.25, 0.5])


def test_scores_per_frame_are_averaged_over_the_scored_frames_only(batch):
    frames = np.zeros(batch.scored.shape)
    frames[:, 3], frames[:, 4], frames[:, 5] = 0.2, 0.4, 1.0
    output = as_output({"score": frames, "extra": [1, 2]}, batch, "mine")
    np.testing.assert_allclose(output.score, [0.3, 0.3], rtol=1e-6)
    assert np.isnan(output.frame_score[:, 5]).all() and output.metrics["extra"].tolist() == [1, 2]


def test_none_means_not_scored(batch):
    assert np.isnan(as_output([None, 0.5], batch, "mine").score).tolist() == [True, False]


def test_a_clip_without_any_scored_value_is_not_scored():
    values = np.float32([[1, np.nan], [1, 0]])
    np.testing.assert_equal(over_scored(values, np.bool_([[False, True], [True, True]])), np.float32([np.nan, 0.5]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5], r"'mine' must return one score per clip, \[2\].* not \[1\]"),
        (0.5, r"not \[\]"),
        ([0.5, 7.0], r"returned 7, outside its range 0..1"),
        ([0.5, np.inf], r"returned inf, outside its range"),
        ({"reward": [0.5, 0.5]}, r"without 'score'; it has \['reward'\]"),
        ({"score": [0.5, 0.5], "px": [1.0]}, r"metric 'px' must be \[2\], not \[1\]"),
        ("good", r"score must be numbers, not str 'good'"),
        ([[0.5], "x"], r"score must be numbers, not list"),
        (RewardOutput(np.float32([0, 0]), np.zeros((2, 3))), r"frame_score must be \[2, 13\], not \[2, 3\]"),
    ],
)
def test_a_wrong_return_value_is_refused_with_the_name_of_the_reward(value, message, batch):
    with pytest.raises(RewardError, match=message):
        as_output(value, batch, "mine")


def test_a_declared_range_is_the_one_that_is_checked(batch):
    assert as_output([2.0, 9.0], batch, "aesthetic", (1.0, 10.0)).score.tolist() == [2, 9]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("video", np.zeros((2, 13, 64, 64), np.uint8), r"RewardBatch.video must be \[B, T, H, W, 3\]"),
        ("scored", np.ones((2, 13)), r"RewardBatch.scored must be bool \[2, 13\], not float64 \[2, 13\]"),
        ("point_mask", np.ones((2, 9), bool), r"target_tracks must be float32 \[2, 13, 9, 2\]"),
        ("group_id", ("one",), r"RewardBatch.group_id must have one entry per clip \(2\), not 1"),
    ],
)
def test_a_malformed_batch_is_refused_with_the_name_of_the_field(field, value, message):
    with pytest.raises(RewardError, match=message):
        batch_of([film(0), film(1)], [0, 1], **{field: value})


def test_hidden_and_padded_points_have_no_weight():
    plain = batch_of([film(0)], [0])
    visible = plain.target_visible.copy()
    visible[:, 0] = False
    assert plain.weights.sum() > 0
    assert batch_of([film(0)], [0], target_visible=visible).weights.sum() == 0
    assert batch_of([film(0)], [0], point_mask=np.zeros_like(plain.point_mask)).weights.sum() == 0


def test_a_reward_is_found_by_module_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(batch):\n    return batch.video.mean((1, 2, 3, 4)) / 255\n")
    by_file = resolve(f"{tmp_path}/mine.py:brightness")
    batch = batch_of([film(0)], [0])
    assert 0 < as_output(by_file(batch), batch, "brightness").score[0] < 1
    assert resolve(f"{tmp_path}/mine.py:brightness") is by_file
    assert resolve("rewards.contract:RewardError") is RewardError


def test_a_reward_is_made_from_the_text_of_its_file_where_the_file_is_not(tmp_path):
    text = "class Judge:\n    scale: int = 2\n    def __call__(self, batch):\n        return [1 / 0]\n"
    spec = f"{tmp_path}/gone.py:Judge"
    with pytest.raises(RewardError, match="no such file"):
        resolve(spec)
    made = resolve(spec, text)
    assert made.__annotations__ == {"scale": int}, "the file's annotations are not turned into strings"
    with pytest.raises(ZeroDivisionError) as error:
        made()(None)
    assert str(error.traceback[-1].path) == f"{tmp_path}/gone.py" and "return [1 / 0]" in str(
        error.traceback[-1].statement
    )
    assert resolve(spec, text.replace("2", "3")).scale == 3, "an edited file is another one"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rewards.contract", "must be 'package.module:function' or 'path/to/file.py:function'"),
        ("rewards.nothing:f", "importing rewards.nothing failed: ModuleNotFoundError"),
        ("nowhere/mine.py:f", "no such file"),
        ("rewards.contract:as_outptu", "has no 'as_outptu'; did you mean 'as_output'"),
        ("rewards.corruptions:REACH", "'REACH' is a float, not a function or class"),
        ("{tmp}/broken.py:f", "running .*broken.py failed: ZeroDivisionError"),
    ],
)
def test_a_reward_that_cannot_be_found_says_why(spec, message, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RewardError, match=message):
        resolve(spec.replace("{tmp}", str(tmp_path)))
