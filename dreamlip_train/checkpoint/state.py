"""Checkpoints that are whole or absent: saved in two phases around DeepSpeed's writer, resumed exactly, also on another number of ranks.

All ranks write ``step-NNNNNNNN.partial``; when every one of them has succeeded, rank 0 gives it a manifest and its name (files.py). A crash or a
full disk leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dreamlip_train.checkpoint.files import (
    commit,
    complete_checkpoints,
    describe,
    files_of,
    find_checkpoint,
    read_manifest,
    refuse_foreign_pickles,
    step_folder,
)  # fmt: skip
from dreamlip_train.config.schema import Config, ModelConfig
from dreamlip_train.config.toml import format_config, read_config
from dreamlip_train.data.epoch_plan import Layout
from dreamlip_train.model.dreamlip import DreamLIP, build_model


class SaveError(RuntimeError):
    """A checkpoint that could not be written, on every rank alike; those before it are untouched."""


@dataclass
class Progress:
    """Where a run stands: ``step`` steps done, ``position`` of them in epoch ``epoch`` by the readers in ``layouts``; what was skipped for non-finite
    values; seconds trained."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    layouts: list[Layout] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_samples: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def advance(self, layout: Layout, steps_per_epoch: int) -> None:
        """Count one step that the readers of ``layout`` have read."""
        if not self.layouts or not self.layouts[-1].same_readers(layout):
            self.layouts.append(layout)
        last = self.layouts[-1]
        self.layouts[-1] = Layout(last.ranks, last.workers, last.batch_size, last.steps + 1)
        self.step += 1
        self.position += 1
        if self.position == steps_per_epoch:
            self.epoch, self.position, self.layouts = self.epoch + 1, 0, []


def save(engine: Any, folder: Path, config: Config, progress: Progress, data: str = "") -> Path:
    """Write ``folder``/step-NNNNNNNN on all ranks, then drop all but the newest engine.keep_last. Collective.

    Args:
        data: the loader's fingerprint, which a resume compares.
    Raises:
        SaveError: a rank could not write; every earlier checkpoint is still complete, and nothing else has changed.
    """
    final = step_folder(folder, progress.step)
    partial = final.with_name(final.name + ".partial")
    try:
        _phase_one(engine, partial, progress)
        _phase_two(partial, final, config, progress, data)
    except SaveError as error:
        free = shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        usable = next(iter(complete_checkpoints(folder)), None)
        keep = f"{usable} is complete" if usable else "there is no earlier checkpoint"
        dist.barrier()
        raise SaveError(f"checkpoint {final} could not be written: {error} ({free:.1f} GB free). {keep}") from error
    if dist.get_rank() == 0:
        for old in complete_checkpoints(folder)[config.engine.keep_last :]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def _phase_one(engine: Any, partial: Path, progress: Progress) -> None:
    """DeepSpeed's files, and each rank's random state, under a name that no resume looks at."""
    with _together():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    random_states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(random_states, _random_state())
    client_state = {"progress": asdict(progress), "random": random_states}
    with _together() as errors, _errors_kept(engine, errors):
        engine.save_checkpoint(str(partial.parent), tag=partial.name, client_state=client_state, save_latest=False)


