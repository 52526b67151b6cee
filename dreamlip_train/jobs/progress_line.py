"""Progress of work whose length is not known: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.status import Status

_PLAIN_SECONDS = 10.0


class Progress:
    """``with Progress("prepare shards") as progress: progress.update("3 shards")``."""

    def __init__(self, title: str):
        self.title = title
        self.began = self.said = time.monotonic()
        self.status: Status | None = Console(stderr=True).status(title) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def update(self, text: str) -> None:
        """Show where the work stands."""
        now = time.monotonic()
        line = f"{self.title}: {text} ({now - self.began:.0f} s)"
        if self.status:
            self.status.update(line)
        elif now - self.said >= _PLAIN_SECONDS:
            self.said = now
            print(line, file=sys.stderr, flush=True)
