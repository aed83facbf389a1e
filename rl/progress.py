"""What one watches while a training runs: a live table on a terminal, one line per iteration anywhere else."""

from __future__ import annotations

import math
import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASES = ("rollout", "reward", "learn", "sync")


class Progress:
    """Shows iteration, remaining time and the metrics of the newest iteration; a context manager.

        with Progress(total=100, done=20) as progress:
            progress.update({"reward/trajectory": 0.7, "train/kl": 0.01, "time/rollout": 0.4})

    total: iterations of the whole training. done: those that a resume finds done. Known metrics are "reward/<term>",
    "train/track_error_px", "train/ratio_deviation", "train/kl", "train/grad_norm", "time/<phase>" in seconds, and
    "masked/terms"; those that are missing are not shown. Leaving the context gives the terminal back in any case.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self.total, self.done = total, done
        self._console = console or Console()
        self._seconds: deque[float] = deque(maxlen=20)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        self._last = time.monotonic()
        if self._live:
            self._live.start()
            self._live.update(Text(f"iteration {self.done}/{self.total}: the next one is under way"), refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, metrics: dict[str, float]) -> None:
        """One more iteration is done."""
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last, self.done = now, self.done + 1
        groups = _groups(metrics)
        if self._live:
            self._live.update(self._table(groups), refresh=True)
        else:
            cells = [f"{label} {value}" for group in groups.values() for label, value in group]
            line = "  ".join([f"{self.done}/{self.total}", f"{self._seconds[-1]:.1f} s", f"eta {self._eta()}", *cells])
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _eta(self) -> str:
        seconds = round(sum(self._seconds) / len(self._seconds) * (self.total - self.done))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"

    def _table(self, groups: dict[str, list[tuple[str, str]]]) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"iteration {self.done}/{self.total}", style="bold"),
            ProgressBar(total=self.total, completed=self.done, width=30),
            Text(f"{self._seconds[-1]:.1f} s each, {self._eta()} left", style="dim"),
        )
        body = Table.grid(padding=(0, 2))
        for title, group in groups.items():
            cells = Text("   ").join(Text.assemble((f"{label} ", "dim"), value) for label, value in group)
            body.add_row(Text(title, style="cyan"), cells)
        return Group(head, body)


def _groups(metrics: dict[str, float]) -> dict[str, list[tuple[str, str]]]:
    """Title -> (label, formatted value) of the metrics that are there, in the order they are shown."""
    named = {
        "reward": [(key.removeprefix("reward/"), key, "{:.3f}") for key in metrics if key.startswith("reward/")],
        "policy": [
            ("track error px", "train/track_error_px", "{:.3f}"),
            ("|ratio-1|", "train/ratio_deviation", "{:.1e}"),
            ("kl", "train/kl", "{:.2e}"),
            ("grad norm", "train/grad_norm", "{:.3g}"),
            ("masked", "masked/terms", "{:.0f}"),
        ],
        "seconds": [(phase, f"time/{phase}", "{:.2f}") for phase in PHASES],
    }
    found = {
        title: [(label, _number(metrics[key], form)) for label, key, form in rows if key in metrics]
        for title, rows in named.items()
    }
    return {title: rows for title, rows in found.items() if rows}


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"