def _phase_two(partial: Path, final: Path, config: Config, progress: Progress, data: str) -> None:
    """Everything to disk and hashed, each rank its share of the files; then the manifest and the name."""
    text = format_config(config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with _together():
        if rank == 0:
            (partial / "config.toml").write_text(text, encoding="utf-8")
    entries: list[Any] = [None] * ranks
    with _together():
        names = files_of(partial)
        mine = describe(partial, names[rank::ranks])
    dist.all_gather_object(entries, mine)
    manifest = {
        "format": 2, "step": progress.step, "world_size": ranks, "batch_size": config.engine.batch_size, "data": data,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(), "files": {k: v for part in entries for k, v in sorted(part.items())},
    }  # fmt: skip
    with _together():
        if rank == 0:
            commit(partial, final, manifest)


@contextlib.contextmanager
def _together() -> Iterator[list[Exception]]:
    """A block that fails on all ranks if it fails on one: errors raised in it, or put into its list, become one SaveError everywhere."""
    errors: list[Exception] = []
    try:
        yield errors
    except (OSError, RuntimeError) as error:
        errors.append(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, f"{type(errors[0]).__name__}: {errors[0]}" if errors else None)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if failed:
        raise SaveError(failed[0])


@contextlib.contextmanager
def _errors_kept(engine: Any, errors: list[Exception]) -> Iterator[None]:
    """DeepSpeed's file writers, their errors kept in ``errors``: a rank that left its save_checkpoint early would leave the others in a barrier."""

    def careful(write: Callable[..., Any]) -> Callable[..., None]:
        def wrapper(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return wrapper

    writer = engine.checkpoint_engine
    writer.save, engine._copy_recovery_script = careful(writer.save), careful(engine._copy_recovery_script)
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script


def load(engine: Any, checkpoint: Path, seed: int = 0) -> Progress:
    """Restore weights, optimizer and random state; return where the run stood. Collective.

    On another number of ranks than the checkpoint's, ``engine`` must have been built with ``resized=True``, and the random states start anew.

    Raises:
        ValueError: a file holds more than a checkpoint's data, or no weights DeepSpeed can read.
    """
    refuse_foreign_pickles(checkpoint)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    resized = read_manifest(checkpoint)["world_size"] != ranks
    source = _universal(checkpoint) if resized and _has_shards(checkpoint) else checkpoint
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    loaded, client_state = engine.load_checkpoint(str(source.parent), tag=source.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise ValueError(f"{checkpoint} holds no weights DeepSpeed can read; give an earlier checkpoint")
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        # The checkpoint's weight decay and betas would silently win over the config's; ZeRO-3's universal loading gives all groups those of the first.
        group.update(own)
    if source is not checkpoint:
        _own_step_counters(engine)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(source, ignore_errors=True)
    if resized:
        torch.manual_seed(seed + rank)
    else:
        _set_random_state(client_state["random"][rank])
    progress = Progress(**client_state["progress"])
    progress.layouts = [Layout(**layout) for layout in progress.layouts]
    return progress


def _has_shards(checkpoint: Path) -> bool:
    """Whether the optimizer state is split over ranks. ZeRO-0 writes it whole, and any number of ranks can read it."""
    return any("optim_states" in name for name in files_of(checkpoint))


def _universal(checkpoint: Path) -> Path:
    """DeepSpeed's rank-independent form of the checkpoint, beside it."""
    folder = checkpoint.with_name(checkpoint.name + ".universal")
    with _together():
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            done = subprocess.run(
                [*command, "--input_folder", str(checkpoint), "--output_folder", str(folder)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(
                    f"{checkpoint} could not be converted for another number of ranks: {done.stderr.strip()[-500:]}"
                )
            (folder.parent / "latest_universal").unlink(missing_ok=True)
    return folder


def _own_step_counters(engine: Any) -> None:
    """ZeRO-3's universal loading gives all parameters one Adam step tensor, which each of them would then advance."""
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def load_for_eval(path: str | Path, model_name: str = "") -> tuple[DreamLIP, Config]:
    """The model in fp32 on the CPU and the config it was trained with, from a run folder, a checkpoint folder or an open_clip weights file.

    Args:
        path: RUN, RUN/checkpoints/step-NNNNNNNN, or a weights file.
        model_name: the open_clip name of the model in a weights file; needed there, and wrong elsewhere.
    Raises:
        ValueError: nothing loadable is there, or ``model_name`` is missing or superfluous.
    """
    path = Path(path)
    if path.is_file():
        if not model_name:
            raise ValueError(f"--model: say which open_clip model {str(path)!r} holds, such as ViT-B-16")
        config = Config(model=ModelConfig(name=model_name, pretrained=str(path), local_logit_scale=False))
        return build_model(config.model, seed=0).eval(), config
    if model_name:
        raise ValueError(f"--model: {str(path)!r} brings its own config; leave --model out")
    if not path.is_dir():
        raise ValueError(
            f"no file or folder {str(path)!r}; give a run folder, a checkpoint folder or an open_clip file"
        )
    checkpoint = find_checkpoint(path)
    refuse_foreign_pickles(checkpoint)
    config = read_config(checkpoint / "config.toml")
    # The weights follow; the file they once started from may be gone.
    config.model.pretrained = ""
    model = build_model(config.model, seed=0)
    model.load_state_dict(
        {name: value.float() for name, value in _state_dict(checkpoint, config.engine.zero_stage).items()}
    )
    return model.eval(), config


def _state_dict(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The model's whole fp32 weights. DeepSpeed's files are pickles: load only checkpoints of your own runs."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = {}
    if (
        zero_stage < 3
    ):  # every rank has the whole module, as the forward pass saw it; parameters that are not trained are nowhere else
        state = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    if zero_stage > 0:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state |= get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return state
