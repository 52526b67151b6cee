"""Files that say who works on what, so that processes on any machines of a shared file system divide the work without
talking to each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from dreamlip_train.jobs.atomic_json import read_json


class Claims:
    """Claims in ``folder`` in the name of ``owner`` (this process by default). One that has not been renewed for
    ``stale_seconds`` is anybody's.
    """

    def __init__(self, folder: Path, stale_seconds: float, owner: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stale_seconds = folder, stale_seconds
        self.host = socket.gethostname()
        self.owner = owner or f"{self.host}:{os.getpid()}"

    def take(self, name: str) -> bool:
        """Whether the claim on ``name`` is ours now."""
        path = self._path(name)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return self._is_free(path) and self._take_over(path)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"owner": self.owner}, file)
        except OSError:
            path.unlink(missing_ok=True)  # empty, on a full disk: nobody's, and yet not free before it is stale
            raise
        return True

    def _take_over(self, path: Path) -> bool:
        """Replace a free claim. Several may find it free: they look again one at a time, and the second finds the first
        one's.
        """
        lock = path.with_suffix(".takeover")
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if (
                    time.time() - lock.stat().st_mtime > self.stale_seconds
                ):  # its owner died doing so; the next attempt finds it gone
                    lock.unlink()
            return False
        try:
            if not self._is_free(path):
                return False
            new = path.with_name(f"{path.name}.{self.host}.{os.getpid()}.{threading.get_ident()}")
            new.write_text(json.dumps({"owner": self.owner}))
            os.replace(new, path)
            return True
        finally:
            lock.unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        try:
            age = time.time() - path.stat().st_mtime
            owner = read_json(path)["owner"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError):  # its owner is just writing it, or died doing so
            owner, age = "", time.time() - path.stat().st_mtime
        host, _, process = owner.rpartition(":")
        owner_is_gone = host == self.host and process.isdigit() and not _is_alive(int(process))
        return owner == self.owner or owner_is_gone or age > self.stale_seconds

    def renew(self, name: str) -> None:
        """Say that the work on ``name`` continues."""
        with contextlib.suppress(FileNotFoundError):  # taken over, done and released: both write the same
            os.utime(self._path(name))

    def release(self, name: str) -> None:
        """Give the claim up."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
