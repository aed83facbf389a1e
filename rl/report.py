"""A run on one page: report.html holds its pictures, videos and curves itself, and opens anywhere without a server."""

from __future__ import annotations

import base64
import io
import math
import re
import subprocess
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import cv2
import imageio_ffmpeg
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from rl.run_folder import write_atomically

LABELS = {
    "track_error_px": ("Held-out track error", "px"),
    "canary/track_error_px": ("Canary: a second tracker", "px"),
    "canary/quality/psnr_db": ("Canary: PSNR against the truth", "dB"),
    "sharpness": ("Sharpness against the truth", ""),
}
PANELS = (  # title, the metrics (a regular expression whose group is the label), logarithmic
    ("Reward terms", r"reward/([^/]+)", False),
    ("Track error, px", r"(\w+)/track_error_px", False),
    ("KL to the reference", r"train/(kl)", False),
    ("max |ratio \N{MINUS SIGN} 1|", r"train/(ratio_deviation)", True),
    ("Seconds per phase", r"time/(.+)", False),
)
COLOURS = ("#3d85c6", "#e07b39", "#4fa36c", "#b264a8", "#c9a227", "#7a8ba3")
DRAG_COLOURS = ((255, 209, 60), (90, 220, 255), (255, 120, 190))
VIDEO = '<video controls autoplay loop muted playsinline src="{}"></video>'
STRIP = '<div class="scroll"><img alt="" src="{}"></div>'
INK = "#010203"
"""Stands for the page's own text colour in a figure, so that a curve fits the light and the dark page."""
NIGHT = (22, 24, 29)


class ReportError(ValueError):
    """Videos that do not fit together, or an encoder that failed."""


