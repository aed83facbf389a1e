import json
import re
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_cases import run_job
from test_folder_prompts import bright_centre

from rollout.folder import FolderPrompts
from rollout.prompts import PromptError
from rollout.tables import TablePrompts

FRAMES, SIZE, ROOT = 5, 32, Path(__file__).parents[1]
SAVED = ROOT / "tests/data/saved_dataset"  # by datasets 5.2.0: three rows in two files, Image() and Array2D features


def png(x=50):
    """A black picture of 120 x 80 px with a white disc at (x, 40)."""
    picture = np.zeros((80, 120, 3), np.uint8)
    cv2.circle(picture, (x, 40), 6, (255, 255, 255), -1)
    return cv2.imencode(".png", picture)[1].tobytes()


def line(x=50.0, y=40.0, dx=2.0, frames=FRAMES):
    """One point, [frames][points][2]."""
    return [[[x + dx * t, y]] for t in range(frames)]


def row(**changed):
    return {"image": {"bytes": png(), "path": None}, "text": "", "tracks": line(), **changed}


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def dataset(path, rows, shards=1):
    """What `save_to_disk` writes: Arrow streams, and state.json that lists them."""
    path.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for name, part in zip(names, np.array_split(np.arange(len(rows)), shards)):
        table = pa.Table.from_pylist([rows[i] for i in part], pa.Table.from_pylist(rows or [row()]).schema)
        with pa.ipc.new_stream(str(path / name), table.schema) as stream:
            stream.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


def load(path, **more):
    return TablePrompts(path, SIZE, FRAMES, **more)


def texts(source, split, count=99):
    return {source.prompt(split, i).text for i in range(count)}


def numbered(count, **changed):
    return [row(text=str(i), **changed) for i in range(count)]


@pytest.mark.parametrize("write", [parquet, dataset])
@pytest.mark.parametrize("kind", ["struct", "bytes", "path", "path in a struct"])
def test_a_row_is_the_prompt_that_the_same_row_of_a_folder_is(tmp_path, write, kind):
    (tmp_path / "disc.png").write_bytes(png())
    name = "../disc.png" if write is dataset else "disc.png"  # relative to the file
    image = {"struct": {"bytes": png(), "path": "a.png"}, "bytes": png(), "path": name,
             "path in a struct": {"bytes": None, "path": name}}[kind]  # fmt: skip
    points = [[[50.0 + t, 40.0], [60.0, 30.0 + t]] for t in range(FRAMES)]
    visible = [[True, t < 3] for t in range(FRAMES)]
    rows = [row(image=image, tracks=points, visible=visible, text="a disc")]
    given = load(write(tmp_path / "rows.parquet", rows)).prompt("train", 0)
    by_track = {"tracks": np.swapaxes(points, 0, 1).tolist(), "visible": np.swapaxes(visible, 0, 1).tolist()}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"image": "disc.png", "text": "a disc", **by_track}))
    same = FolderPrompts(tmp_path, SIZE, FRAMES).prompt("train", 0)
    assert given.text == same.text and (given.first_frame == same.first_frame).all()
    assert (given.tracks == same.tracks).all() and (given.visible == same.visible).all()
    assert np.abs(given.tracks[0, 0] - bright_centre(given.first_frame)).max() < 0.1
    assert given.tracks.shape == (FRAMES, 2, 2), "frames and points are not mixed up"


def test_a_dataset_saved_by_the_library_itself_is_read():
    source = TablePrompts(SAVED, SIZE, 13)
    assert source.splits.counts == {"train": 2, "heldout": 1}
    prompts = [source.prompt("train", i) for i in range(2)] + [source.prompt("heldout", 0)]
    assert {p.text for p in prompts} == {"disc 0", "disc 1", "disc 2"}
    for prompt in prompts:
        assert np.abs(prompt.tracks[0, 0] - bright_centre(prompt.first_frame)).max() < 0.1
        assert prompt.visible.all() and np.allclose(np.diff(prompt.tracks[:, 0, 0]), SIZE / 40, atol=1e-4)


def test_rows_are_found_in_every_file_and_row_group(tmp_path):
    for i in range(3):
        parquet(tmp_path / f"part/{i}.parquet", numbered(12)[4 * i : 4 * i + 4], row_group_size=3)
    source = load(tmp_path)
    assert len(source.files) == 3 and [len(file.starts) for file in source.files] == [2, 2, 2]
    assert texts(source, "train") | texts(source, "heldout") == {str(i) for i in range(12)}
    order = [int(source.prompt("train", i).text) for i in range(source.splits.counts["train"])]
    assert all(a < b for a, b in pairwise(order)), "consecutive prompts share a row group"


