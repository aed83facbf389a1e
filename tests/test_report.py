import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import cv2
import imageio.v2 as imageio
import numpy as np
import pytest
from rich.console import Console

from rl.progress import Progress
from rl.report import INK, ReportError, draw_drag, filmstrip, side_by_side, write_mp4, write_report
from rl.run_folder import RunFolder, RunFolderError
from rollout.sprites import SpriteWorld

METRICS = {"reward/trajectory": 0.71, "reward/quality": 0.9, "train/track_error_px": 1.234, "train/kl": float("nan"),
           "train/ratio_deviation": 3e-7, "train/grad_norm": 0.5, "time/rollout": 0.8, "masked/terms": 2}  # fmt: skip


def sprite_video(index=0, size=64):
    video, tracks, _ = SpriteWorld(size=size).sample("heldout", index)
    return video, tracks


def psnr(a, b):
    return 10 * math.log10(255**2 / np.square(a.astype(float) - b).mean())


# Pictures and videos


def test_every_drag_of_a_picture_is_drawn():
    video, tracks = sprite_video()
    two = np.concatenate((tracks[:, :1], tracks[:, :1] + 6), 1)
    one_drawn, two_drawn = draw_drag(video, tracks[:, :1], 128), draw_drag(video, two, 128)
    assert (one_drawn != draw_drag(video, None, 128)).any() and (two_drawn != one_drawn).any()


def test_an_mp4_plays_the_video_it_was_given(tmp_path):
    video, _ = sprite_video()
    path = write_mp4(tmp_path / "clip.mp4", video, fps=8)
    with imageio.get_reader(path) as reader:
        meta, frames = reader.get_meta_data(), np.stack([*reader.iter_data()])
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 8
    assert frames.shape == (13, 256, 256, 3)
    small = np.stack([cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA) for frame in frames])
    assert psnr(small, video) > 30 > psnr(small, video[::-1])


def test_odd_and_large_pictures_are_encoded_too(tmp_path):
    for height, width, shape in [(301, 203, (302, 204)), (33, 35, (264, 280))]:
        video = np.random.default_rng(0).integers(0, 255, (3, height, width, 3), np.uint8)
        frames = np.stack(imageio.mimread(write_mp4(tmp_path / "clip.mp4", video, fps=12.5)))
        assert frames.shape == (3, *shape, 3)


def test_a_video_that_cannot_be_written_is_a_one_line_error(tmp_path):
    with pytest.raises(ReportError, match="could not be written") as error:
        write_mp4(tmp_path / "no_such_folder" / "clip.mp4", sprite_video()[0], 8)
    assert "\n" not in str(error.value)
    with pytest.raises(ReportError, match="expected videos uint8"):
        write_mp4(tmp_path / "clip.mp4", np.zeros((3, 8, 8, 3), np.float32), 8)


@pytest.mark.parametrize("height", [64, 192, 250])
def test_the_dot_lies_on_the_target_in_every_frame(height):
    tracks = np.stack([np.linspace(10, 50, 13), np.full(13, 30.0)], -1)[:, None]
    drawn = draw_drag(np.full((13, 64, 64, 3), 128, np.uint8), tracks, height)[..., 2].astype(float)
    y, x = np.mgrid[:height, :height]
    for t in range(2, 11):
        dot = np.abs(drawn[t] - np.median(drawn, axis=0))  # the line is there in all frames, the dot moves
        centre = np.array([(dot * x).sum(), (dot * y).sum()]) / dot.sum()
        assert np.abs(centre - ((tracks[t, 0] + 0.5) * height / 64 - 0.5)).max() < 0.1


def test_a_filmstrip_shows_every_row_at_the_same_frames():
    video, tracks = sprite_video()
    strip = filmstrip([("truth", video), ("base", video[:1].repeat(13, 0)), ("tuned", video)], tracks)
    frames = draw_drag(video, tracks, 192)
    height, width, _ = strip.shape
    assert strip.dtype == np.uint8 and height == 28 + 3 * 196
    left = width - 7 * 196
    for column, t in enumerate(range(0, 13, 2)):
        x = left + column * 196
        for row in (0, 2):
            assert (strip[28 + row * 196 :][:192, x : x + 192] == frames[t]).all()
    assert (strip[:28, left:].max(axis=(0, 1)) > 100).all() and (strip[28:, :left].max(axis=(0, 1)) > 100).all()  # text
    assert filmstrip([("one", video[:1])]).shape[1] < 300  # a single frame is one column


def test_videos_of_different_shapes_are_refused():
    video, _ = sprite_video()
    assert side_by_side([video, video, video], gap=2).shape == (13, 64, 196, 3)
    for combine in (side_by_side, lambda videos: filmstrip([("", video) for video in videos])):
        with pytest.raises(ReportError, match="of one shape"):
            combine([video, video[:5]])


