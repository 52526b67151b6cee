"""``dreamlip-train import``: weights from elsewhere as an open_clip weights file, checked against the model they are
said to be.

open_clip's or DreamLIP's .pt or .safetensors     {"state_dict"} or bare tensors, with or without "module."
OpenAI's .pt                                      TorchScript, read as data; its models have QuickGELU activations
an open_clip folder                               open_clip_config.json + open_clip_model.safetensors
a transformers CLIP folder                        config.json + model.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.checkpoint.interoperability.hf_clip import open_clip_config, open_clip_weights
from dreamlip_train.checkpoint.interoperability.torchscript import is_torchscript, read_torchscript
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.atomic_json import read_json_object
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model, known_models
from dreamlip_train.model.open_clip_weights import open_clip_state_dict
from dreamlip_train.model.tensor_files import refuse_bomb, require_plain, save_tensors

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


def import_weights(source: str | Path, output: str | Path, model_name: str = "") -> str:
    """Write ``output`` (a .pt of {"state_dict"}, fp32 tensors only, open_clip's keys);
    returns what to do with it, as text to read.

    Raises:
        UserError: nothing readable is there, it comes from another model than ``model_name`` (shapes or activation are
            named), or ``output`` exists.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise UserError(f"--output: {str(output)!r} exists; give a new file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: no folder {str(output.absolute().parent)!r}; make it first")
    if source.is_dir():
        state, settings = read_folder(source)
        name = _name_of(settings, model_name, source)
    elif source.is_file():
        if not model_name:
            raise UserError(f"--model: say which open_clip model {str(source)!r} holds, such as ViT-B-16")
        name, state = model_name, read_file(source, _settings(model_name), model_name)
    else:
        raise UserError(f"WEIGHTS: no file or folder {str(source)!r}")
    with atomic_write(output) as partial:
        save_tensors({"state_dict": state}, partial)
        try:
            model = build_model(ModelConfig(name=name, pretrained=str(partial), local_logit_scale=False), seed=0)
        except UserError as error:
            raise UserError(
                str(error).replace("model.pretrained", "WEIGHTS").replace(str(partial), str(source))
            ) from error
        save_tensors({"state_dict": open_clip_state_dict(model)}, partial)
    activation = "QuickGELU" if _settings(name).get("quick_gelu") else "GELU"
    return (
        f"wrote {output}: {name}, {len(state)} tensors, {activation} activations. Train from it: "
        f"--model.name {name} --model.pretrained {output}; "
        f"evaluate it: dreamlip-train eval retrieval {output} --model {name} --val-shards ..."
    )


def read_file(path: Path, settings: dict[str, Any], model_name: str) -> dict[str, Tensor]:
    """open_clip's state dict of a weights file that holds the model of open_clip's ``settings``, in fp32.

    Raises:
        UserError: it holds none, or a TorchScript archive of other activations.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if is_torchscript(path):
        if not settings.get("quick_gelu"):
            raise UserError(
                f"--model: {str(path)!r} is a TorchScript archive, as OpenAI published its weights: "
                f"those have QuickGELU activations and {model_name} "
                f"has GELU; give {model_name}-quickgelu"
            )
        state = read_torchscript(path)
        return {name: value.float() for name, value in state.items() if name not in _OPENAI_EXTRAS}
    try:
        refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
            require_plain(state)
        else:
            state = None
    except Exception as error:  # torch's reader raises whatever the bytes lead it to
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"WEIGHTS: {str(path)!r} can't be read as tensors only: {reason}") from error
    if not state:
        raise UserError(
            f"WEIGHTS: {str(path)!r} holds no weights; "
            'it must be {"state_dict": {name: tensor}} or {name: tensor}'
        )
    return {name.removeprefix("module."): value.float() for name, value in state.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except Exception as error:  # safetensors has its own errors
        raise UserError(f"WEIGHTS: {str(path)!r} can't be read: {error}") from error


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(open_clip's state dict, its model config) of an open_clip or transformers folder.

    Raises:
        UserError: it is neither, or can't be read.
    """
    ours, theirs = folder / "open_clip_config.json", folder / "config.json"
    if ours.is_file():
        settings = read_json_object(ours, "WEIGHTS").get("model_cfg")
        if not isinstance(settings, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= settings.keys():
            raise UserError(f"WEIGHTS: {str(ours)!r} has no model_cfg of embed_dim, vision_cfg and text_cfg")
        return read_safetensors(folder / "open_clip_model.safetensors"), settings
    if theirs.is_file():
        settings = open_clip_config(read_json_object(theirs, "WEIGHTS"))
        with torch.device("meta"):
            expected = build_model(
                ModelConfig(name="imported", config=settings, context_length=settings["text_cfg"]["context_length"]), 0
            )
        return open_clip_weights(read_safetensors(folder / "model.safetensors"), expected.clip.state_dict()), settings
    raise UserError(f"WEIGHTS: {str(folder)!r} has neither open_clip_config.json nor transformers' config.json")


def _name_of(settings: dict[str, Any], model_name: str, folder: Path) -> str:
    """open_clip's name of the model ``settings`` describe; ``model_name`` must agree with them."""
    description = comparable(settings)
    if model_name:
        differ = differences(settings, _settings(model_name), model_name)
        if differ:
            raise UserError(
                f"--model: {str(folder)!r} is not {model_name}: {'; '.join(differ[:4])}. Leave --model out to have its "
                "name looked up"
            )
        return model_name
    names = [name for name in known_models() if comparable(_settings(name)) == description]
    if not names:
        raise UserError(
            f"WEIGHTS: open_clip has no model built like {str(folder)!r}; describe it in model.config of a TOML file, "
            "its weights file as model.pretrained"
        )
    return min(names, key=len)


def _settings(name: str) -> dict[str, Any]:
    settings = known_models().get(name)
    if settings is None:
        raise UserError(f"--model: open_clip knows no {name!r}; `open_clip.list_models()` lists the names")
    return settings


def differences(there: dict[str, Any], here: dict[str, Any], name: str, ignore: tuple[str, ...] = ()) -> list[str]:
    """In what two of open_clip's model configs differ, as text; ``name`` is that of the second one."""
    theirs, ours = comparable(there), comparable(here)
    return [
        f"{key} {theirs.get(key)!r} (there) and {ours.get(key)!r} ({name})"
        for key in theirs | ours
        if theirs.get(key) != ours.get(key) and key not in ignore
    ]


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two models of this kind the same, defaults filled in."""
    vision = {"head_width": 64, "mlp_ratio": 4.0, "pool_type": "tok", "image_size": 224} | settings["vision_cfg"]
    text = {"context_length": 77, "vocab_size": 49408, "mlp_ratio": 4.0} | settings["text_cfg"]
    flat = {"embed_dim": settings["embed_dim"], "activation": "QuickGELU" if settings.get("quick_gelu") else "GELU"}
    flat |= {f"vision {key}": value for key, value in vision.items()} | {
        f"text {key}": value for key, value in text.items()
    }
    return flat
