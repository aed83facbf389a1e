import json

import cv2
import numpy as np
import pytest

from rollout.folder import FolderPrompts
from rollout.prompts import PromptError

FRAMES, SIZE = 5, 32


def track(x=50.0, y=40.0, dx=2.0, count=FRAMES):
    return [[x + dx * t, y] for t in range(count)]


def folder(tmp_path, *rows, width=120, height=80):
    """A folder with one picture: black, with a white disc of radius 6 px at (50, 40)."""
    picture = np.zeros((height, width, 3), np.uint8)
    cv2.circle(picture, (50, 40), 6, (255, 255, 255), -1)
    cv2.imwrite(str(tmp_path / "disc.png"), picture)
    (tmp_path / "text.png").write_text("not a picture")
    lines = [
        row if isinstance(row, str) else json.dumps({"image": "disc.png", "tracks": [track()], **row}) for row in rows
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def load(path):
    return FolderPrompts(path, SIZE, FRAMES)


def bright_centre(frame):
    weight = frame.astype(float).mean(-1)
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


@pytest.mark.parametrize(("width", "height"), [(120, 80), (80, 120), (101, 80), (80, 80)])
@pytest.mark.parametrize("size", [16, 32, 160])
def test_the_drag_stays_on_the_object_when_the_picture_is_cropped_and_resized(tmp_path, width, height, size):
    prompt = FolderPrompts(folder(tmp_path, {}, width=width, height=height), size, FRAMES).prompt("train", 0)
    assert prompt.first_frame.shape == (size, size, 3) and prompt.first_frame.dtype == np.uint8
    pixel = size / 80
    assert np.abs(prompt.tracks[0, 0] - bright_centre(prompt.first_frame)).max() < 0.1 * max(pixel, 1)
    assert np.allclose(np.diff(prompt.tracks[:, 0], axis=0), [2 * pixel, 0], atol=1e-4)
    naive = np.array([50.0, 40.0]) * size / max(width, height)  # resizing without the crop would put it elsewhere
    assert width == height or np.abs(naive - bright_centre(prompt.first_frame)).max() > pixel


def test_pictures_are_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "red.png"), np.full((40, 40, 3), (0, 0, 255), np.uint8))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"image": "red.png", "tracks": [track(10, 10)]}))
    assert load(tmp_path).prompt("train", 0).first_frame[0, 0].tolist() == [255, 0, 0]


def test_corner_pixels_of_the_square_stay_inside_the_picture(tmp_path):
    path = folder(tmp_path, {"tracks": [track(20, 0, 0), track(99, 79, 0)]})
    tracks = load(path).prompt("train", 0).tracks
    assert tracks[0].tolist() == [[0, 0], [SIZE - 1, SIZE - 1]]


def test_an_invisible_point_may_leave_the_picture(tmp_path):
    hidden = {"tracks": [track(90, 40, 5)], "visible": [[True, True, False, False, False]]}
    prompt = load(folder(tmp_path, hidden)).prompt("train", 0)
    assert prompt.visible[:, 0].tolist() == [True, True, False, False, False]
    assert prompt.tracks[-1, 0, 0] > SIZE


def test_a_split_indexes_its_rows_modulo_their_number(tmp_path):
    source = load(folder(tmp_path, {"text": "a"}, {"text": "b"}, {"text": "c"}))
    assert [source.prompt("train", i).text for i in range(5)] == ["a", "b", "c", "a", "b"]
    assert [source.prompt("heldout", i).text for i in range(3)] == ["a", "b", "c"] and not source.has_heldout
    assert source.truth(source.prompt("train", 0)) is None
    ids = {source.prompt(split, i).id for split in ("train", "heldout") for i in range(5)}
    assert len(ids) == 10  # a repeated row is another draw, with noise of its own


def test_rows_marked_heldout_are_never_trained_on(tmp_path):
    source = load(folder(tmp_path, {"text": "a"}, {"text": "b", "split": "heldout"}, {"text": "c", "split": "train"}))
    assert source.has_heldout
    assert {source.prompt("train", i).text for i in range(9)} == {"a", "c"}
    assert {source.prompt(split, i).text for split in ("heldout", "canary") for i in range(9)} == {"b"}
    with pytest.raises(PromptError, match="split 'train' is empty"):
        load(folder(tmp_path, {"split": "heldout"})).prompt("train", 0)


@pytest.mark.parametrize(("row", "message"), [
    ('{"image": ', "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ({"drags": []}, "unknown key 'drags'; the keys are image, video, tracks, text, visible, split"),
    ('{"image": "disc.png"}', "the key 'tracks' is missing"),
    ({"image": "cat.png"}, "image 'cat.png' is not a file in"),
    ({"image": 7}, "image 7 is not a file in"),
    ({"image": "text.png"}, "image 'text.png' cannot be read as a picture"),
    ({"text": 3}, "text must be a string"),
    ({"split": "test"}, 'split must be "train" or "heldout"'),
    ({"tracks": []}, "one or more tracks"),
    ({"tracks": [track(), track(count=4)]}, "track 1 has 4; it needs 5 points"),
    ({"tracks": [[*track()[:4], [1, float("nan")]]]}, "track 0, frame 4: a point is"),
    ({"tracks": [[[1, 10**400]] * FRAMES]}, "two finite numbers"),
    ({"tracks": [[[1, "2"]] * FRAMES]}, "track 0, frame 0: a point is"),
    ({"tracks": [[[1, 2, 3]] * FRAMES]}, "two finite numbers"),
    ({"tracks": [track(10)]}, r"track 0 is at \(10, 40\) in frame 0, outside the centre square 20 <= x <= 99"),
    ({"tracks": [track(90, dx=5)]}, r"at \(100, 40\) in frame 2"),
    ({"visible": [[True] * 4]}, "visible 0 has 4; it needs 5 flags"),
    ({"visible": [[1] * 5]}, "must be true or false"),
    ({"visible": [[True] * 5] * 2}, "a list of 1 lists"),
])  # fmt: skip
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, row, message):
    with pytest.raises(PromptError, match=message) as error:
        load(folder(tmp_path, {}, row))
    assert "prompts.jsonl:2: " in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(PromptError, match="no such file"):
        load(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    with pytest.raises(PromptError, match="no prompts"):
        load(tmp_path)
