"""Checkpoints that are whole or absent: saved in two phases around DeepSpeed's writer, found again by their manifests, resumed exactly.

``RUN/checkpoints/step-00001000/`` holds DeepSpeed's files, ``config.toml`` and ``manifest.json`` (step, ranks, every file's size). A folder is written as
``step-....partial`` and renamed when everything is on disk, so a crash or a full disk leaves the checkpoints before it as they were. DeepSpeed's own
``latest`` file appears before the other ranks have written, so resuming goes by the manifests.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dreamlip_train.config import Config, ModelConfig
from dreamlip_train.config_file import differences, format_config, read_config
from dreamlip_train.model import DreamLIP, build_model

# Other values of these need other tensors in the checkpoint, or give the steps so far another meaning.
_FIXED = (
    "model.name", "model.config", "model.context_length", "model.patch_projection", "model.local_logit_scale",
    "engine.zero_stage", "engine.precision", "engine.batch_size",
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands: ``step`` steps done, ``position`` of them in epoch ``epoch``; steps skipped for non-finite values; seconds trained."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_keys: list[str] = field(default_factory=list)
    seconds: float = 0.0


def save(engine: Any, folder: Path, config: Config, progress: Progress) -> Path:
    """Write ``folder``/step-NNNNNNNN on all ranks, then drop all but the newest engine.keep_last. Collective.

    Raises:
        RuntimeError: the files could not be written; every earlier checkpoint is still complete.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = final.with_name(final.name + ".partial")
    try:
        _phase_one(engine, partial, progress)
        if dist.get_rank() == 0:
            _phase_two(partial, final, config, progress)
    except (OSError, RuntimeError) as error:
        usable = newest(folder)
        keep = f"{usable} is complete" if usable else "there is no earlier checkpoint"
        free = shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0
        raise RuntimeError(
            f"checkpoint {final} could not be written: {error} ({free:.1f} GB free). {keep}; make room and start again with --resume auto"
        ) from error
    dist.barrier()
    if dist.get_rank() == 0:
        for old in complete_checkpoints(folder)[config.engine.keep_last :]:
            shutil.rmtree(old)
    return final


def _phase_one(engine: Any, partial: Path, progress: Progress) -> None:
    """DeepSpeed's files, and each rank's random state, under a name that no resume looks at."""
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
    random_states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(random_states, _random_state())
    client_state = {"progress": asdict(progress), "random": random_states}
    engine.save_checkpoint(str(partial.parent), tag=partial.name, client_state=client_state, save_latest=False)


def _phase_two(partial: Path, final: Path, config: Config, progress: Progress) -> None:
    """Everything to disk, the manifest last, then the name that counts."""
    text = format_config(config)
    (partial / "config.toml").write_text(text, encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        "format": 1,
        "step": progress.step,
        "world_size": dist.get_world_size(),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*files, partial / "manifest.json", partial):
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


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, newest first: those whose manifest lists only files that are there in full."""
    return sorted((path for path in folder.glob("step-" + "[0-9]" * 8) if is_complete(path)), reverse=True)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint's manifest is there with its size."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError):
        return False
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files.items())


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    return next(iter(complete_checkpoints(folder)), None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path``, a run folder or a checkpoint folder, stands for.

    Raises:
        ValueError: there is none, or it is incomplete.
    """
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        if not is_complete(path):
            raise ValueError(
                f"{path} is not a complete checkpoint: files of its manifest.json are missing or cut short; give an earlier one"
            )
        return path
    found = newest(path / "checkpoints")
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint; give a run folder, a folder checkpoints/step-NNNNNNNN or an open_clip file")
    return found


def load(engine: Any, checkpoint: Path, config: Config) -> tuple[Progress, dict[str, tuple[Any, Any]]]:
    """Restore weights, optimizer and random state; return where the run stood and the settings that changed since.

    Raises:
        ValueError: the checkpoint is of another model, precision, ZeRO stage, batch size or number of ranks.
    """
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    changed = differences(read_config(checkpoint / "config.toml"), config)
    for name in _FIXED:
        if name in changed:
            old, new = changed[name]
            raise ValueError(f"{name}: {checkpoint} was written with {old!r}, this run has {new!r}; use its value, or another --run-dir")
    ranks = dist.get_world_size()
    if manifest["world_size"] != ranks:
        raise ValueError(f"{checkpoint} was written by {manifest['world_size']} ranks, this run has {ranks}; resume with as many ranks")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise ValueError(f"{checkpoint} holds no weights DeepSpeed can read; give an earlier checkpoint")
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)  # the checkpoint's weight decay and betas would otherwise silently win over the config's
    _set_random_state(client_state["random"][dist.get_rank()])
    return Progress(**client_state["progress"]), changed


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
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
        raise ValueError(f"no file or folder {str(path)!r}; give a run folder, a checkpoint folder or an open_clip file")
    checkpoint = find_checkpoint(path)
    config = read_config(checkpoint / "config.toml")
    # The weights follow; the file they once started from may be gone.
    config.model.pretrained = ""
    model = build_model(config.model, seed=0)
    model.load_state_dict({name: value.float() for name, value in _state_dict(checkpoint, config.engine.zero_stage).items()})
    return model.eval(), config


def _state_dict(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The model's whole fp32 weights. DeepSpeed's files are pickles: load only checkpoints of your own runs."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = {}
    if zero_stage < 3:  # every rank has the whole module, as the forward pass saw it; parameters that are not trained are nowhere else
        state = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    if zero_stage > 0:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state |= get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return state