def test_nothing_but_the_split_is_read_before_a_row_is_sampled(tmp_path):
    rows = [*numbered(3, split="train"), row(image={"bytes": b"no picture", "path": None}, split="heldout")]
    source = load(parquet(tmp_path / "rows.parquet", rows, row_group_size=2))
    assert texts(source, "train") == {"0", "1", "2"}
    with pytest.raises(PromptError, match=r"rows.parquet: row 3: image \(10 bytes\) cannot be read as a picture"):
        source.prompt("heldout", 0)


def test_drawn_rows_are_held_out_for_good(tmp_path):
    path = parquet(tmp_path / "rows.parquet", numbered(40), row_group_size=10)
    source = load(path)
    train, heldout = texts(source, "train"), texts(source, "heldout")
    assert len(heldout) == 4 and len(train) == 36 and not train & heldout
    assert texts(load(path), "heldout") == heldout == texts(source, "canary")
    assert texts(source, "pretrain") == train
    assert texts(load(path, seed=1), "heldout") != heldout


def test_a_single_row_is_in_every_split(tmp_path):
    source = load(parquet(tmp_path / "rows.parquet", numbered(1)))
    assert texts(source, "train") == texts(source, "heldout") == {"0"} and not source.has_heldout
    assert len({source.prompt(split, i).id for split in ("train", "heldout") for i in range(3)}) == 6


def test_rows_marked_heldout_are_never_trained_on(tmp_path):
    marks = ["train", "heldout", None, "heldout"]
    source = load(dataset(tmp_path / "set", [row(text=str(i), split=mark) for i, mark in enumerate(marks)], shards=2))
    assert texts(source, "train") == {"0", "2"} and texts(source, "heldout") == {"1", "3"}
    with pytest.raises(PromptError, match="split 'train' is empty"):
        load(parquet(tmp_path / "held.parquet", numbered(2, split="heldout"))).prompt("train", 0)


def test_the_test_split_of_a_dataset_dict_is_held_out(tmp_path):
    dataset(tmp_path / "all/train", numbered(3))
    dataset(tmp_path / "all/test", [row(text="t")])
    (tmp_path / "all/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    source = load(tmp_path / "all")
    assert texts(source, "train") == {"0", "1", "2"} and texts(source, "heldout") == {"t"}
    (tmp_path / "all/dataset_dict.json").write_text(json.dumps({"splits": ["train", "extra"]}))
    with pytest.raises(PromptError, match="split 'extra' is none of train, heldout, test, validation"):
        load(tmp_path / "all")


NAN = float("nan")


@pytest.mark.parametrize(("changed", "message"), [
    ({"image": {"bytes": b"", "path": None}}, r"image \(0 bytes\) cannot be read"),
    ({"image": {"bytes": None, "path": None}}, "image is null"),
    ({"image": None}, "image is null"),
    ({"image": {"bytes": None, "path": "cat.png"}}, "image 'cat.png' is not a file in"),
    ({"tracks": None}, "tracks has 0 frames; it needs 5"),
    ({"tracks": line(frames=4)}, "tracks has 4 frames; it needs 5"),
    ({"tracks": [*line()[:4], []]}, "tracks has 1 points in frame 0 and 0 in frame 4"),
    ({"tracks": [[]] * 5}, "one or more tracks"),
    ({"tracks": [*line()[:4], [[NAN, 1.0]]]}, "track 0, frame 4: a point is"),
    ({"tracks": [*line()[:4], [[1.0, 2.0, 3.0]]]}, "two finite numbers"),
    ({"tracks": [*line()[:4], [[1.0, None]]]}, "two finite numbers"),
    ({"tracks": line(10)}, r"track 0 is at \(10, 40\) in frame 0, outside the centre square 20 <= x <= 99"),
    ({"visible": [[True]] * 4}, "visible has 4 frames"),
    ({"visible": [[True, True]] * 5}, "a list of 1 lists"),
    ({"visible": [[None]] * 5}, "must be true or false"),
])  # fmt: skip
@pytest.mark.parametrize("write", [parquet, dataset])
def test_a_bad_row_is_refused_with_file_and_row(tmp_path, write, changed, message):
    good = row(visible=[[True]] * FRAMES, split="train")
    path = write(tmp_path / "rows.parquet", [good, good, {**good, "split": "heldout", **changed}])
    source = load(path)
    assert source.prompt("train", 1).visible.all()
    with pytest.raises(PromptError, match=message) as error:
        source.prompt("heldout", 0)
    file = path / "data-00000-of-00001.arrow" if write is dataset else path
    assert str(error.value).startswith(f"{file}: row 2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "message"), [
    ([{"image": b"", "text": ""}], "the column 'tracks' is missing; it has image, text"),
    ([{"tracks": line()}], "the column 'image' is missing"),
    ([row(image=7)], r"the column 'image' must be \{bytes, path\} or bytes or text, not number"),
    ([row(image={"data": b""})], "the column 'image' must be"),
    ([row(tracks=line()[0])], r"the column 'tracks' must be number\[\]\[\]\[\], not number\[\]\[\]"),
    ([row(tracks="[[[1, 2]]]")], "the column 'tracks' must be"),
    ([row(visible=[[1]])], r"the column 'visible' must be bool\[\]\[\], not number\[\]\[\]"),
    ([row(text=3)], "the column 'text' must be text, not number"),
    ([row(split="train"), row(split="test")], 'row 1: split must be "train" or "heldout", not \'test\''),
])  # fmt: skip
@pytest.mark.parametrize("write", [parquet, dataset])
def test_a_column_that_is_missing_or_of_another_type_is_named_at_the_start(tmp_path, write, rows, message):
    with pytest.raises(PromptError, match=message) as error:
        load(write(tmp_path / "rows.parquet", rows))
    assert "rows.parquet" in str(error.value)