def draw_drag(video: np.ndarray, tracks: np.ndarray | None, height: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> the same, enlarged to `height` px (bicubic), each drag a line with a dot at its target.

    tracks: float [T, N, 2], (x, y) in pixels of the video, pixel centres at integers; None draws nothing.
    """
    scale = height / video.shape[1]
    size = (round(video.shape[2] * scale), height)
    frames = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in video]
    if tracks is not None:
        points = np.rint(((tracks + 0.5) * scale - 0.5) * 16).astype(np.int32)  # cv2's fixed point, 4 fractional bits
        dot = round(16 * max(3, height / 48))
        for t, frame in enumerate(frames):
            for n in range(points.shape[1]):
                colour = DRAG_COLOURS[n % len(DRAG_COLOURS)]
                line, target = np.ascontiguousarray(points[:, n]), tuple(map(int, points[t, n]))
                cv2.polylines(frame, [line], False, NIGHT, 3, cv2.LINE_AA, 4)
                cv2.polylines(frame, [line], False, colour, 2, cv2.LINE_AA, 4)
                cv2.circle(frame, target, dot + 24, NIGHT, -1, cv2.LINE_AA, 4)
                cv2.circle(frame, target, dot, colour, -1, cv2.LINE_AA, 4)
    return np.stack(frames)


def filmstrip(rows: list[tuple[str, np.ndarray]], tracks: np.ndarray | None = None, columns: int = 7,
              height: int = 192) -> np.ndarray:  # fmt: skip
    """Labelled videos below each other -> one picture, uint8 [h, w, 3].

    rows: (label, uint8 [T, H, W, 3]) each, e.g. truth, base, tuned; all of one shape. tracks: float [T, N, 2] px, drawn
    on every frame. columns: at most so many frames, spread over the video. height: of a frame, px.
    """
    _check_shapes([video for _, video in rows])
    count = len(rows[0][1])
    shown = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    font, gap, top = ImageFont.load_default(15), 4, 28
    left = 24 + round(max(font.getlength(label) for label, _ in rows))
    films = [draw_drag(video, tracks, height)[shown] for _, video in rows]
    width = films[0].shape[2]
    canvas = np.full((top + len(rows) * (height + gap), left + len(shown) * (width + gap), 3), NIGHT, np.uint8)
    for row, film in enumerate(films):
        for column, frame in enumerate(film):
            y, x = top + row * (height + gap), left + column * (width + gap)
            canvas[y : y + height, x : x + width] = frame
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, (label, _) in enumerate(rows):
        draw.text((12, top + row * (height + gap) + height / 2), label, (232, 234, 237), font, anchor="lm")
    for column, t in enumerate(shown):
        middle = left + column * (width + gap) + width / 2
        draw.text((middle, top / 2), f"frame {t}", (140, 146, 156), font, anchor="mm")
    return np.asarray(picture)


def side_by_side(videos: list[np.ndarray], gap: int = 2) -> np.ndarray:
    """uint8 [T, H, W, 3] each, all of one shape -> uint8 [T, H, n W + (n - 1) gap, 3]."""
    _check_shapes(videos)
    bar = np.full((*videos[0].shape[:2], gap, 3), NIGHT, np.uint8)
    return np.concatenate([part for video in videos for part in (bar, video)][1:], axis=2)


def write_mp4(path: Path, video: np.ndarray, fps: float) -> Path:
    """uint8 [T, H, W, 3] -> H.264, yuv420p, enlarged by a whole factor to a height of at least 256 px; returns path.

    Raises ReportError with the encoder's last line when it fails, for instance on a full disk.
    """
    _check_shapes([video])
    _, height, width, _ = video.shape
    factor = math.ceil(256 / height)
    even = f"scale=iw*{factor}:ih*{factor}:flags=bicubic,pad=ceil(iw/2)*2:ceil(ih/2)*2"
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
    target = f"-vf {even} -c:v libx264 -crf 18 -pix_fmt yuv420p -movflags +faststart -f mp4".split()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-threads", "1", *source, *target, str(path)]
    done = subprocess.run(command, input=video.tobytes(), capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ReportError(f"{path}: the video could not be written ({reason[0]})")
    return path


def write_report(folder: Path, summary: dict[str, Any], history: list[dict[str, Any]], strips: dict[str, np.ndarray],
                 videos: dict[str, Path]) -> Path:  # fmt: skip
    """Writes folder/report.html, complete in itself, and returns its path.

    summary: anything nested, shown as a table; two keys have a meaning: "title", and the headline figures
    "heldout", as `rl.run.summarise` makes it: of its {"base", "tuned", "ci95"} those that `LABELS` names stand on top.
    history: one dict per iteration with "step" and the metrics that `PANELS` names; None where a value is missing.
    strips: caption -> uint8 [h, w, 3], see `filmstrip`. videos: caption -> mp4 file, see `write_mp4`.
    Raises RunFolderError when the file cannot be written.
    """
    title = str(summary.get("title", Path(folder).resolve().name))
    curves = [svg for panel in PANELS if (svg := _curve(history, *panel))]
    films = [_figure(name, STRIP, "image/png", _png(image)) for name, image in strips.items()]
    clips = [_figure(name, VIDEO, "video/mp4", mp4.read_bytes()) for name, mp4 in videos.items()]
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _rows(summary))
    body = [
        f"<header><p>{escape(title)}</p>{_headline(summary.get('heldout', {}))}</header>",
        _section("Before and after", "".join(films)),
        _section("Videos", "".join(clips), "clips"),
        _section("Training", "".join(curves), "curves"),
        _section("Summary", f'<div class="scroll"><table>{table}</table></div>'),
    ]
    path = Path(folder) / "report.html"
    write_atomically(path, PAGE.substitute(title=escape(title), body="\n".join(body)))
    return path


def figures(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The {"base", "tuned", "ci95"} of a nested summary, by their path."""
    for key, value in tree.items():
        if isinstance(value, dict) and "base" in value:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from figures(value, f"{prefix}{key}/")


def _headline(heldout: dict[str, Any]) -> str:
    found, cards = dict(figures(heldout)), []
    for name, (label, unit) in LABELS.items():
        if name in found:
            base, tuned, (low, high) = (found[name][key] for key in ("base", "tuned", "ci95"))
            change = f"{100 * (tuned / base - 1):+.0f} %".replace("-", "&minus;") if base else ""
            note = f"change {low:+.3g} to {high:+.3g} (95 % CI)".replace("-", "&minus;")
            figure = f"<b>{base:.3g} <i>&rarr;</i> {tuned:.3g}<small>{unit}</small></b>"
            cards.append(f"<div><h1>{escape(label)}</h1>{figure}<span>{change}</span><p>{note}</p></div>")
    return f'<div class="cards">{"".join(cards)}</div>'


def _curve(history: list[dict[str, Any]], title: str, pattern: str, logarithmic: bool) -> str:
    """One panel as inline SVG; "" where the history has nothing to show."""
    series = {}
    for name in dict.fromkeys(name for record in history for name in record):
        if found := re.fullmatch(pattern, name):
            points = [(record["step"], record[name]) for record in history if _is_number(record.get(name))]
            if points:
                series[found[1]] = np.array(points, float).T
    if not series:
        return ""
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.edgecolor": INK,
             "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure((4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for (name, (steps, values)), colour in zip(series.items(), COLOURS * len(series)):
            smooth = _running_mean(values, max(1, len(values) // 20))
            thin = slice(None, None, math.ceil(len(values) / 400))
            if len(values) > 40:
                axes.plot(steps[thin], values[thin], color=colour, alpha=0.3, linewidth=0.8)
            dots = "." if len(values) < 20 else ""
            axes.plot(steps[thin], smooth[thin], color=colour, linewidth=1.6, label=name, marker=dots)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yscale("log" if logarithmic and any((values > 0).any() for _, values in series.values()) else "linear")
        axes.set_xlabel("iteration", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2).replace(INK, "currentColor")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _rows(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            items = value if isinstance(value, list | tuple) else [value]
            yield f"{prefix}{key}", ", ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in items)


def _check_shapes(videos: list[np.ndarray]) -> None:
    shapes = {video.shape for video in videos}
    if len(shapes) != 1 or any(video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 for video in videos):
        raise ReportError(f"expected videos uint8 [T, H, W, 3] of one shape, not {sorted(map(str, shapes))}")


def _section(title: str, content: str, kind: str = "") -> str:
    return f'<section><h2>{title}</h2><div class="{kind}">{content}</div></section>' if content else ""


def _figure(caption: str, element: str, kind: str, data: bytes) -> str:
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f"<figure><figcaption>{escape(caption)}</figcaption>{element.format(uri)}</figure>"


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1c1f24; --soft: #666d78; --line: #e3e4e6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111317; --ink: #e6e8eb; --soft: #98a0ab; --line: #2a2e35; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 20px 64px; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header > p { margin: 0 0 12px; color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 20px 48px; }
.cards h1 { margin: 0; font-size: 14px; font-weight: 500; color: var(--soft); }
.cards b { font-size: 28px; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards div:first-child b { font-size: 44px; line-height: 1.15; }
.cards div:first-child { flex-basis: 100%; }
.cards i { font-style: normal; font-weight: 300; color: var(--soft); }
.cards small { margin-left: 5px; font-size: 15px; font-weight: 400; color: var(--soft); }
.cards span { margin-left: 12px; color: var(--soft); font-weight: 600; }
.cards p { margin: 0; font-size: 13px; color: var(--soft); }
section { margin-top: 40px; padding-top: 16px; border-top: 1px solid var(--line); }
h2 { margin: 0 0 12px; font-size: 18px; font-weight: 600; }
figure { margin: 0 0 20px; }
figcaption { margin-bottom: 6px; font-size: 13px; color: var(--soft); }
.scroll { overflow-x: auto; }
.scroll img { display: block; width: 100%; min-width: 680px; border-radius: 6px; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 8px 20px; }
video { display: block; width: 100%; border-radius: 6px; background: #16181d; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px 24px; }
.curves svg { width: 100%; height: auto; }
.curves svg text { font-family: inherit !important; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 24px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 400; color: var(--soft); }
</style>
</head>
<body>
$body
</body>
</html>
""")
