"""A folder that belongs to one job: started again the job goes on in it, and another one is refused instead of mixing
with it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.user_error import UserError


def claim_output(output: Path, state: str, job: dict[str, Any], what: str, *, sole: bool = False) -> Path:
    """Make ``output``/``state``, in which ``job`` is written down, or check that it is of the same job; return it.

    Args:
        job: the inputs and settings that decide what is written, as json.
        what: what the folder holds, for the message.
        sole: nobody else works here, so the notes of another job that has written no shard yet give way: a command that
            failed does not keep the folder from the corrected one.
    Raises:
        UserError: the folder is another job's, or has shards of unknown origin.
    """
    folder = output / state
    folder.mkdir(parents=True, exist_ok=True)
    known, job = folder / "job.json", json.loads(json.dumps(job))
    if sole and _is_of_another(known, job) and not any(output.glob("*.tar")):
        for path in folder.iterdir():
            if path.suffix != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if _is_of_another(known, job):
        raise UserError(f"--output: {str(output)!r} holds {what}; give another folder or delete it")
    if not known.exists() and any(output.glob("*.tar")):
        raise UserError(
            f"--output: {str(output)!r} holds .tar files that this command did not write; give another folder"
        )
    if not known.exists():
        write_json(known, job)
    return folder


def _is_of_another(known: Path, job: dict[str, Any]) -> bool:
    return known.exists() and json.loads(known.read_text(encoding="utf-8")) != job
