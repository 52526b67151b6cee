"""Checkpoints that are whole or absent, saved in two phases around DeepSpeed's writer.

All ranks write ``step-NNNNNNNN.partial``; when every one of them has succeeded, rank 0 gives it a manifest and its name
(files.py). A crash or a full disk leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dreamlip_train.checkpoint.files import (
    QUARANTINE,
    commit,
    complete_checkpoints,
    describe,
    files_of,
    read_manifest,
    step_folder,
)
from dreamlip_train.checkpoint.ranks import SaveError, all_or_none, deaths_told_afterwards, describe_error
from dreamlip_train.checkpoint.state import TrainState, random_state
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import format_config
from dreamlip_train.model.weight_average import WeightAverage


def save(
    engine: Any,
    folder: Path,
    config: Config,
    progress: TrainState,
    data: str = "",
    average: WeightAverage | None = None,
) -> Path:
    """Write ``folder``/step-NNNNNNNN on all ranks, then drop all but the newest checkpoint.keep_last. Collective.

    While steps are being skipped for values that are not finite, the newest checkpoint of before them stays too.
    The run folder's quarantine.jsonl, without which an epoch can't be repeated, is part of the checkpoint.

    Args:
        data: the loader's fingerprint, which a resume compares.
    Raises:
        SaveError: a rank could not write; every earlier checkpoint is still complete, and nothing else has changed.
    """
    final = step_folder(folder, progress.step)
    partial = final.with_name(final.name + ".partial")
    try:
        with deaths_told_afterwards():
            _phase_one(engine, partial, progress)
            _phase_two(partial, final, config, progress, data, average)
            _drop_old(folder, config.checkpoint.keep_last)
    except SaveError as error:
        free = shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        usable = next(iter(complete_checkpoints(folder)), None)
        keep = f"{usable} is complete" if usable else "there is no earlier checkpoint"
        dist.barrier()
        raise SaveError(f"checkpoint {final} could not be written: {error} ({free:.1f} GB free). {keep}") from error
    return final


def _drop_old(folder: Path, keep_last: int) -> None:
    if dist.get_rank() == 0:
        checkpoints = complete_checkpoints(folder)
        good = next((path for path in checkpoints if not read_manifest(path)["skipped_in_a_row"]), None)
        for old in checkpoints[keep_last:]:
            if old != good:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _phase_one(engine: Any, partial: Path, progress: TrainState) -> None:
    """DeepSpeed's files, and each rank's random state, under a name that no resume looks at."""
    with all_or_none():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    random_states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(random_states, random_state())
    client_state = {"progress": asdict(progress), "random": random_states}
    with all_or_none() as errors, _errors_kept(engine, errors):
        engine.save_checkpoint(str(partial.parent), tag=partial.name, client_state=client_state, save_latest=False)


def _phase_two(
    partial: Path, final: Path, config: Config, progress: TrainState, data: str, average: WeightAverage | None
) -> None:
    """Everything to disk and hashed, each rank its share of the files; then the manifest and the name."""
    text = format_config(config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with all_or_none():
        if rank == 0:
            (partial / "config.toml").write_text(text, encoding="utf-8")
            if average is not None:
                average.save(partial)
            quarantine = final.parent.parent / QUARANTINE
            if quarantine.exists():
                shutil.copyfile(quarantine, partial / QUARANTINE)
    entries: list[Any] = [None] * ranks
    with all_or_none():
        names = files_of(partial)
        mine = describe(partial, names[rank::ranks])
    dist.all_gather_object(entries, mine)
    manifest = {
        "format": 3,
        "step": progress.step,
        "world_size": ranks,
        "global_batch_size": config.train.global_batch_size,
        "data": data,
        "skipped_in_a_row": progress.skipped_in_a_row,
        "backends": progress.backends,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "files": {k: v for part in entries for k, v in sorted(part.items())},
    }
    with all_or_none():
        if rank == 0:
            commit(partial, final, manifest)


@contextlib.contextmanager
def _errors_kept(engine: Any, errors: list[str]) -> Iterator[None]:
    """DeepSpeed's file writers, their errors kept in ``errors``: a rank that left its save_checkpoint early would leave
    the others in a barrier.
    """

    def careful(write: Callable[..., Any]) -> Callable[..., None]:
        def wrapper(*arguments: Any, **options: Any) -> None:
            try:
                write(*arguments, **options)
            except (OSError, RuntimeError) as error:
                errors.append(describe_error(error))

        return wrapper

    writer = engine.checkpoint_engine
    writer.save, engine._copy_recovery_script = careful(writer.save), careful(engine._copy_recovery_script)
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script