def test_what_is_no_table_is_refused_with_its_name(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("gone.parquet", "empty"):
        with pytest.raises(PromptError, match=f"{path}: no table"):
            load(tmp_path / path)
    (tmp_path / "notes.parquet").write_text("not a table")
    with pytest.raises(PromptError, match=r"notes\.parquet cannot be read as parquet"):
        load(tmp_path / "notes.parquet")
    with pytest.raises(PromptError, match="no prompts"):
        load(dataset(tmp_path / "none", []))
    saved = dataset(tmp_path / "set", [row()])
    arrow = saved / "data-00000-of-00001.arrow"
    arrow.write_bytes(b"\0" * 100)
    with pytest.raises(PromptError, match=f"{arrow.name} cannot be read as arrow|{arrow.name}: the column"):
        load(saved)
    arrow.unlink()
    with pytest.raises(PromptError, match=f"{arrow.name} cannot be read as arrow"):
        load(saved)
    (saved / "state.json").write_text("{}")
    with pytest.raises(PromptError, match=r"state.json is damaged \(KeyError"):
        load(saved)


@pytest.mark.slow
def test_the_page_on_prompts_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Its Python and its commands, one after the other; only the dataset is the one that the library wrote."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = (ROOT / "docs/prompts.md").read_text()
    more = ["cluster=inline", "tracking.uri=null", "train.iterations=1", "rollout.prompts_per_iteration=1"]
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page, re.S):
        if language == "bash":
            for command in block.splitlines():
                name, *words = command.removeprefix("python -m jobs.").split()
                assert run_job(name, *words, *more, "rollout.prompts_per_task=1", "evaluate.prompts=1") == 0, command
        elif "import datasets" in block:
            (tmp_path / "outputs/drags_dataset").symlink_to(SAVED)
        else:
            exec(block, {})
    assert capsys.readouterr().out.count("2 prompts to train on, 1 held out") == 3


def test_every_faulty_row_is_printed_before_a_training_meets_it(tmp_path, capsys):
    rows = [row(tracks=line(frames=13, dx=0)) for _ in range(6)]
    rows[1], rows[4] = row(), row(tracks=line(10, frames=13))
    path = parquet(tmp_path / "rows.parquet", rows)
    assert run_job("check_prompts", "prompts=table", f"prompts.path={path}") == 1
    out, err = capsys.readouterr()
    assert {line.split(": ")[1] for line in out.splitlines()} == {"row 1", "row 4"}
    assert err == f"error: 2 of 6 rows of {path} cannot be used; mend them or take them out\n"
    assert run_job("check_prompts", "prompts=table") == 1 and "prompts.path is missing" in capsys.readouterr().err
    assert run_job("check_prompts") == 1 and "nothing to check" in capsys.readouterr().err
