"""Signals that ask a run to stop: the first is remembered and acted on after the step, the same one again leaves at
once.

SIGTERM (pre-emption, ``scancel``, ``torchrun``), SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 (SLURM's ``--signal=USR1@300``,
submitit).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A launcher passes a signal on that its process group has already got: that is not a second wish.
_ECHO_SECONDS = 1.0


class StopRequest:
    """Context manager under which ``name`` is None until a signal came, and then the first one's name."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._first: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self.name, self._since = number, signal.Signals(number).name, time.monotonic()
            _say(f"{self.name}: finishing the step and saving; the same signal again leaves now, without saving")
        elif number == self._first and time.monotonic() - self._since > _ECHO_SECONDS:
            _say(f"{self.name} again: leaving now; the newest checkpoint is what the next run resumes from")
            os._exit(128 + number)


def _say(text: str) -> None:
    # print() may be in the middle of a line, and is not reentrant.
    os.write(2, f"\n[rank {os.environ.get('RANK', '0')}] {text}\n".encode())
