"""One process at a time in a folder: an exclusive lock that names its holder, and that a dead one does not keep."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from dreamlip_train.jobs.atomic_json import parse_json
from dreamlip_train.jobs.user_error import UserError

_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 20.0


class FolderLock:
    """Context manager: this process alone holds ``folder``/``name``.

    The operating system holds the lock (POSIX record locks, which child processes do not inherit and NFS hands on to
    its server). On file systems where such a lock does not reach other hosts, the holder's heartbeat on the file is
    watched.

    Raises:
        UserError: another process holds it; its host and process number are named after ``argument``.
    """

    def __init__(self, folder: Path, name: str, argument: str) -> None:
        self.path, self.argument = folder / name, argument
        self.taken_over = ""
        """Host and process number of a holder that died, else empty."""
        self._ended = threading.Event()

    def __enter__(self) -> FolderLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            self._refuse(self._holder(), error)
        except OSError:  # no locks on this file system: the heartbeat alone
            pass
        holder = self._holder()
        if holder:
            if holder["host"] != socket.gethostname() and self._beats():
                self._refuse(holder)
            self.taken_over = f"process {holder['pid']} on {holder['host']}"
        self._write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        threading.Thread(target=self._beat, name="folder-lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._write("")
        self.file.close()

    def _refuse(self, holder: dict[str, object], error: OSError | None = None) -> None:
        self.file.close()
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise UserError(
            f"{self.argument}: {self.path.parent} is in use by {who}; wait for it to end, end it, "
            "or give another folder"
        ) from error

    def _holder(self) -> dict[str, object]:
        """{"host", "pid"} of who holds or held it; empty after a clean end."""
        self.file.seek(0)
        try:
            content = parse_json(self.file.read())
            return {"host": content["host"], "pid": content["pid"]}
        except (ValueError, KeyError, TypeError):
            return {}

    def _beats(self) -> bool:
        """Whether somebody renews the file."""
        first, deadline = os.fstat(self.file.fileno()).st_mtime_ns, time.monotonic() + _SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if os.stat(self.path).st_mtime_ns != first:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:  # a storage that stutters: the next beat may come through
                continue

    def _write(self, text: str) -> None:
        try:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(text)
            self.file.flush()
        except OSError:  # a full disk: the lock itself holds without its text
            return
