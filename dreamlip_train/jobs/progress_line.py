"""How far long work is and when it ends: a bar on a terminal, elsewhere a line every 30 s, or JSON lines on request.

``dreamlip-train --progress STYLE COMMAND`` says which for every command. All of it goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from datetime import timedelta
from typing import Any, Literal, cast, get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.user_error import UserError

Style = Literal["auto", "bar", "lines", "json", "off"]
_LINE_SECONDS = 30.0
_JSON_SECONDS = 1.0
_style: Style = "auto"


def set_progress_style(style: str) -> None:
    """Show all further progress of this process so: "auto" is a bar on a terminal and lines elsewhere.

    Raises:
        UserError: there is no such style.
    """
    global _style
    if style not in get_args(Style):
        raise UserError(f"--progress: got {style!r}; give {', '.join(get_args(Style))}")
    _style = cast(Style, style)


class Progress:
    """``with Progress("prepare shards", total=9, unit="shards") as progress: progress.advance()``.

    Safe to call from several threads. Without a ``total`` there is no time left to tell.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "") -> None:
        self.title, self.total, self.unit = plain(title), total, unit
        self.done = self.skipped = 0
        self.text = ""
        self.style = _style if _style != "auto" else ("bar" if sys.stderr.isatty() else "lines")
        self.began = self.last_print = time.monotonic()
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.style == "bar":
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            # Standard output stays what it is: it may be a file while standard error is a terminal.
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
            self.task = self.bar.add_task(self.title, total=self.total, text="")
            self.bar.start()
        elif self.style != "off":
            threading.Thread(target=self._tell_regularly, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.bar is not None:
            self.bar.stop()
        elif self.style == "json":
            self._print(finished=True)

    def advance(self, count: int = 1, text: str = "") -> None:
        """So much more is done; ``text`` says what else there is to tell."""
        with self.lock:
            self.done += count
            self._show(text)

    def skip(self, count: int) -> None:
        """So much was done before, which says nothing of how long the rest takes."""
        with self.lock:
            self.done += count
            self.skipped += count
            self._show(self.text)

    def _show(self, text: str) -> None:
        self.text = plain(text) or self.text
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, text=self.text)
        elif self.style == "json" and time.monotonic() - self.last_print >= _JSON_SECONDS:
            self._print()

    def _tell_regularly(self) -> None:
        """Also where one item takes long: a job that says nothing looks dead."""
        while not self.ended.wait(_LINE_SECONDS):
            with self.lock:
                self._print()

    def _seconds_left(self, seconds: float) -> float | None:
        if self.total is None or self.done <= self.skipped:
            return None
        return max(0, self.total - self.done) * seconds / (self.done - self.skipped)

    def _print(self, *, finished: bool = False) -> None:
        self.last_print = time.monotonic()
        seconds = self.last_print - self.began
        left = self._seconds_left(seconds)
        if self.style == "json":
            record: dict[str, Any] = {"progress": self.title, "done": self.done, "total": self.total, "unit": self.unit}
            record |= {"seconds": round(seconds, 1), "seconds_left": None if left is None else round(left, 1)}
            line = json.dumps(record | {"text": self.text, "finished": finished})
        else:
            count = f"{self.done:,}" + (f" of {self.total:,}" if self.total is not None else "")
            parts = [f"{count} {self.unit}"] if self.unit else []
            parts += [self.text] if self.text else []
            parts.append(f"{timedelta(seconds=round(seconds))} so far")
            parts += [f"about {timedelta(seconds=round(left))} left"] if left is not None else []
            line = f"{self.title}: {', '.join(parts)}"
        with contextlib.suppress(OSError):  # a closed pipe, or a file on the full disk: no reason to end the work
            print(line, file=sys.stderr, flush=True)
