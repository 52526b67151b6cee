"""What of a long job is done: files that are whole, and a note of what each holds. Started again, a job makes the rest.

Who makes a file is settled elsewhere: by ``job_folder``'s lock, or by ``work_claims`` where processes share a job.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_json import read_json, write_json


def make_once(file: Path, note: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``make()``, unless that is done: it writes ``file`` whole, or leaves it out, and returns what is to be noted.

    Returns:
        what was noted, and "bytes": the size of ``file``, None where it was left out.
    """
    done = finished(file, note)
    if done is None:
        file.unlink(missing_ok=True)
        done = {**make(), "bytes": _size(file)}
        write_json(note, done)
    return done


def finished(file: Path, note: Path) -> dict[str, Any] | None:
    """What is noted of ``file``; None where it is to be made: no note, or the file is not the one that it is about."""
    try:
        done = read_json(note)
    except (OSError, ValueError):
        return None
    return done if isinstance(done, dict) and done.get("bytes", -1) == _size(file) else None


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.exists() else None