# The page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "poster")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_that_holds_everything(tmp_path):
    video, tracks = sprite_video()
    strip, clip = filmstrip([("truth", video)], tracks), write_mp4(tmp_path / "clip.mp4", video, 8)
    history = [{"step": step, **METRICS, "train/kl": None if step % 7 else 0.01} for step in range(50)]
    psnr_db = {"base": 24.0, "tuned": 25.0, "ci95": [0.9, 1.1]}
    summary = {"title": "a <b>run</b> $body", "seed": 3,
               "heldout": {"track_error_px": {"base": 2.0, "tuned": 0.5, "ci95": [-1.6, -1.4]},
                           "canary": {"quality": {"psnr_db": psnr_db}}}}  # fmt: skip
    text = write_report(tmp_path, summary, history, {"a & b": strip}, {"clip": clip}).read_text()
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "b/"} & set(page.tags) and page.tags.count("svg") == 5
    image, film = (base64.b64decode(link.split(",", 1)[1]) for link in page.links if link.startswith("data:"))
    assert (cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB) == strip).all()
    assert film == clip.read_bytes()
    words = " ".join(" ".join(page.text).split())
    for shown in ("a <b>run</b> $body", "a & b", "Held-out track error", "2 → 0.5", "−75 %", "change −1.6 to −1.4",
                  "24 → 25", "Reward terms", "trajectory", "Seconds per phase", "seed"):  # fmt: skip
        assert shown in words, shown
    assert "currentColor" in text and INK not in text and "prefers-color-scheme: dark" in text


def test_a_report_of_a_run_that_did_nothing_is_still_a_page(tmp_path):
    page = Page(write_report(tmp_path, {"heldout": {}}, [], {}, {}).read_text())
    assert "svg" not in page.tags and "video" not in page.tags and "table" in page.tags


def test_a_long_history_stays_a_small_page(tmp_path):
    history = [{"step": step, "reward/a": math.sin(step), "train/kl": math.inf} for step in range(20_000)]
    path = write_report(tmp_path, {}, history, {}, {})
    assert path.stat().st_size < 100_000 and path.read_text().count("<svg") == 1


# The run folder


def test_a_new_folder_is_the_latest_even_within_a_second(tmp_path):
    folders = [RunFolder.create(tmp_path, "train") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert (tmp_path / "train" / "latest").resolve() == folders[-1].path.resolve()
    assert folders[0].checkpoints.is_dir() and folders[0].videos.is_dir()
    assert RunFolder.open(tmp_path / "mine").checkpoints.is_dir()


def test_a_resume_drops_what_lies_after_its_checkpoint_and_what_a_crash_cut_short(tmp_path):
    folder = RunFolder.open(tmp_path)
    folder.truncate_after(5)
    for step in range(8):
        folder.append(step, {"a": np.float32(step), "b": float("nan") if step == 3 else math.inf})
    folder.sync()
    with folder.metrics.open("a") as file:
        file.write('{"step": 8, "a"')
    assert [record["step"] for record in folder.history()] == list(range(8))
    folder.truncate_after(5)
    folder.append(6, {"a": 60})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[3] == {"step": 3, "a": 3.0, "b": None} and lines[6] == {"step": 6, "a": 60}


def test_a_damaged_line_is_named(tmp_path):
    folder = RunFolder.open(tmp_path)
    folder.metrics.write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"metrics.jsonl:2: not JSON"):
        folder.truncate_after(1)


def test_a_full_disk_is_a_one_line_error_and_leaves_the_old_summary(tmp_path):
    folder = RunFolder.open(tmp_path)
    folder.write_summary({"seed": 1, "error": np.float32("nan")})
    folder.metrics.symlink_to("/dev/full")
    (tmp_path / ".summary.json.tmp").symlink_to("/dev/full")
    for write in (lambda: folder.append(0, {"a": 1.0}), lambda: folder.write_summary({"seed": 2})):
        with pytest.raises(RunFolderError, match="No space left on device; free space") as error:
            write()
        assert "\n" not in str(error.value)
    assert json.loads(folder.summary.read_text()) == {"seed": 1, "error": None}
    assert not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="Not a directory"):
        RunFolder.create(tmp_path / "file", "train")


# Progress


def test_away_from_a_terminal_each_iteration_is_one_plain_line():
    out = io.StringIO()
    with Progress(total=4, done=1, console=Console(file=out, width=40)) as progress:
        progress.update(METRICS)
        progress.update({"reward/[red]": 0.5})
    first, second = out.getvalue().splitlines()
    assert re.match(r"2/4  \d+\.\d s  eta \d+:\d\d  trajectory 0\.710  quality 0\.900  track error px 1\.234  ", first)
    assert "kl -" in first and "masked 2" in first and "sync" not in first and "\x1b" not in out.getvalue()
    assert second.startswith("3/4") and second.endswith("[red] 0.500")


def test_the_terminal_is_given_back_whatever_happens():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with pytest.raises(KeyboardInterrupt), Progress(total=4, console=console) as progress:
        progress.update(METRICS)
        assert "iteration 1/4" in Console().render_str(out.getvalue()).plain
        assert "\x1b[?25l" in out.getvalue() and "\x1b[?25h" not in out.getvalue()  # the cursor is hidden
        raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue()
