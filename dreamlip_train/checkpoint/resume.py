"""Where a run starts: anew, or from the newest checkpoint that is whole, undamaged and of the same run."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dreamlip_train.checkpoint.files import (
    QUARANTINE,
    clean_up,
    complete_checkpoints,
    damaged_files,
    existed,
    find_checkpoint,
    newest,
    put_aside,
    read_manifest,
)
from dreamlip_train.checkpoint.ranks import on_first_rank
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import differences, read_config
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

# Other values of these need other tensors in the checkpoint, or are another recipe altogether.
_FIXED = {
    "data": ("proportions",),  # the position in an epoch follows from them
    "model": ("name", "config", "context_length", "patch_projection", "local_logit_scale", "init_logit_bias"),
    "optim": ("optimizer", "vision_lr_scale", "text_lr_scale", "layer_decay"),  # other groups of parameters
    "train": ("global_batch_size", "precision"),
    "deepspeed": ("zero_stage",),
}
# These say where, how fast and how often, not what is trained. The shards are compared by what they amount to.
_FREE = {
    "data": (
        *("shards", "mixture", "val_shards", "num_workers", "pin_memory", "allow_pipe"),
        *("max_bad_fraction", "max_member_mb", "stall_seconds", "eval_source"),
    ),
    "model": ("pretrained",),
    "loss": ("backend", "contrastive_backend", "grouping_backend"),
    "optim": ("fused",),
    "train": (
        *("epochs", "steps", "qualify", "chunk_size", "grad_checkpointing", "pack_captions"),
        *("compile", "channels_last", "prefetch", "max_nonfinite_steps"),
    ),
    "checkpoint": ("every_steps", "every_minutes", "keep_last"),
    "logging": ("every_steps", "wandb_project"),
    "deepspeed": ("config",),
    "eval": ("every_steps", "weights", "batch_size", "max_samples", "threshold", "zero_shot", "zero_shot_root"),
}


def starting_point(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from, or None for a new run; makes the run folder and clears away what a crash left in
    it. Collective.

    Args:
        resume: "auto" takes the newest whole checkpoint; "never" starts over where there is none;
            else a checkpoint or a run.
    Raises:
        UserError: ``resume`` is "never" and a whole checkpoint is there, or "auto" and checkpoints were there but none
            is whole, or names a checkpoint that is not usable, or ranks see different folders.
    """
    checkpoints = run_dir / "checkpoints"
    other = find_checkpoint(Path(resume)) if resume not in ("auto", "never") else None
    if other is not None and other.parent.absolute() != checkpoints.absolute() and newest(checkpoints):
        raise UserError(
            f"--resume: {run_dir} has checkpoints of its own, such as {newest(checkpoints)}; give another --run-dir"
        )
    _require_shared(run_dir)
    on_first_rank(lambda: clean_up(checkpoints))
    if other is not None:
        _require_undamaged(other)
        return other
    whole = _newest_undamaged(checkpoints)
    if whole is not None and resume == "never":
        raise UserError(
            f"--run-dir: {run_dir} already holds a run; give another folder, go on with --resume auto, or delete it"
        )
    if whole is None and resume == "auto" and existed(checkpoints):
        raise UserError(
            f"--resume: {run_dir} had checkpoints, and none is whole now (see {checkpoints}). "
            "To start over from step 0 "
            "in this folder give --resume never; to go on from another checkpoint give its path"
        )
    if whole is None and resume == "never":
        on_first_rank(lambda: _begin_again(run_dir))
    return whole


def _newest_undamaged(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; newer ones are put aside."""
    for candidate in complete_checkpoints(checkpoints):
        damaged_names = _damaged(candidate)
        if not damaged_names:
            return candidate
        why = f"{damaged_names[0]} is not what was written (its hash differs)"
        on_first_rank(lambda path=candidate, why=why: [put_aside(path, why)])
    return None


def _begin_again(run_dir: Path) -> list[str]:
    """Keep the numbers of a run that starts over apart from those of the one before."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return []
    number = next(number for number in itertools.count(1) if not (run_dir / f"metrics-{number}.jsonl").exists())
    os.rename(metrics, run_dir / f"metrics-{number}.jsonl")
    return [f"starting over in {run_dir}: the rows so far are in metrics-{number}.jsonl"]


def restore_quarantine(checkpoint: Path, run_dir: Path) -> None:
    """Add what the checkpoint's run had left out to the run folder's quarantine.jsonl, so that its epoch continues with
    the same samples. Collective.
    """

    def add_missing() -> list[str]:
        source, target = checkpoint / QUARANTINE, run_dir / QUARANTINE
        present = set(target.read_text(encoding="utf-8", errors="replace").splitlines()) if target.exists() else set()
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines() if source.exists() else []
        missing = [line for line in lines if line not in present]
        if missing:
            with target.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in missing)
        return []

    on_first_rank(add_missing)


def _require_shared(run_dir: Path) -> None:
    """All ranks must see one folder: a checkpoint is made of every rank's files."""
    token = run_dir / ".ranks-see-this"
    if dist.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        token.touch()
    dist.barrier()
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, token.exists())
    dist.barrier()
    if dist.get_rank() == 0:
        token.unlink(missing_ok=True)
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"--run-dir: {run_dir} is not one folder for all ranks: ranks {blind} do not see what rank 0 writes; "
            "use shared storage"
        )


def _damaged(checkpoint: Path) -> list[str]:
    """Damaged files, the reading shared by the ranks."""
    damaged_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(damaged_by_rank, damaged_files(checkpoint, dist.get_rank(), dist.get_world_size()))
    return [name for names in damaged_by_rank for name in names]


def _require_undamaged(checkpoint: Path) -> None:
    if damaged_names := _damaged(checkpoint):
        raise UserError(
            f"--resume: {checkpoint / damaged_names[0]} is not what was written (its hash differs); "
            "give an earlier checkpoint"
        )


def check_fits(checkpoint: Path, config: Config, data: str, accept_changes: bool = False) -> dict[str, tuple[Any, Any]]:
    """The settings that changed since the checkpoint was written, after making sure that a run can go on with them.

    Args:
        data: fingerprint of the training shards; "" is not compared.
        accept_changes: let settings of the recipe differ.
    Raises:
        UserError: another model, precision, ZeRO stage, global batch, data set or (without ``accept_changes``) recipe;
            it is named with both values.
    """
    manifest = read_manifest(checkpoint)
    changes = differences(read_config(checkpoint / "config.toml"), config)
    for name, (old, new) in changes.items():
        problem = f"{name}: {checkpoint} was written with {old!r}, this run has {new!r}"
        section, field = name.split(".")
        if field in _FIXED.get(section, ()):
            raise UserError(f"{problem}; use its value, or another --run-dir")
        if field not in _FREE.get(section, ()) and not accept_changes:
            raise UserError(
                f"{problem}; use its value, another --run-dir, or --accept-changes if the run is meant to go on "
                "differently"
            )
    if data and manifest["data"] and data != manifest["data"]:
        raise UserError(
            f"data.shards: {checkpoint} was trained on other data ({manifest['data']}) than these ({data}); "
            "give the same shards, or start another "
            "run from its weights (--run-dir, model.pretrained)"
        )
    return changes
