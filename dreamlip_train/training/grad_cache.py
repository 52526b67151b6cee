"""Gradient caching: the loss on the whole batch, the towers on a chunk of it at a time (Gao et al., 2021,
with K captions and patches).

    pass 1   every chunk through the towers without a graph -> features of the whole batch -> contrastive loss -> its
             gradient at the features
    pass 2   every chunk again, now with a graph: <features, their gradients> + its part of the grouping loss, backward

Memory is one chunk's activations and the batch's features. The gradient is that of the one-pass step:
the random states of pass 1 are replayed, so that patch dropout drops the same patches.
The contrast within an image needs nobody else's patches; one over the batch would need all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.model.dreamlip import LOGIT_SCALARS
from dreamlip_train.training.step import StepResult, finite_everywhere

_ROWS = ("image_features", "text_features")


def split_batch(batch: dict[str, Any], chunks: int) -> list[dict[str, Any]]:
    """``batch`` in ``chunks`` parts of as many images, the first ones of one more where that does not divide,
    in order.
    """
    parts = {key: batch[key].tensor_split(chunks) for key in ("images", "text", "text_mask")}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def cached_train_step(
    engine: Any, loss_fn: DreamLIPLoss, chunks: list[dict[str, Any]], lr: float, *, patches: bool = True
) -> StepResult:
    """``engine.train_step`` of the batch that ``chunks`` (each as ``move_batch`` gives it) make up, under ZeRO 1 or 2.

    The engine must have been built with gradient_accumulation_steps = len(chunks).
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    states, features = _features(engine, chunks)
    mask = torch.cat([chunk["text_mask"] for chunk in chunks])
    losses, gradients = {}, None
    if loss_fn.mpcl_weight > 0:
        contrastive = loss_fn.mpcl_weight * loss_fn.contrastive(**features, text_mask=mask)
        losses["contrastive_loss"] = contrastive.detach()
        if not finite_everywhere(contrastive):
            return StepResult(losses, False, math.nan, {"logit_scale": features["logit_scale"].detach()})
        gradients = dict(zip(features, torch.autograd.grad(contrastive, list(features.values())), strict=True))
    grouped = patches and loss_fn.grouping_weight > 0
    shares, total, first, scales = _shares(chunks), torch.zeros((), device=mask.device), 0, {}
    for chunk, state, share in zip(chunks, states, shares, strict=True):
        rows = slice(first, first + len(chunk["images"]))
        first = rows.stop
        with _replayed(state):
            out = engine(chunk["images"], chunk["text"], grouped)
        surrogate = out["image_features"].sum() * 0
        if gradients is not None:
            surrogate = sum((out[name] * gradients[name][rows]).sum() for name in _ROWS)
            if rows.start == 0:  # scale and bias are one parameter each, whose gradient counts once
                surrogate = surrogate + sum(out[name] * gradients[name] for name in gradients if name not in _ROWS)
        if grouped:
            scale = out["logit_scale"] if out["logit_scale_local"] is None else out["logit_scale_local"]
            local = loss_fn.grouping(out["patch_features"], out["text_features"], scale, text_mask=chunk["text_mask"])
            local = loss_fn.grouping_weight * share * local
            total = total + local.detach()
            surrogate = surrogate + local
        engine.backward(surrogate, scale_wrt_gas=False)
        engine.step()
        scales = {name: out[name].detach() for name in LOGIT_SCALARS if out[name] is not None}
    if grouped:
        losses["grouping_loss"] = total
    grad_norm = float(engine.get_global_grad_norm())
    return StepResult(losses, engine.was_step_applied() and math.isfinite(grad_norm), grad_norm, scales)


def _features(engine: Any, chunks: list[dict[str, Any]]) -> tuple[list[tuple[Tensor, ...]], dict[str, Tensor]]:
    """Pass 1: each chunk's random state before it, and what the contrastive loss takes, by name, as leaves."""
    states, outs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(engine.device))
            out = engine(chunk["images"], chunk["text"], False)
            outs.append(out)
    leaves = {name: torch.cat([out[name] for out in outs]) for name in _ROWS}
    leaves |= {name: outs[-1][name].clone() for name in ("logit_scale", "logit_bias") if outs[-1][name] is not None}
    return states, {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def _shares(chunks: list[dict[str, Any]]) -> list[Tensor]:
    """The part of the world's sub-captions that each chunk's position holds: what its mean counts in the batch's."""
    counts = torch.stack([chunk["text_mask"].sum() for chunk in chunks]).double()
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return list((counts / counts.sum().clamp(min=1)).float())


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


@contextmanager
def _replayed(state: tuple[Tensor, ...]) -> Iterator[None]:
    """``state`` at the start; the last chunk's replay ends where pass 1 ended."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
    yield
