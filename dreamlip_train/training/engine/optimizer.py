"""What the optimizer gets: groups of parameters, and the learning rate of each step."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from dreamlip_train.config.run_schema import OptimConfig
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import LOGIT_SCALARS, DreamLIP

_EMBEDDINGS = (
    *("conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding"),
    *("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre"),  # timm's names
)
# open_clip's blocks, timm's.
_BLOCK = re.compile(r"(?:transformer\.resblocks|blocks)\.(\d+)\.")
_QUERIES_KEYS_VALUES = ("attn.in_proj_weight", "attn.qkv.weight")


def freeze_towers(model: DreamLIP, optim: OptimConfig) -> None:
    """Take the gradients from a tower that learns at rate 0. Before the engine is built."""
    for name, parameter in model.named_parameters():
        if _scale(name, model, optim) == 0:
            parameter.requires_grad_(False)


def parameter_groups(model: DreamLIP, optim: OptimConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: matrices decay; biases, norms, logit scales and other vectors do not.

    There is one of each for every ``lr_scale``, the group's multiple of the step's rate. With "muon" the matrices of
    the towers' blocks have groups of their own, which say of how many ``matrices`` a weight is made.

    Raises:
        UserError: "muon" has nothing to move.
    """
    groups: dict[tuple[int, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith("bias") or name in LOGIT_SCALARS
            matrices, scale = 0, _scale(name, model, optim)
            if optim.optimizer == "muon" and _is_blocks_matrix(name, parameter):
                matrices = 3 if name.endswith(_QUERIES_KEYS_VALUES) else 1
                scale *= optim.muon_lr_scale
            key = (matrices, scale, 0.0 if plain else optim.weight_decay)
            groups.setdefault(key, []).append(parameter)
    if optim.optimizer == "muon" and not any(matrices for matrices, *_ in groups):
        raise UserError(
            "optim.optimizer: got 'muon'; no tower that learns has blocks as open_clip and timm name them, whose "
            'matrices it would move; use "adamw"'
        )
    return [
        {"params": groups[key], "lr_scale": key[1], "weight_decay": key[2]} | ({"matrices": key[0]} if key[0] else {})
        for key in sorted(groups, key=lambda key: (key[0], -key[2], -key[1]))
    ]


def _is_blocks_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tables of positions and the like are none."""
    return parameter.ndim == 2 and name.endswith("weight") and _BLOCK.search(name) is not None


def _scale(name: str, model: DreamLIP, optim: OptimConfig) -> float:
    """The multiple of the learning rate of one parameter of DreamLIP; what is of no tower has 1."""
    vision, name = name.startswith("clip.visual."), name.removeprefix("clip.visual.").removeprefix("clip.")
    if not vision and (name in LOGIT_SCALARS or name == "local_proj"):
        return 1.0
    name = name.removeprefix("trunk." if vision else "text.")
    block = _BLOCK.match(name)
    blocks = 1 + max((int(match[1]) for match in map(_BLOCK.search, _names(model, vision)) if match), default=-1)
    if block:
        below_the_top = blocks - int(block[1])
    else:
        below_the_top = blocks + 1 if name.split(".")[0] in _EMBEDDINGS else 0
    return (optim.vision_lr_scale if vision else optim.text_lr_scale) * optim.layer_decay**below_the_top


def _names(model: DreamLIP, vision: bool) -> list[str]:
    """The names of the parameters of a tower."""
    return [name for name, _ in model.clip.named_parameters() if name.startswith("visual.") == vision]


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Rate of step ``step`` (the first is 0): linear to ``lr`` over ``warmup_steps`` steps, then ``schedule`` to
    ``final_lr_fraction * lr``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    length = total_steps - optim.warmup_steps
    if optim.schedule in ("constant", "wsd"):
        length = min(optim.cooldown_steps, length)
    progress = min(1.0, max(0.0, 1 - (total_steps - step) / length)) if length > 0 else 0.0
    shape = {
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda: 1 - progress,
        "constant": lambda: 1 - progress,
        "wsd": lambda: 1 - math.sqrt(progress),
    }[optim.schedule]()
    return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * shape)
