"""Gradient caching: the loss on the whole batch, the towers on a chunk of it at a time (Gao et al., 2021,
with K captions and patches).

    pass 1   every chunk through the towers without a graph -> features of the whole batch -> the losses that need all
             of them -> their gradients at the features
    pass 2   every chunk again, now with a graph: <features, their gradients> + its part of the other loss, backward

Memory is one chunk's activations and the batch's features. The gradient is that of the one-pass step:
the random states of pass 1 are replayed, so that patch dropout drops the same patches.
A contrast within the image needs nobody else's patches: it belongs to pass 2. One over the batch needs the pooled
groups of all, [n, K, D], which are features of pass 1 like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dreamlip_kernels import DreamLIPLoss, group_patches, multi_positive_contrastive_loss
from dreamlip_train.model.dreamlip import LOGIT_SCALARS
from dreamlip_train.training.step import StepResult, finite_everywhere, unsharded_grad_norm

_ROWS = ("image_features", "text_features", "groups")


def split_batch(batch: dict[str, Any], chunks: int) -> list[dict[str, Any]]:
    """``batch`` in ``chunks`` parts of as many images, the first ones of one more where that does not divide,
    in order.
    """
    parts = {key: batch[key].tensor_split(chunks) for key in ("images", "text", "text_mask")}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def cached_train_step(
    engine: Any, loss_fn: DreamLIPLoss, chunks: list[dict[str, Any]], lr: float, *, patches: bool = True
) -> StepResult:
    """``engine.train_step`` of the batch that ``chunks`` (each as ``move_batch`` gives it) make up.

    The engine must have been built with gradient_accumulation_steps = len(chunks).
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    grouped = patches and loss_fn.grouping_weight > 0
    pooled = grouped and loss_fn.grouping.options["contrast"] == "batch"
    states, features = _features(engine, loss_fn, chunks, pooled)
    mask = torch.cat([chunk["text_mask"] for chunk in chunks])
    losses = _losses_of_the_batch(loss_fn, features, mask)
    gradients: dict[str, Tensor] = {}
    if losses:
        total = torch.stack(list(losses.values())).sum()
        losses = {name: value.detach() for name, value in losses.items()}
        if not finite_everywhere(total):
            scales = {"logit_scale": features["logit_scale"].detach()}
            return StepResult(losses, applied=False, grad_norm=math.nan, scales=scales)
        values = torch.autograd.grad(total, list(features.values()), allow_unused=True)
        gradients = {name: value for name, value in zip(features, values, strict=True) if value is not None}
    shares, first, within = _shares(chunks), 0, torch.zeros((), device=mask.device)
    for chunk, state, share in zip(chunks, states, shares, strict=True):
        rows = slice(first, first + len(chunk["images"]))
        first = rows.stop
        with _replayed(state):
            out = engine(chunk["images"], chunk["text"], grouped)
        if pooled:
            out["groups"] = _groups(loss_fn, out)
        surrogate = out["image_features"].sum() * 0
        for name, gradient in gradients.items():
            if name in _ROWS:
                surrogate = surrogate + (out[name] * gradient[rows]).sum()
            elif rows.start == 0:  # scale and bias are one parameter each, whose gradient counts once
                surrogate = surrogate + out[name] * gradient
        if grouped and not pooled:
            local = loss_fn.grouping(
                out["patch_features"], out["text_features"], _local_scale(out), text_mask=chunk["text_mask"]
            )
            local = loss_fn.grouping_weight * share * local
            within = within + local.detach()
            surrogate = surrogate + local
        engine.backward(surrogate, scale_wrt_gas=False)
        if chunk is not chunks[-1]:
            engine.step()
    if grouped and not pooled:
        losses["grouping_loss"] = within
    scales = {name: out[name].detach() for name in LOGIT_SCALARS if out[name] is not None}
    return StepResult(losses, *_last_step(engine), scales)


def _last_step(engine: Any) -> tuple[bool, float]:
    """The step after the last chunk: whether it moved the weights, and the gradient norm. Under ZeRO-0, whose optimizer
    would apply a NaN, one that is not finite is not taken; what counts the micro-batches goes on.
    """
    grad_norm = unsharded_grad_norm(engine)
    if grad_norm is not None and not math.isfinite(grad_norm):
        engine.optimizer.zero_grad()
        engine.micro_steps += 1
        return False, grad_norm
    engine.step()
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm())
    return engine.was_step_applied() and math.isfinite(grad_norm), grad_norm


def _losses_of_the_batch(loss_fn: DreamLIPLoss, features: dict[str, Any], mask: Tensor) -> dict[str, Tensor]:
    """The weighted losses that need the features of the whole batch."""
    losses = {}
    if loss_fn.mpcl_weight > 0:
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        contrastive = loss_fn.contrastive(**{n: features[n] for n in names if n in features}, text_mask=mask)
        losses["contrastive_loss"] = loss_fn.mpcl_weight * contrastive
    if "groups" in features:
        # Every group is an image with one caption (docs/math.md, eq. 17).
        flat = mask.flatten()
        grouping = multi_positive_contrastive_loss(
            F.normalize(features["groups"].flatten(0, 1), dim=-1),
            F.normalize(features["text_features"].flatten(0, 1), dim=-1)[:, None],
            _local_scale(features),
            image_mask=flat,
            text_mask=flat[:, None],
            group=loss_fn.group,
            backend=loss_fn.grouping.options["contrastive_backend"],
        )
        losses["grouping_loss"] = loss_fn.grouping_weight * grouping
    return losses


def _groups(loss_fn: DreamLIPLoss, out: dict[str, Tensor]) -> Tensor:
    """The patches that each sub-caption selects, pooled: [n, K, D]."""
    options = loss_fn.grouping.options
    patches = out["patch_features"]
    return group_patches(
        patches,
        out["text_features"].to(patches.dtype),
        **{name: options[name] for name in ("threshold", "normalization", "normalize_patches")},
        backend=options["grouping_backend"],
    ).float()


def _local_scale(features: dict[str, Any]) -> Tensor:
    own = features.get("logit_scale_local")
    return features["logit_scale"] if own is None else own


def _features(
    engine: Any, loss_fn: DreamLIPLoss, chunks: list[dict[str, Any]], pooled: bool
) -> tuple[list[tuple[Tensor, ...]], dict[str, Tensor]]:
    """Pass 1: each chunk's random state before it, and what the losses of the batch take, by name, as leaves."""
    states, outs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(engine.device))
            out = engine(chunk["images"], chunk["text"], pooled)
            if pooled:
                out["groups"] = _groups(loss_fn, out)
            out.pop("patch_features")
            outs.append(out)
    rows = [name for name in _ROWS if name in outs[0]]
    leaves = {name: torch.cat([out[name] for out in outs]) for name in rows}
    leaves |= {name: outs[-1][name].clone() for name in LOGIT_SCALARS if outs[-1][name] is not None}
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
