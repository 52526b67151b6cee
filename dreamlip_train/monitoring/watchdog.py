"""A thread that speaks up when a rank makes no progress, and names what it waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_QUIET_SECONDS = 120.0


class Watchdog:
    """Context manager. ``now(doing)`` at every change of activity; after two minutes in one, and then after each
    doubling, ``say`` gets a line.

    ``details`` adds lines, such as which loader worker has been silent.
    """

    def __init__(
        self,
        rank: int,
        say: Callable[[str], None],
        details: Callable[[float], list[str]],
        quiet_seconds: float = _QUIET_SECONDS,
    ) -> None:
        self.rank, self.say, self.details, self.quiet_seconds = rank, say, details, quiet_seconds
        self._doing, self._since, self._patience = "starting", time.monotonic(), quiet_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def now(self, doing: str) -> None:
        """This rank begins to do something else."""
        self._doing, self._since, self._patience = doing, time.monotonic(), self.quiet_seconds

    def _watch(self) -> None:
        while not self._ended.wait(self.quiet_seconds / 4):
            seconds = time.monotonic() - self._since
            if seconds >= self._patience:
                self._patience = 2 * seconds
                self.say(
                    "; ".join(
                        [
                            f"rank {self.rank} has been {self._doing} for {seconds:.0f} s",
                            *self.details(self.quiet_seconds),
                        ]
                    )
                )
