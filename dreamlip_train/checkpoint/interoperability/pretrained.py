"""What ``model.pretrained`` stands for: weights from a file, a tag, a folder of open_clip or transformers, or a run."""

from __future__ import annotations

import difflib
from pathlib import Path

import open_clip
import torch.distributed as dist
from torch import Tensor

from dreamlip_train.checkpoint.files import MANIFEST
from dreamlip_train.checkpoint.interoperability.export import model_settings
from dreamlip_train.checkpoint.interoperability.hf_siglip import open_clip_siglip_weights
from dreamlip_train.checkpoint.interoperability.import_weights import (
    differences,
    read_file,
    read_folder,
    read_safetensors,
)
from dreamlip_train.checkpoint.ranks import on_first_rank
from dreamlip_train.checkpoint.weights import read_weights
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.jobs.atomic_json import read_json
from dreamlip_train.jobs.user_error import UserError

# These are fitted: positions are resized.
_FITTED = ("text context_length", "vision image_size")


def pretrained_weights(model: ModelConfig) -> dict[str, Tensor] | None:
    """open_clip's state dict of ``model.pretrained``, with DreamLIP's train-only parameters where a run has them; None
    where it is empty. Collective where ranks are: rank 0 downloads a tag first.

    Raises:
        UserError: nothing of that name is there, or it comes from another model.
    """
    source = model.pretrained
    if not source:
        return None
    path = Path(source)
    if model.config or open_clip.get_model_config(model.name) is not None:
        settings = model_settings(model)
    else:
        return {}  # of no model, which build_model says
    if path.is_dir() and ((path / "checkpoints").is_dir() or (path / MANIFEST).is_file()):
        state, config = read_weights(path)
        _require_same(source, model_settings(config.model), settings, model.name)
        return {name.removeprefix("clip."): value for name, value in state.items()}
    try:
        if path.is_dir() and is_siglip(path):
            return open_clip_siglip_weights(read_safetensors(path / "model.safetensors"))
        if path.is_dir():
            state, theirs = read_folder(path)
            _require_same(source, theirs, settings, model.name)
            return state
        return read_file(path if path.is_file() else _downloaded(model, settings), settings, model.name)
    except UserError as error:
        raise UserError(
            str(error).replace("WEIGHTS:", "model.pretrained:").replace("--model:", "model.name:")
        ) from error


def is_siglip(folder: Path) -> bool:
    """Whether a folder is transformers' SigLIP: its config says no open_clip name, so shapes alone are compared."""
    try:
        content = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") in ("siglip", "siglip2")


def _require_same(source: str, theirs: dict, ours: dict, name: str) -> None:
    if different := differences(theirs, ours, name, ignore=_FITTED):
        raise UserError(
            f"model.pretrained: {source!r} comes from another model: {'; '.join(different[:4])}. Give the model.name "
            "or model.config it was trained with"
        )


def _downloaded(model: ModelConfig, settings: dict) -> Path:
    """The file of an open_clip tag."""
    tags = open_clip.list_pretrained_tags_by_model(model.name) if not model.config else []
    if model.pretrained not in tags:
        close = difflib.get_close_matches(model.pretrained, tags, n=3, cutoff=0.4) or tags[:8]
        hint = f"tags of {model.name} are {', '.join(close)}" if close else f"open_clip has no tag for {model.name}"
        raise UserError(
            f"model.pretrained: no file or folder {model.pretrained!r}, and no such tag: {hint}; give one of them, an "
            "open_clip file, an open_clip or transformers folder, or a run"
        )
    about = open_clip.get_pretrained_cfg(model.name, model.pretrained)
    if bool(about.get("quick_gelu")) != bool(settings.get("quick_gelu")):
        right = f"{model.name}-quickgelu" if about.get("quick_gelu") else model.name.removesuffix("-quickgelu")
        raise UserError(f"model.name: {model.pretrained!r} has other activations than {model.name}; give {right}")

    def download() -> list[str]:
        try:
            open_clip.download_pretrained(about)
        except Exception as error:  # whatever the network, the hub and its client raise
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"model.pretrained: {model.pretrained!r} can't be downloaded: {reason}") from error
        return []

    if dist.is_initialized():
        on_first_rank(download)
    else:
        download()
    return Path(open_clip.download_pretrained(about))
