"""``dreamlip-train export``: a trained model as the tools people use load it, each file loaded back by its consumer and
compared before it counts.

open_clip-file  x.pt: {"state_dict"}, tensors only open_clip.create_model("ViT-B-16", pretrained="x.pt"), SAN,
                clip_benchmark, DreamLIP's own evaluation
open_clip-dir   open_clip_config.json + safetensors       open_clip.create_model("local-dir:DIR")
hf-dir          transformers' CLIPModel, with tokenizer CLIPModel / CLIPVisionModel.from_pretrained(DIR),
                LLaVA's vision tower
hub             both folders in one, with a model card    a repository on the Hugging Face Hub
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch

from dreamlip_train.checkpoint.interoperability.export_check import PROBE_TEXTS, consumer_features, probe_picture
from dreamlip_train.checkpoint.interoperability.hf_clip import (
    clip_config,
    clip_state_dict,
    processor_config,
    write_tokenizer,
)
from dreamlip_train.checkpoint.interoperability.model_card import model_card
from dreamlip_train.checkpoint.weights import Weights, load_for_eval
from dreamlip_train.config.schema import Config, ModelConfig
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.open_clip_weights import open_clip_state_dict
from dreamlip_train.model.tensor_files import save_safetensors, save_tensors

Format = Literal["open_clip-file", "open_clip-dir", "hf-dir", "hub"]
_TOLERANCE = 1e-5
logger = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    to: Format,
    model_name: str = "",
    *,
    weights: Weights = "",
    repository: str = "",
    license: str = "unknown",
) -> dict[str, Any]:
    """Write the towers of a run, checkpoint or open_clip file to ``output`` in format ``to``;
    train-only parameters stay behind.

    Args:
        checkpoint: as ``load_for_eval``; DeepSpeed checkpoints of any ZeRO stage and number of ranks.
        output: a file for open_clip-file, else a new or empty folder.
        model_name: the open_clip name of the model in a weights file.
        weights: as ``load_for_eval``.
        repository, license: OWNER/NAME on the Hub and an identifier of its licenses, for hub's model card.
    Returns:
        {"image", "text": the largest difference between features of this model and of the one loaded back,
        or None where transformers is not installed}.
    Raises:
        UserError: the checkpoint can't be read, ``output`` exists, or the format can't hold this model (the property is
            named).
        RuntimeError: what was written does not give the same features when loaded; nothing is left at ``output``.
    """
    model, config = load_for_eval(checkpoint, model_name, weights)
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(
            f"--output: {str(output)!r} exists; give a new {'file' if to == 'open_clip-file' else 'folder'}"
        )
    settings = model_settings(config.model)
    if to == "open_clip-file":
        _require_the_tables_model(config.model)
    writers: dict[str, Callable[[DreamLIP, dict[str, Any], Path], None]] = {
        "open_clip-file": _write_file,
        "open_clip-dir": _write_open_clip_dir,
        "hf-dir": _write_hf_dir,
        "hub": partial(_write_hub, Path(checkpoint), config, repository or output.name, license),
    }
    partial_output = output.with_name(output.name + ".partial")
    shutil.rmtree(partial_output, ignore_errors=True)
    partial_output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Progress("export: write the weights"):
            writers[to](model, settings, partial_output)
        with Progress("export: load them as their consumer does and compare features"):
            difference = _difference(model, config.model.name, partial_output, to)
        if difference is not None and not max(difference.values()) <= _TOLERANCE:
            raise RuntimeError(
                f"--to {to}: loaded back, features differ by up to {max(difference.values()):.2g}; this is a defect, "
                "please report it with the config.toml"
            )
    except BaseException:
        shutil.rmtree(partial_output, ignore_errors=True)
        partial_output.unlink(missing_ok=True) if partial_output.is_file() else None
        raise
    if output.is_dir():
        output.rmdir()
    os.replace(partial_output, output)
    return {"image": None, "text": None} if difference is None else {**difference}


def _require_the_tables_model(model: ModelConfig) -> None:
    """A weights file does not say what its model is: its consumer builds the model of that name in open_clip's
    table.
    """
    table = open_clip.get_model_config(model.name)
    if table is None:
        raise UserError(
            f"--to: open_clip has no model called {model.name!r}, which a weights file would be loaded as; "
            "use open_clip-dir, which brings its config"
        )
    length = table["text_cfg"].get("context_length", 77)
    if model.context_length != length:
        raise UserError(
            f"--to: this model reads {model.context_length} tokens (model.context_length), and open_clip would load a "
            f"weights file as {model.name} with {length}: other position embeddings, other text features; use "
            "open_clip-dir, which brings its config"
        )


def model_settings(model: ModelConfig) -> dict[str, Any]:
    """open_clip's config of the towers, with the run's context length."""
    settings = copy.deepcopy(model.config) or open_clip.get_model_config(model.name)
    assert settings is not None  # the model was built from them
    settings["text_cfg"]["context_length"] = model.context_length
    settings.pop("init_logit_bias", None)  # the weights have none; it changes no ranking
    return settings


def _write_file(model: DreamLIP, settings: dict[str, Any], path: Path) -> None:
    save_tensors({"state_dict": open_clip_state_dict(model)}, path)


def _write_open_clip_dir(model: DreamLIP, settings: dict[str, Any], path: Path) -> None:
    path.mkdir(exist_ok=True)
    preprocess = {
        "mean": model.image_mean.flatten().tolist(),
        "std": model.image_std.flatten().tolist(),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    write_json(path / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": preprocess})
    save_safetensors(
        {name: value.contiguous() for name, value in open_clip_state_dict(model).items()},
        path / "open_clip_model.safetensors",
    )


def _write_hf_dir(model: DreamLIP, settings: dict[str, Any], path: Path) -> None:
    config, weights = clip_config(settings), clip_state_dict(open_clip_state_dict(model))
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", config)
    write_json(path / "preprocessor_config.json", processor_config(model.image_size))
    write_tokenizer(path, model.context_length)
    save_safetensors(weights, path / "model.safetensors", {"format": "pt"})


def _write_hub(
    checkpoint: Path,
    config: Config,
    repository: str,
    license: str,
    model: DreamLIP,
    settings: dict[str, Any],
    path: Path,
) -> None:
    _write_open_clip_dir(model, settings, path)
    try:
        _write_hf_dir(model, settings, path)
    except UserError as error:  # its pooling
        logger.warning("open_clip's files alone: %s", error)
    run = next((folder for folder in (checkpoint, *checkpoint.parents) if (folder / "checkpoints").is_dir()), None)
    in_transformers = (path / "config.json").is_file()
    (path / "README.md").write_text(model_card(config, run, repository, license, in_transformers), encoding="utf-8")


def _difference(model: DreamLIP, name: str, path: Path, to: Format) -> dict[str, float] | None:
    """How far the features of the written model, as its consumer computes them of a raw picture and raw texts,
    are from this one's.
    """
    if to == "hub":
        forms: list[Format] = ["open_clip-dir", *(["hf-dir"] if (path / "config.json").is_file() else [])]
        differences = [d for part in forms if (d := _difference(model, name, path, part)) is not None]
        return {kind: max(d[kind] for d in differences) for kind in ("image", "text")}
    theirs = consumer_features(path, to, name, model.image_size)
    if theirs is None:
        return None
    pixels = torch.from_numpy(probe_picture(model.image_size)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        ours = model.encode_images(pixels)[0], model.encode_texts(model.tokenize(list(PROBE_TEXTS)))
    return {
        kind: float((a - torch.from_numpy(b)).abs().max())
        for kind, a, b in zip(("image", "text"), ours, theirs, strict=True)
    }
