"""A checkpoint back into an engine: exactly, or on another number of ranks with DeepSpeed's errors in that repaired."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dreamlip_train.checkpoint.files import (
    files_of,
    read_manifest,
    refuse_foreign_pickles,
)
from dreamlip_train.checkpoint.ranks import all_or_none
from dreamlip_train.checkpoint.state import TrainState, set_random_state
from dreamlip_train.data.epoch_plan import ReaderLayout
from dreamlip_train.jobs.user_error import RunError, UserError


def load(engine: Any, checkpoint: Path, seed: int = 0) -> TrainState:
    """Restore weights, optimizer and random state; return where the run stood. Collective.

    On another number of ranks than the checkpoint's, ``engine`` must have been built with ``resized=True``,
    and the random states start anew.

    Raises:
        UserError: a file holds more than a checkpoint's data, or no weights DeepSpeed can read.
    """
    refuse_foreign_pickles(checkpoint)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    resized = read_manifest(checkpoint)["world_size"] != ranks
    source = _universal(checkpoint) if resized and _has_shards(checkpoint) else checkpoint
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    path, client_state = engine.load_checkpoint(str(source.parent), tag=source.name, load_lr_scheduler_states=False)
    if path is None:
        raise UserError(f"{checkpoint} holds no weights DeepSpeed can read; give an earlier checkpoint")
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        # The checkpoint's weight decay and betas would silently win over the config's;
        # ZeRO-3's universal loading gives all groups those of the first.
        group.update(own)
    if source is not checkpoint:
        _own_step_counters(engine)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(source, ignore_errors=True)
    if resized:
        torch.manual_seed(seed + rank)
    else:
        set_random_state(client_state["random"][rank])
    progress = client_state["progress"]
    return TrainState(**progress | {"layouts": [ReaderLayout(**layout) for layout in progress["layouts"]]})


def _has_shards(checkpoint: Path) -> bool:
    """Whether the optimizer state is split over ranks. ZeRO-0 writes it whole, and any number of ranks can read it."""
    return any("optim_states" in name for name in files_of(checkpoint))


def _universal(checkpoint: Path) -> Path:
    """DeepSpeed's rank-independent form of the checkpoint, beside it."""
    folder = checkpoint.with_name(checkpoint.name + ".universal")
    with all_or_none():
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            done = subprocess.run(
                [*command, "--input_folder", str(checkpoint), "--output_folder", str(folder)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RunError(
                    f"{checkpoint} could not be converted for another number of ranks: {done.stderr.strip()[-500:]}"
                )
            (folder.parent / "latest_universal").unlink(missing_ok=True)
    return folder


def _own_step_counters(engine: Any) -> None:
    """ZeRO-3's universal loading gives all parameters one Adam step tensor, which each of them would then advance."""
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
