"""open_clip's CLIP as transformers' CLIPModel: config, weights, tokenizer and image processor. Pure translation; transformers itself is not needed.

What differs between the two: query, key and value are separate; projections are transposed; the activation must be said (transformers' default is QuickGELU);
and transformers pools the class token only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

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
        ValueError: the model has something CLIPModel has not; it is named.
    """
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if vision.get("pool_type", "tok") != "tok":
        raise ValueError(
            f"--to hf-dir: the image tower pools by {vision['pool_type']!r}, transformers' CLIP only by the class token; use open_clip-dir"
        )
    for name, allowed in (("no_ln_pre", False), ("ls_init_value", None), ("final_ln_after_pool", False)):
        if vision.get(name, allowed) != allowed:
            raise ValueError(f"--to hf-dir: transformers' CLIP has no vision_cfg.{name}={vision[name]!r}; use open_clip-dir")
    for name in ("norm_kwargs", "act_kwargs"):
        if vision.get(name) or text.get(name):
            raise ValueError(f"--to hf-dir: transformers' CLIP knows nothing of {name}; use open_clip-dir")
    activation = "quick_gelu" if settings.get("quick_gelu", False) else "gelu"
    width, heads = vision["width"], vision["width"] // vision.get("head_width", 64)
    common = {"hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": settings["embed_dim"], "attention_dropout": 0.0}
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
        ValueError: a weight has no place there.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if block:
            tower = "vision_model" if block[1] else "text_model"
            found |= _block_weights(f"{tower}.encoder.layers.{block[2]}.", block[3], value)
            continue
        stem = next(
            (stem for stem in _NAMES if name == stem or (name.startswith(stem + ".") and stem.split(".")[-1].startswith("ln_"))), None
        )
        if stem is None:
            raise ValueError(f"--to hf-dir: transformers' CLIP has no place for {name!r}; use open_clip-dir")
        found[_NAMES[stem] + name[len(stem) :]] = value.T if name in ("visual.proj", "text_projection") else value
    return {name: value.contiguous() for name, value in found.items()}


def _block_weights(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {f"{prefix}self_attn.{part}_proj.{kind}": chunk for part, chunk in zip("qkv", value.chunk(3), strict=True)}
    stem, _, kind = name.rpartition(".")
    if stem not in _IN_BLOCK:
        raise ValueError(f"--to hf-dir: transformers' CLIP has no place for {name!r} of a block; use open_clip-dir")
    return {f"{prefix}{_IN_BLOCK[stem]}.{kind}": value}


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
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True, "errors": "replace", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
