"""What the reward doctor found, on a terminal, as plain data for CI, and on one page with every video beside its
scores.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards.battery import HACKS, SHIFTS, Stage
from rewards.doctor import ENTRIES, MIX, Examination, Verdict, mix_of, noise
from rewards.terms import Term
from rl.report import PAGE, VIDEO, draw_drag, write_mp4
from rl.run_folder import write_atomically

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "accepted": "cyan"}
ABOUT = {
    "truth": "the true video",
    **{name: f"the objects end {name} from their target" for name in SHIFTS},
    **HACKS,
}


@dataclass(frozen=True)
class Checkup:
    """terms: those checked. stages: what on. found: what they, and the terms they are compared with, said."""

    terms: Sequence[Term]
    stages: Sequence[Stage]
    found: Mapping[str, Examination]
    verdicts: Sequence[Verdict]

    @property
    def passed(self) -> bool:
        return all(v.status != "fail" for v in self.verdicts)

    @property
    def columns(self) -> dict[str, Examination]:
        """The checked terms that ran, and their mix if there is one."""
        ran = {term.name: self.found[term.name] for term in self.terms if not self.found[term.name].fault}
        mix = mix_of(self.terms, self.found)
        return ran if mix is None else {**ran, MIX: mix}

    def mean(self, column: str, entry: str) -> float:
        """Mean score over the stages, as a share of the range; NaN where nothing was scored."""
        scores = self.columns[column].scores[:, ENTRIES.index(entry)]
        return float(np.nanmean(scores)) if np.isfinite(scores).any() else np.nan


def summary(checkup: Checkup) -> dict[str, Any]:
    """Plain data: passed, the verdicts, and by term (and mix) the mean score of each entry, noise and speed."""
    return {
        "passed": checkup.passed,
        "verdicts": [asdict(v) for v in checkup.verdicts],
        "terms": {
            name: {
                "scores": {entry: checkup.mean(name, entry) for entry in ENTRIES},
                "noise": dict(zip(("share", "sd"), noise(e.group))),
                "ms_per_video": e.ms,
            }
            for name, e in checkup.columns.items()
        },
    }


def print_checkup(checkup: Checkup, console: Console) -> None:
    """Two tables: the mean score of every entry, and the verdicts."""
    columns = checkup.columns
    scores = Table("battery", *columns, title="mean score, as a share of the range", title_justify="left")
    for entry in ENTRIES:
        scores.add_row(entry, *(f"{checkup.mean(name, entry):.3f}" for name in columns))
    verdicts = Table("reward", "check", "verdict", "", title="verdicts", title_justify="left")
    before = ""
    for v in checkup.verdicts:
        subject = v.subject if v.subject != before else ""
        verdicts.add_row(Text(subject), v.check, Text(v.status, style=STYLES[v.status]), Text(v.text))
        before = v.subject
    console.print(scores, verdicts)
    failed = [f"{v.subject}: {v.check}" for v in checkup.verdicts if v.status == "fail"]
    console.print(Text(f"FAILED {', '.join(failed)}", "bold red") if failed else Text("PASSED", "bold green"))


def write_page(folder: Path, checkup: Checkup, shown: int, fps: float) -> Path:
    """Writes folder/report.html, complete in itself, with the videos of the first `shown` stages; returns its path."""
    rows = "".join(
        f'<tr class="{v.status}"><th>{escape(v.subject)}</th><td>{escape(v.check)}</td><td><b>{v.status}</b></td>'
        f"<td>{escape(v.text)}</td></tr>"
        for v in checkup.verdicts
    )
    body = [
        STYLE,
        f"<header><p>Reward check on {len(checkup.stages)} scenes</p><div class='cards'><div><b>"
        f"{'passed' if checkup.passed else 'failed'}</b></div></div></header>",
        f'<section><h2>Verdicts</h2><div class="scroll"><table>{rows}</table></div></section>',
    ]
    for s, stage in enumerate(checkup.stages[:shown]):
        cards = "".join(_card(folder, checkup, s, entry, video, fps) for entry, video in stage.battery().items())
        body.append(f'<section><h2>{escape(stage.drag.id)}</h2><div class="battery">{cards}</div></section>')
    path = Path(folder) / "report.html"
    write_atomically(path, PAGE.substitute(title="Reward check", body="\n".join(body)))
    return path


def _card(folder: Path, checkup: Checkup, s: int, entry: str, video: np.ndarray, fps: float) -> str:
    drawn = draw_drag(video, checkup.stages[s].drag.tracks, 4 * video.shape[1])
    mp4 = write_mp4(Path(folder) / "videos" / f"{s:02d}_{entry.replace(' ', '_')}.mp4", drawn, fps)
    uri = f"data:video/mp4;base64,{base64.b64encode(mp4.read_bytes()).decode()}"
    bars = []
    for name, e in checkup.columns.items():
        score, truth = e.scores[s, ENTRIES.index(entry)], e.scores[s, 0]
        away = "" if entry == "truth" else f"{score - truth:+.2f}"
        value = 0 if np.isnan(score) else score
        bars.append(
            f"<tr><th>{escape(name)}</th><td><meter value='{value:.3f}'></meter></td><td>{score:.2f}</td>"
            f"<td>{away}</td></tr>"
        )
    caption = f"<b>{escape(entry)}</b> {escape(ABOUT[entry])}"
    return f"<figure><figcaption>{caption}</figcaption>{VIDEO.format(uri)}<table>{''.join(bars)}</table></figure>"


STYLE = """<style>
.battery { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px 24px; }
.battery td, .battery th { padding: 2px 10px 2px 0; border: 0; }
.battery meter { width: 90px; }
tr.fail b { color: #d23f3f; } tr.warn b { color: #b8860b; } tr.pass b { color: #3c9a5f; }
tr.accepted b { color: #3d85c6; }
</style>"""
