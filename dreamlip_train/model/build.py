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
from open_clip.transformer import VisionTransformer

from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.open_clip_weights import load_open_clip_weights
from dreamlip_train.model.tokenizer import CaptionTokenizer

_VISION_WITHOUT_PATCHES = ("timm_model_name", "attentional_pool")


def build_model(model: ModelConfig, seed: int) -> DreamLIP:
    """The model ``model`` describes, its new weights a function of ``seed`` alone, in fp32 on the CPU.

    Raises:
        UserError: the name is unknown, the image tower has no patch tokens, the text tower is not a causal CLIP one,
            or ``pretrained`` does not fit.
    """
    settings = _tower_settings(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clip = open_clip.CLIP(
                **settings, init_logit_scale=math.log(1 / model.init_temperature), nonscalar_logit_scale=True
            )
        except Exception as error:  # open_clip and torch raise whatever the settings lead them to
            if not model.config:
                raise
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"model.config: {reason}; give open_clip's embed_dim, vision_cfg and text_cfg") from error
    _check_towers(clip, model.name)
    if model.pretrained:
        load_open_clip_weights(clip, model.pretrained)
    return DreamLIP(
        clip,
        CaptionTokenizer(model.context_length),
        local_projection=model.patch_projection == "local",
        local_logit_scale=model.local_logit_scale,
        logit_bias=model.init_logit_bias,
    )


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
    without_patches = [key for key in _VISION_WITHOUT_PATCHES if vision.get(key)] or (
        [] if isinstance(vision.get("layers", 12), int) else ["layers"]
    )
    if without_patches or vision.get("final_ln_after_pool"):
        field = (without_patches or ["final_ln_after_pool"])[0]
        raise UserError(
            f"model.name: the image tower of {model.name!r} gives no patch tokens after its norm "
            f"(vision_cfg.{field}={vision[field]!r}); use a plain ViT"
        )
    if (
        settings.pop("custom_text", False)
        or "multimodal_cfg" in settings
        or text.get("hf_model_name")
        or text.get("hf_tokenizer_name")
    ):
        raise UserError(
            f"model.name: the text tower of {model.name!r} is not CLIP's own causal one; "
            "use a plain CLIP configuration such as ViT-B-16"
        )
    if model.config and text.get("context_length", model.context_length) != model.context_length:
        raise UserError(
            f"model.context_length: got {model.context_length}, but model.config's text_cfg.context_length is "
            f"{text['context_length']}; give one of them"
        )
    text["context_length"] = model.context_length
    return settings


def _check_towers(clip: open_clip.CLIP, name: str) -> None:
    visual, vocabulary = clip.visual, open_clip.SimpleTokenizer().vocab_size
    if not isinstance(visual, VisionTransformer) or visual.proj is None or visual.pool_type not in ("tok", "avg"):
        raise UserError(
            f"model.name: the image tower of {name!r} gives no projected patch tokens; use a ViT whose "
            "vision_cfg.pool_type is 'tok' or 'avg'"
        )
    if visual.image_size[0] != visual.image_size[1]:
        raise UserError(f"model.config: vision_cfg.image_size must be square, got {visual.image_size}")
    if clip.attn_mask is None or clip.text_pool_type != "argmax":
        raise UserError(
            f"model.name: the text tower of {name!r} must be causal and pooled at its end token "
            "(no_causal_mask=False, pool_type='argmax')"
        )
    if clip.vocab_size < vocabulary:
        raise UserError(
            f"model.config: text_cfg.vocab_size is {clip.vocab_size}, CLIP's tokenizer has {vocabulary} tokens; "
            "leave it out"
        )
