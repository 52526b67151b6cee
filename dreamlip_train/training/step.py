"""The objective of a run's settings, one optimizer step on it, and what becomes of values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.config.schema import LossConfig
from dreamlip_train.model.dreamlip import LOGIT_SCALARS, crop_to_longest
from dreamlip_train.model.packing import PackedCaptions, pack_captions


@dataclass(frozen=True)
class StepResult:
    """What one step did: ``losses`` by name (fp32 scalars on the device), whether the weights moved, the gradient norm,
    the logit scales and bias.
    """

    losses: dict[str, Tensor]
    applied: bool
    grad_norm: float
    scales: dict[str, Tensor]


def move_batch(batch: dict[str, Any], device: torch.device, pack: bool = True, whole: bool = False) -> dict[str, Any]:
    """``batch`` on ``device``, its captions packed into rows before they travel, or without ``pack`` cropped to the
    longest of them, or ``whole`` for a text tower that sees the padding.
    """
    if not whole:
        batch = {**batch, "text": pack_captions(batch["text"]) if pack else crop_to_longest(batch["text"])}
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, (Tensor, PackedCaptions)) else value
        for key, value in batch.items()
    }


def train_step(
    engine: Any, loss_fn: Callable[..., dict[str, Tensor]], batch: dict[str, Any], lr: float, *, patches: bool = True
) -> StepResult:
    """One optimizer step on a batch of ``move_batch``; a step whose loss or gradients are not finite on any rank leaves
    the weights as they were.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    features = engine(batch["images"], batch["text"], patches)
    losses = loss_fn(**features, text_mask=batch["text_mask"], output_dict=True)
    loss = torch.stack(list(losses.values())).sum()
    scales = {name: features[name].detach() for name in LOGIT_SCALARS if features[name] is not None}
    losses = {name: value.detach() for name, value in losses.items()}
    if not finite_everywhere(loss):
        return StepResult(losses, applied=False, grad_norm=math.nan, scales=scales)
    engine.backward(loss)
    grad_norm = unsharded_grad_norm(engine)
    if grad_norm is not None and not math.isfinite(grad_norm):
        engine.optimizer.zero_grad()
        return StepResult(losses, applied=False, grad_norm=grad_norm, scales=scales)
    engine.step()
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm())
    return StepResult(losses, engine.was_step_applied() and math.isfinite(grad_norm), grad_norm, scales)


def finite_everywhere(loss: Tensor) -> bool:
    """Whether ``loss`` is finite on every rank. All ranks must agree before backward:
    a rank that skips alone hangs the others' reductions.
    """
    broken = (~torch.isfinite(loss.detach())).float()
    if dist.get_world_size() > 1:
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return not bool(broken)


def unsharded_grad_norm(engine: Any) -> float | None:
    """Global gradient norm under ZeRO-0, whose optimizer would apply a NaN; None where DeepSpeed checks for itself."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def dreamlip_loss(loss: LossConfig, group: dist.ProcessGroup | None = None) -> DreamLIPLoss:
    """The objective that ``loss`` describes, over the ranks of ``group`` (None: all)."""
    backends: dict[str, Any] = {  # text that the configuration was checked to name backends
        "backend": loss.backend,
        "contrastive_backend": loss.contrastive_backend,
        "grouping_backend": loss.grouping_backend,
    }
    return DreamLIPLoss(
        group=group,
        mpcl_weight=loss.mpcl_weight,
        grouping_weight=loss.grouping_weight,
        pairs=loss.pairs,
        negatives=loss.negatives,
        positives=loss.positives,
        label_smoothing=loss.label_smoothing,
        threshold=loss.threshold,
        normalization=loss.normalization,
        normalize_patches=loss.normalize_patches,
        contrast=loss.contrast,
        candidates=loss.candidates,
        direction=loss.direction,
        **backends,
    )
