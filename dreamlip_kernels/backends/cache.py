"""Small JSON files that outlive the process: whole or absent, in the user's cache folder, safe for several processes.

DREAMLIP_CACHE_DIR, else the user's cache folder -> a folder of the user's own among the temporary files -> this
process's memory, with one warning
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("dreamlip_kernels")
_memory: dict[str, Any] = {}
_warned: set[str] = set()


def folders() -> list[Path]:
    """Where files may lie, in the order in which they are looked for and written; none where a process has neither a
    home nor a folder for temporary files.
    """
    return [folder for folder in (_of_user(), _temporary()) if folder is not None]


def _of_user() -> Path | None:
    folder, caches = os.environ.get("DREAMLIP_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(folder).expanduser() if folder else Path(caches or Path("~/.cache").expanduser()) / "dreamlip"
    except RuntimeError:  # a user id that nobody has an entry for, without HOME: as containers are started
        return None


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir()) / f"dreamlip-{_user()}"
    except OSError:
        return None


def read(name: str) -> tuple[Any, str] | None:
    """(content, where it was) of the first file ``name`` that is whole and the user's own;
    one that is neither is skipped with a warning.
    """
    for folder in folders():
        path = folder / name
        try:
            if not is_own(folder):
                _warn_once(f"{folder} belongs to another user and is not read")
                continue
            return json.loads(path.read_text(encoding="utf-8")), str(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            _warn_once(f"{path} can't be read and is taken for absent: {error}")
    return (_memory[name], "memory") if name in _memory else None


def write(name: str, content: Any) -> str:
    """Store ``content`` where the first folder takes it, and return the path, or "memory" where none does."""
    reasons = []
    for folder in folders():
        try:
            return str(_replace(folder, name, content))
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    reasons = reasons or ["there is neither a home nor a folder for temporary files"]
    _warn_once(f"nothing can be stored on disk ({'; '.join(reasons)}): kept in memory, for this process alone")
    _memory[name] = content
    return "memory"


def remove(name: str) -> None:
    """No ``name`` any more, wherever it was."""
    _memory.pop(name, None)
    for folder in folders():
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def write_file(path: Path, content: Any) -> None:
    """Replace ``path`` at once: a crash leaves the old file or the new one, and of several writers the last one's is
    there whole.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """One process at a time, as far as the system can lock files in the cache folder; a log line says that it waits.
    The lock ends with the process that holds it.
    """
    with contextlib.ExitStack() as files:
        for folder in folders():
            try:
                import fcntl

                make(folder)
                if not is_own(folder):
                    continue
                file = files.enter_context((folder / f"{name}.lock").open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.warning("another process has %s: waiting for its end", file.name)
                    fcntl.flock(file, fcntl.LOCK_EX)
                break
            except (OSError, ImportError):
                continue
        yield


def _replace(folder: Path, name: str, content: Any) -> Path:
    make(folder)
    if not is_own(folder):
        raise PermissionError(1, "it belongs to another user")
    write_file(folder / name, content)
    return folder / name


def make(folder: Path) -> None:
    """The folder is there, for this user alone where it is new."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def is_own(folder: Path) -> bool:
    """Whether the user's own: anyone may create a folder among the temporary files, and what lies there decides what
    runs.
    """
    return folder != _temporary() or not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
