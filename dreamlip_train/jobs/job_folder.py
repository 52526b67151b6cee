"""A folder that belongs to one job: started again the job resumes in it, and another one is refused instead of mixing
with it. What of the job is done are files that are whole, and a note of what each holds.

Who makes a file is settled elsewhere: by the folder's lock, or by ``work_claims`` where processes share a job.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_json import read_json, write_json
from dreamlip_train.jobs.folder_lock import FolderLock
from dreamlip_train.jobs.user_error import RunError, UserError

_JOB = "job.json"


@contextmanager
def job_folder(output: Path, state: str, job: dict[str, Any], what: str, *, shared: bool = False) -> Iterator[Path]:
    """``output``/``state``, in which ``job`` is written down, for as long as this process works in it.

    Args:
        job: the inputs and settings that decide what is written, as json.
        what: what the folder holds if it is another job's, for the message.
        shared: several processes work on the job; one that fails before any has made or claimed anything takes its
            note of the job back. Else the folder is locked, and the notes of another job that has written no shard yet
            give way. So a command that failed does not keep the folder from the corrected one.
    Raises:
        UserError: the folder can't be written, is in use or another job's, or has shards of unknown origin.
        RunError: the disk is full, or fails otherwise.
    """
    folder = output / state
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not shared:
                stack.enter_context(FolderLock(folder, "writing.lock", "--output"))
        except OSError as error:
            raise UserError(f"--output: cannot write into {str(output)!r}: {error.strerror or error}") from error
        with failed_writes_named(output, "--output"):
            first = _claim(output, folder, job, what, shared)
            try:
                yield folder
            except UserError:  # of another process of the same command too
                if shared and first and not _has_work(output, folder):
                    _clear(folder)
                raise


@contextmanager
def failed_writes_named(folder: Path, option: str) -> Iterator[None]:
    """An OSError within it is a RunError that names ``option`` and how much room ``folder`` has."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(folder).free / 1e9
        raise RunError(
            f"{option}: {error} ({free:.2f} GB free). What is finished is kept; make room and give the same command "
            "again"
        ) from error


def _claim(output: Path, folder: Path, job: dict[str, Any], what: str, shared: bool) -> bool:
    """Write the job down where nobody has, and return whether this process did."""
    job_file, job = folder / _JOB, json.loads(json.dumps(job))
    if not shared and _is_of_another(job_file, job) and not any(output.glob("*.tar")):
        _clear(folder)
    if _is_of_another(job_file, job):
        raise UserError(f"--output: {str(output)!r} holds {what}; give another folder or delete it")
    if not job_file.exists() and any(output.glob("*.tar")):
        raise UserError(
            f"--output: {str(output)!r} holds .tar files that this command did not write; give another folder"
        )
    if job_file.exists():
        return False
    write_json(job_file, job)
    return True


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _has_work(output: Path, folder: Path) -> bool:
    """Whether there is a shard, an answer, or the claim of a process that is at one."""
    has_output = any(output.glob("*.tar")) or any(path.stat().st_size for path in folder.glob("*.jsonl"))
    return has_output or any(path.is_file() for path in folder.glob("claims/*"))


def _is_of_another(job_file: Path, job: dict[str, Any]) -> bool:
    return job_file.exists() and read_json(job_file) != job


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
