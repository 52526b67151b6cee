"""transformers' SigLIP and SigLIP 2 (fixed resolution) weights under open_clip's names: a timm ViT with an attention
pool, and open_clip's bidirectional text tower. Pure translation; transformers itself is not needed.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError

_NAMES = {
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.post_layernorm": "visual.trunk.norm",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
    "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
    "vision_model.head.mlp": "visual.trunk.attn_pool.mlp",
    "text_model.embeddings.token_embedding": "text.token_embedding",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_BLOCKS = {"vision_model": "visual.trunk.blocks", "text_model": "text.transformer.resblocks"}
_IN_BLOCK = {
    "vision_model": {
        **{"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"},
        **{"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    },
    "text_model": {
        **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"},
        **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    },
}
_BLOCK = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def open_clip_siglip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict of a SiglipModel's.

    Raises:
        UserError: a weight is none of that model's.
    """
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        block = _BLOCK.match(name)
        if name.endswith("position_ids"):
            continue
        if block:
            tower, number, inner, kind = block.groups()
            prefix = f"{_BLOCKS[tower]}.{number}"
            if inner == "self_attn.q_proj":
                parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                key = f"attn.qkv.{kind}" if tower == "vision_model" else f"attn.in_proj_{kind}"
                state[f"{prefix}.{key}"] = torch.cat(parts)
            elif inner in _IN_BLOCK[tower]:
                state[f"{prefix}.{_IN_BLOCK[tower][inner]}.{kind}"] = value
            elif inner not in ("self_attn.k_proj", "self_attn.v_proj"):
                raise _unknown(name)
        elif name.startswith("vision_model.head.attention.in_proj_"):
            kind = name.rpartition("_")[2]
            width = len(value) // 3
            state[f"visual.trunk.attn_pool.q.{kind}"], state[f"visual.trunk.attn_pool.kv.{kind}"] = (
                value[:width],
                value[width:],
            )
        else:
            theirs = next((of for of in _NAMES if name == of or name.startswith(f"{of}.")), None)
            if theirs is None:
                raise _unknown(name)
            state[_NAMES[theirs] + name.removeprefix(theirs)] = value
    if "visual.trunk.pos_embed" in state:
        state["visual.trunk.pos_embed"] = state["visual.trunk.pos_embed"][None]
    return state


def _unknown(name: str) -> UserError:
    return UserError(f"WEIGHTS: {name} is no weight of a SiglipModel; give a SigLIP folder of transformers")
