"""A file of lines that a full disk does not end a program for: what could not be written is kept and written when there
is room.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path

_KEPT_LINES = 100_000


class LineFile:
    """Appends whole lines to ``path``, each on disk (the operating system's cache) when ``write`` returns,
    or kept in memory. The file appears with its first line.

    ``say`` is called with a text when writing begins to fail and when everything is written again.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.waiting: deque[bytes] = deque(maxlen=_KEPT_LINES)
        self.failing: OSError | None = None
        self.file: FileIO | None = None

    def write(self, line: str) -> None:
        """Append ``line`` (without its newline), after those that wait."""
        self.waiting.append(line.encode("utf-8", errors="backslashreplace") + b"\n")
        self._write_waiting()

    def require_written(self) -> None:
        """Try once more to write what waits.

        Raises:
            OSError: some of it still can't be written.
        """
        self._write_waiting()
        if self.failing:
            raise OSError(self.failing.errno, self.failing.strerror, str(self.path))

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        self._write_waiting()
        if self.file is not None:
            self.file.close()

    def _write_waiting(self) -> None:
        try:
            while self.waiting:
                self.file = self.file or self._open()
                count = self.file.write(self.waiting[0])
                if count < len(self.waiting[0]):  # the disk filled up in the middle of the line
                    self.waiting[0] = self.waiting[0][count:]
                else:
                    self.waiting.popleft()
        except OSError as error:
            if not self.failing:
                self.say(
                    f"{self.path} CAN'T BE WRITTEN: {error.strerror}. The program continues and writes it when there "
                    "is room"
                )
            self.failing = OSError(error.errno, error.strerror)  # without the traceback and what it holds
            return
        if self.failing:
            self.failing = None
            self.say(f"{self.path} is written again, with nothing missing")

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > 0 and not _ends_with_newline(self.path):
            self.waiting.appendleft(b"\n")  # a crash cut its last line off
        return self.path.open("ab", buffering=0)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
