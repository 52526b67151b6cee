"""Checkpoint folders as files: a manifest that lists every file with its size and hash, and has its own hash beside it,
makes one whole.

``RUN/checkpoints/step-00001000/`` is written as ``step-00001000.partial`` and renamed when everything is on disk.
DeepSpeed's own ``latest`` file appears before the other ranks have written; ours is for people and is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.atomic_json import parse_json, read_json
from dreamlip_train.jobs.user_error import UserError

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
ASIDE = ".damaged"
_UNDER_WAY = (".partial", ".replaced", ".universal")
_ENTRIES = ("step", "world_size", "global_batch_size", "data", "skipped_in_a_row", "files")
QUARANTINE = "quarantine.jsonl"  # of the run folder, and in each checkpoint a copy of that moment
logger = logging.getLogger("dreamlip_train")
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
    """The whole checkpoints in ``folder``, newest first: those whose manifest lists only files that are there in
    full.
    """
    return [path for path in _candidates(folder) if problem_of(path) is None]


def _candidates(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    return next(iter(complete_checkpoints(folder)), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """{"step", "world_size", "global_batch_size", "data", "files": {name: {"bytes", "sha256"}}, ..}."""
    return read_json(checkpoint / MANIFEST)


def problem_of(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, the content of its files aside (``damaged_files``): None where it is.

    Raises:
        UserError: it was written by an earlier version of this trainer, whose settings have other names.
    """
    try:
        content = (checkpoint / MANIFEST).read_bytes()
    except OSError as error:
        return f"{MANIFEST} can't be read ({error.strerror})"
    try:
        digest = (checkpoint / MANIFEST_DIGEST).read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        if _is_of_an_earlier_version(content):
            raise UserError(
                f"{checkpoint} was written by an earlier version of this trainer; finish its run with that version, or "
                "export its weights with that version and start another run from them (model.pretrained)"
            ) from error
        return f"{MANIFEST_DIGEST} can't be read ({error.strerror})"
    if hashlib.sha256(content).hexdigest() != digest:
        return f"{MANIFEST} is not what was written (its hash differs from {MANIFEST_DIGEST})"
    try:
        return _missing_part(checkpoint, parse_json(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is no manifest of this trainer ({error!r})"


def _missing_part(checkpoint: Path, manifest: dict[str, Any]) -> str | None:
    """What keeps a checkpoint from being what its manifest lists; KeyError and the like where it is none."""
    if lacking := [entry for entry in _ENTRIES if entry not in manifest]:
        raise KeyError(lacking[0])
    if checkpoint.name != step_folder(checkpoint.parent, manifest["step"]).name:
        return f"its name is not that of step {manifest['step']}, whose checkpoint it holds"
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
    for name in sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.pt")):
        if name not in manifest["files"]:  # DeepSpeed would load it with the others
            return f"{name} is in no manifest"
    return None


def _is_of_an_earlier_version(manifest: bytes) -> bool:
    try:
        return parse_json(manifest)["format"] < 3
    except (ValueError, KeyError, TypeError):
        return False


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path``, a run folder or a checkpoint folder, stands for;
    newer ones that are not whole are warned of.

    Raises:
        UserError: there is none, or it is not whole.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        why = problem_of(path)
        if why:
            raise UserError(f"{path} is not a complete checkpoint: {why}; give an earlier one")
        return path
    for candidate in sorted((path / "checkpoints").glob("step-*"), reverse=True):
        if candidate.name.endswith(_UNDER_WAY):
            continue
        why = "it was put aside as damaged" if ASIDE in candidate.name else problem_of(candidate)
        if why is None:
            return candidate
        logger.warning("CHECKPOINT NOT WHOLE: %s: %s; another one is used", candidate, why)
    raise UserError(
        f"{path} holds no complete checkpoint; give a run folder, a folder checkpoints/step-NNNNNNNN or an open_clip "
        "file"
    )


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
    entries = read_manifest(checkpoint)["files"]
    names = []
    for name in sorted(entries)[part::parts]:
        try:
            entry = describe(checkpoint, [name])[name]
        except OSError:  # a disk that can't read a block
            entry = {"sha256": ""}
        if entry["sha256"] != entries[name]["sha256"]:
            names.append(name)
    return names


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
                f"{path} would call {', '.join(sorted(unknown))} when loaded, which no checkpoint of this trainer "
                "does: it was not loaded. "
                "Resume only runs of your own; start from others' weights with model.pretrained"
            )


def commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """The manifest and its own hash, then the name that counts, then ``latest``."""
    content = json.dumps(manifest, indent=1).encode()
    (partial / MANIFEST).write_bytes(content)
    (partial / MANIFEST_DIGEST).write_text(hashlib.sha256(content).hexdigest() + "\n", encoding="ascii")
    for path in (partial / MANIFEST, partial / MANIFEST_DIGEST, partial):
        _to_disk(path)
    old = final.with_name(final.name + ".replaced")
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    shutil.rmtree(old, ignore_errors=True)
    with atomic_write(final.with_name("latest")) as latest:
        latest.write_text(final.name, encoding="utf-8")
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean_up(folder: Path) -> list[str]:
    """Remove what a crash left behind, and put aside every step-* that is not whole; what was done, a line each.

    A checkpoint that was being replaced comes back.
    """
    lines = []
    for path in sorted(folder.glob("step-*.replaced")):
        if path.with_suffix("").exists() and problem_of(path.with_suffix("")) is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            if path.with_suffix("").exists():
                lines.append(put_aside(path.with_suffix(""), "cut off while it was being replaced"))
            os.rename(path, path.with_suffix(""))
    for suffix, what in (("partial", "a save that was cut off"), ("universal", "a resume that was cut off")):
        for path in sorted(folder.glob(f"step-*.{suffix}")):
            shutil.rmtree(path, ignore_errors=True)
            lines.append(f"{path} is what {what} left; it is removed")
    for path in sorted(folder.glob("step-*")):
        if ASIDE in path.name:
            continue
        why = problem_of(path)
        if why:
            lines.append(put_aside(path, why))
    return lines


def put_aside(checkpoint: Path, why: str) -> str:
    """Rename a checkpoint that can't be used, so that nothing takes it for one; the line that says so."""
    target = checkpoint.with_name(checkpoint.name + ASIDE)
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}{ASIDE}-{number}")
    os.rename(checkpoint, target)
    return f"CHECKPOINT DAMAGED: {checkpoint}: {why}; it is put aside as {target.name}"


def existed(folder: Path) -> bool:
    """Whether a checkpoint was ever written to ``folder``."""
    return (folder / "latest").exists() or any(folder.glob(f"step-*{ASIDE}*"))
