"""The model that settings describe: open_clip's towers from its table or a config, those that can't be trained here
refused by name.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import open_clip
import torch
from torch import Tensor

from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import TRAIN_ONLY, DreamLIP
from dreamlip_train.model.image_tower import (
    has_class_token_attention,
    has_patches,
    keep_patches_apart,
    size_of,
    why_no_patches,
)
from dreamlip_train.model.open_clip_weights import fit_weights, load_open_clip_weights
from dreamlip_train.model.tokenizer import CaptionTokenizer, HubTokenizer


def build_model(model: ModelConfig, seed: int, weights: dict[str, Tensor] | None = None) -> DreamLIP:
    """The model ``model`` describes, its new weights a function of ``seed`` alone, in fp32 on the CPU.

    Args:
        weights: what ``pretrained`` stands for, by open_clip's names and DreamLIP's for the train-only ones; None reads
            it as an open_clip weights file.
    Raises:
        UserError: the name is unknown, the towers are of a kind that can't be trained here, or ``pretrained`` does not
            fit.
    """
    settings = _tower_settings(model)
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clip = kind(**settings, init_logit_scale=math.log(1 / model.init_temperature), nonscalar_logit_scale=True)
        except Exception as error:  # open_clip and torch raise whatever the settings lead them to
            if not model.config:
                raise
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"model.config: {reason}; give open_clip's embed_dim, vision_cfg and text_cfg") from error
    text = settings["text_cfg"]
    tokenizer = _tokenizer(text, model.context_length)
    _check_towers(clip, model, tokenizer)
    if model.own_value_blocks:
        keep_patches_apart(clip.visual, model.own_value_blocks)
    if weights is not None:
        fit_weights(clip, {k: v for k, v in weights.items() if k not in TRAIN_ONLY}, model.pretrained)
    elif model.pretrained:
        load_open_clip_weights(clip, model.pretrained)
    dreamlip = DreamLIP(
        clip,
        tokenizer,
        local_projection=model.patch_projection == "local",
        local_logit_scale=model.local_logit_scale,
        logit_bias=model.init_logit_bias,
        **_normalization(model),
    )
    own = dict(dreamlip.named_parameters())
    with torch.no_grad():
        values = weights or {}
        for name in TRAIN_ONLY & own.keys() & values.keys():
            own[name].copy_(values[name].reshape(own[name].shape))
    return dreamlip


@functools.cache
def known_models() -> dict[str, dict[str, Any]]:
    """open_clip's table of models, by name; only those with CLIP's own text tower and a ViT."""
    table = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    return {
        name: settings
        for name, settings in table.items()
        if isinstance(settings["vision_cfg"].get("layers"), int)
        and "hf_model_name" not in settings["text_cfg"]
        and "multimodal_cfg" not in settings
    }


def _tower_settings(model: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of open_clip.CLIP, from model.config or open_clip's own table."""
    settings = copy.deepcopy(model.config) or open_clip.get_model_config(model.name)
    if settings is None:
        raise UserError(
            f"model.name: open_clip knows no {model.name!r}; `open_clip.list_models()` lists the names, "
            "or describe the towers in model.config"
        )
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in settings]
    if missing:
        raise UserError(f"model.config: {missing[0]} is missing; give open_clip's embed_dim, vision_cfg and text_cfg")
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError("model.config: vision_cfg and text_cfg must be tables, as in open_clip's model configs")
    if "multimodal_cfg" in settings or text.get("hf_model_name"):
        raise UserError(
            f"model.name: the text tower of {model.name!r} is not open_clip's own (it has a decoder, or is one of "
            "transformers'); use a model whose text_cfg describes a tower of open_clip"
        )
    settings.pop("init_logit_bias", None)  # model.init_logit_bias is ours
    if model.config and text.get("context_length", model.context_length) != model.context_length:
        raise UserError(
            f"model.context_length: got {model.context_length}, but model.config's text_cfg.context_length is "
            f"{text['context_length']}; give one of them"
        )
    text["context_length"] = model.context_length
    if model.patch_dropout:
        vision["patch_dropout"] = model.patch_dropout
    return settings


def _tokenizer(text: dict[str, Any], context_length: int) -> CaptionTokenizer | HubTokenizer:
    if text.get("hf_tokenizer_name"):
        return HubTokenizer(text["hf_tokenizer_name"], context_length, text.get("tokenizer_kwargs") or {})
    return CaptionTokenizer(context_length)


def _normalization(model: ModelConfig) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of the pictures that the published weights of this model take."""
    tags = [] if model.config else open_clip.list_pretrained_tags_by_model(model.name)
    about = open_clip.get_pretrained_cfg(model.name, tags[0]) if tags else {}
    return {name: tuple(about[name]) for name in ("mean", "std") if about.get(name)}


def _check_towers(clip: Any, model: ModelConfig, tokenizer: CaptionTokenizer | HubTokenizer) -> None:
    visual = clip.visual
    if model.patch_projection == "local" and not has_patches(visual):
        raise UserError(
            f"model.patch_projection: the image tower of {model.name!r} gives no patch tokens "
            f'({why_no_patches(visual)}); use "shared"'
        )
    if model.own_value_blocks and not has_class_token_attention(visual):
        raise UserError(
            f"model.own_value_blocks: the image tower of {model.name!r} has no class token of open_clip's own ViT, "
            "from whose embedding the patches could be kept apart; use 0"
        )
    if model.own_value_blocks and model.own_value_blocks > len(visual.transformer.resblocks):
        raise UserError(
            f"model.own_value_blocks: got {model.own_value_blocks}, the image tower of {model.name!r} has "
            f"{len(visual.transformer.resblocks)} blocks"
        )
    height, width = size_of(visual)
    if height != width:
        raise UserError(f"model.config: vision_cfg.image_size must be square, got {(height, width)}")
    if clip.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.config: text_cfg.vocab_size is {clip.vocab_size}, its tokenizer has {tokenizer.vocab_size} tokens; "
            "leave it out"
        )
