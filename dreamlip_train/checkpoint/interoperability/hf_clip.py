"""open_clip's CLIP as transformers' CLIPModel: config, weights, tokenizer and image processor. And back.
Pure translation; transformers itself is not needed.

What differs between the two: query, key and value are separate; projections are transposed;
the activation must be said (transformers' default is QuickGELU); and transformers pools the class token only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError

_START, _END = 49406, 49407

_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def clip_config(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers' CLIPConfig for open_clip's model config.

    Raises:
        UserError: the model has something CLIPModel has not; it is named.
    """
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if settings.get("custom_text") or "timm_model_name" in vision or text.get("no_causal_mask"):
        raise UserError("--to hf-dir: transformers' CLIP has only CLIP's own ViT and text tower; use open_clip-dir")
    if vision.get("pool_type", "tok") != "tok":
        raise UserError(
            f"--to hf-dir: the image tower pools by {vision['pool_type']!r}, transformers' CLIP only by the class "
            "token; use open_clip-dir"
        )
    for name, allowed in (("no_ln_pre", False), ("ls_init_value", None), ("final_ln_after_pool", False)):
        if vision.get(name, allowed) != allowed:
            raise UserError(
                f"--to hf-dir: transformers' CLIP has no vision_cfg.{name}={vision[name]!r}; use open_clip-dir"
            )
    for name in ("norm_kwargs", "act_kwargs"):
        if vision.get(name) or text.get(name):
            raise UserError(f"--to hf-dir: transformers' CLIP knows nothing of {name}; use open_clip-dir")
    activation = "quick_gelu" if settings.get("quick_gelu", False) else "gelu"
    width, heads = vision["width"], vision["width"] // vision.get("head_width", 64)
    common = {
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": settings["embed_dim"],
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": settings["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "vision_config": common
        | {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": heads,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": common
        | {
            "model_type": "clip_text_model",
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": _START,
            "eos_token_id": _END,  # transformers' 2 would take an older path
            "pad_token_id": 0,
        },
        "torch_dtype": "float32",
    }


def clip_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's weights from open_clip.CLIP's.

    Raises:
        UserError: a weight has no place there.
    """
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if block:
            tower = "vision_model" if block[1] else "text_model"
            weights |= _block_weights(f"{tower}.encoder.layers.{block[2]}.", block[3], value)
            continue
        stem = next(
            (
                stem
                for stem in _NAMES
                if name == stem or (name.startswith(stem + ".") and stem.split(".")[-1].startswith("ln_"))
            ),
            None,
        )
        if stem is None:
            raise UserError(f"--to hf-dir: transformers' CLIP has no place for {name!r}; use open_clip-dir")
        weights[_NAMES[stem] + name[len(stem) :]] = value.T if name in ("visual.proj", "text_projection") else value
    return {name: value.contiguous() for name, value in weights.items()}


def _block_weights(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"{prefix}self_attn.{part}_proj.{kind}": chunk for part, chunk in zip("qkv", value.chunk(3), strict=True)
        }
    stem, _, kind = name.rpartition(".")
    if stem not in _IN_BLOCK:
        raise UserError(f"--to hf-dir: transformers' CLIP has no place for {name!r} of a block; use open_clip-dir")
    return {f"{prefix}{_IN_BLOCK[stem]}.{kind}": value}


def open_clip_config(config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's model config for transformers' CLIPConfig, the reverse of ``clip_config``.

    Raises:
        UserError: not a CLIP model, or an activation open_clip's CLIP has not.
    """
    vision, text = config.get("vision_config"), config.get("text_config")
    if config.get("model_type") != "clip" or not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError(
            f"WEIGHTS: config.json is of a {config.get('model_type')!r} model with no two towers; "
            "give a transformers CLIPModel folder"
        )
    # transformers leaves out what equals its own defaults.
    vision = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    } | vision
    text = {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    } | text
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"WEIGHTS: the towers' activations are {sorted(activations)}; open_clip's CLIP has one for both, "
            "gelu or quick_gelu"
        )
    settings: dict[str, Any] = {
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
        },
    }
    for name, tower, cfg in (("mlp_ratio", vision, "vision_cfg"), ("mlp_ratio", text, "text_cfg")):
        ratio = tower.get("intermediate_size", 4 * tower["hidden_size"]) / tower["hidden_size"]
        settings[cfg] |= {name: ratio} if ratio != 4 else {}
    head_width = vision["hidden_size"] // vision["num_attention_heads"]
    settings["vision_cfg"] |= {"head_width": head_width} if head_width != 64 else {}
    return settings | ({"quick_gelu": True} if activations == {"quick_gelu"} else {})


def open_clip_weights(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip.CLIP's weights, of the names in ``expected``, from CLIPModel's.

    Raises:
        UserError: a weight is missing or has no place there.
    """
    weights = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    result, used = {}, set()
    for name, like in expected.items():
        parts = list(clip_state_dict({name: like}))
        missing = [part for part in parts if part not in weights]
        if missing:
            raise UserError(f"WEIGHTS: model.safetensors has no {missing[0]!r}; give a whole CLIPModel folder")
        used |= set(parts)
        value = torch.cat([weights[part] for part in parts]) if len(parts) > 1 else weights[parts[0]]
        result[name] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    unknown = sorted(weights.keys() - used)
    if unknown:
        raise UserError(
            f"WEIGHTS: open_clip's CLIP has no place for {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
        )
    return result


def processor_config(image_size: int) -> dict[str, Any]:
    """CLIPImageProcessor's settings for open_clip's evaluation transform."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(open_clip.OPENAI_DATASET_MEAN),
        "image_std": list(open_clip.OPENAI_DATASET_STD),
    }


def write_tokenizer(folder: Path, context_length: int) -> None:
    """CLIPTokenizer's files: open_clip's byte pair encoding under transformers' names of the two special tokens."""
    tokenizer = open_clip.SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "errors": "replace",
        "split_special_tokens": True,  # "<|endoftext|>" in a caption is text, as to open_clip
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
