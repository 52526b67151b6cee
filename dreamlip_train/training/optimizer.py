"""What AdamW gets: groups of parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dreamlip_train.config.run_schema import OptimConfig
from dreamlip_train.model.dreamlip import LOGIT_SCALARS


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices decay; biases, norms, logit scales and other vectors do not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim < 2 or name.endswith("bias") or name in LOGIT_SCALARS]
    kept = {id(p) for p in plain}
    return [
        {"params": [p for _, p in trained if id(p) not in kept], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Rate of step ``step`` (the first is 0): linear to ``lr`` over ``warmup_steps`` steps, then a cosine to ``final_lr_fraction * lr``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * cosine)
