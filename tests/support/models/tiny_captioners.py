"""Current captioners of a few thousand random weights, as folders that transformers loads: each of its own classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_llava import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def save_tiny(name: str, folder: Path) -> Path:
    """A tiny model of the family ``name`` (a key of ``FAMILIES``) with its processor, in ``folder``."""
    torch.manual_seed(1)
    model, processor = FAMILIES[name]()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    # Words alone are said, not "<image>".
    model.generation_config.suppress_tokens = list(range(3 + len(processor.tokenizer) - len(WORDS) - 3))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(special: Sequence[str], named: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Words, after "<pad>", "</s>", "<unk>" and ``special``; ``named`` are attributes that a processor asks for."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named or {},
    )


def _template(image: str) -> str:
    return (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )


def _qwen3_vl() -> tuple[Any, Any]:
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = _tokenizer(special)
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, patch_size=8, merge_size=2
        ),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(list(named.values()), named)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer(["<image>", "<video>"])
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32]]),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_template("<image>"),
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _molmo2() -> tuple[Any, Any]:
    names = "image_start image_end image_patch image_col low_res_image_start frame_start frame_end image_low".split()
    special = "<im_start> <im_end> <im_patch> <im_col> <low_res_im_start> <frame_start> <frame_end> <im_low>".split()
    tokenizer = _tokenizer([*special, "<|image|>", "<|video|>"])
    processor = transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(
            size={"height": 32, "width": 32}, patch_size=8, max_crops=1, overlap_margins=[0, 0], pooling_size=[2, 2]
        ),
        transformers.Molmo2VideoProcessor(size={"height": 32, "width": 32}, patch_size=8),
        tokenizer,
        chat_template=_template("<|image|>"),
    )
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=True))
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = transformers.Molmo2Config(
        text_config={**TEXT, "head_dim": 16, "vocab_size": len(tokenizer), "additional_vocab_size": 8},
        vision_config={
            **vision,
            "num_hidden_layers": 2,
            "image_default_input_size": [32, 32],
            "image_patch_size": 8,
            "image_num_pos": 16,
        },
        adapter_config={**vision, "text_hidden_size": 32, "vit_layers": [-1]},
        image_patch_id=ids["image_patch"],
        **{f"{name}_token_id": ids[name] for name in names if name.endswith(("start", "end"))},
    )
    return transformers.Molmo2ForConditionalGeneration(config), processor


FAMILIES = {"Qwen3-VL": _qwen3_vl, "InternVL": _internvl, "LLaVA-OneVision": _llava_onevision, "Molmo2": _molmo2}
