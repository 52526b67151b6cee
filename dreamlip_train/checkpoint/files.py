"""Checkpoint folders as files: a manifest that lists every file with its size and hash makes one whole, and resuming goes by manifests alone.

``RUN/checkpoints/step-00001000/`` is written as ``step-00001000.partial`` and renamed when everything is on disk. DeepSpeed's own ``latest`` file
appears before the other ranks have written; ours is for people and is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.user_error import UserError

MANIFEST = "manifest.json"
# What DeepSpeed pickles into its files beside tensors and plain Python. Anything else could run code when it is loaded.
_PICKLED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or will be."""
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, newest first: those whose manifest lists only files that are there in full."""
    return sorted((path for path in folder.glob("step-" + "[0-9]" * 8) if is_complete(path)), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    return next(iter(complete_checkpoints(folder)), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """{"step", "world_size", "global_batch_size", "data", "files": {name: {"bytes", "sha256"}}, ..}."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint's manifest is there with its size."""
    try:
        files = read_manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path``, a run folder or a checkpoint folder, stands for.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        if not is_complete(path):
            raise UserError(
                f"{path} is not a complete checkpoint: files of its manifest.json are missing or cut short; give an earlier one"
            )
        return path
    found = newest(path / "checkpoints")
    if found is None:
        raise UserError(
            f"{path} holds no complete checkpoint; give a run folder, a folder checkpoints/step-NNNNNNNN or an open_clip file"
        )
    return found


def files_of(folder: Path) -> list[str]:
    """Every file below ``folder``, by its path from there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifest entries of these files, which are forced to disk on the way."""
    entries = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            entries[name] = {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return entries


def damaged_files(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Files whose content is not what was written; ranks can share the reading, each doing its ``part``."""
    listed = read_manifest(checkpoint)["files"]
    mine = sorted(listed)[part::parts]
    return [name for name, entry in describe(checkpoint, mine).items() if entry["sha256"] != listed[name]["sha256"]]


def refuse_foreign_pickles(checkpoint: Path) -> None:
    """Look into every .pt file, without loading it, for what could run code; DeepSpeed loads its files as full pickles.

    Raises:
        UserError: a file names a function or class that no checkpoint of this trainer holds.
    """
    import torch

    for path in sorted(checkpoint.rglob("*.pt")):
        try:
            unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _PICKLED
        except Exception as error:  # whatever a file that is no checkpoint raises
            raise UserError(f"{path} is not a torch checkpoint file: {error}") from error
        if unknown:
            raise UserError(
                f"{path} would call {', '.join(sorted(unknown))} when loaded, which no checkpoint of this trainer does: it was not loaded. "
                "Resume only runs of your own; start from others' weights with model.pretrained"
            )


def commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """The manifest, then the name that counts, then ``latest``."""
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (partial / MANIFEST, partial):
        _to_disk(path)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    latest = final.with_name("latest.tmp")
    latest.write_text(final.name, encoding="utf-8")
    os.replace(latest, final.with_name("latest"))
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean_up(folder: Path) -> None:
    """Remove what a crash left behind; a checkpoint that was being replaced comes back."""
    for path in folder.glob("step-*.replaced"):
        if is_complete(path) and not is_complete(path.with_suffix("")):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            os.rename(path, path.with_suffix(""))
    for suffix in ("partial", "replaced", "universal"):
        for path in folder.glob(f"step-*.{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
