"""The sigmoid loss with many positives an image (docs/math.md section 4): every image-caption pair is a yes-or-no
question of its own.

    features -> all_gather_rows (images travel) -> sigmoid_pairs (one rectangle, logits never stored) -> scalar

N images (n on this rank), K sub-captions per image, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import dispatch
from .checks import as_scale, check_choice, check_pairs, promoted
from .distributed.agreement import agreement_sizes, check_agreement
from .distributed.collectives import (
    Group,
    all_gather_rows,
    all_reduce_sum,
    of_present_images,
    rank_and_size,
)
from .ops.sigmoid_pairs.sigmoid_captions import sigmoid_captions
from .ops.sigmoid_pairs.sigmoid_pairs import sigmoid_pairs
from .options import REDUCTIONS, Reduction, SigmoidBackend
from .targets.options import SameImage, check_targets
from .targets.same_image import gathered_images
from .targets.soft_targets import Slots, smoothing_of_sigmoids


def multi_positive_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_ids: Tensor | None = None,
    same_image: SameImage = "ignore",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    group: Group = None,
    backend: SigmoidBackend = "auto",
) -> Tensor:
    """The sigmoid loss of N images against all N*K sub-captions, an image's own K the positives; docs/math.md eq. 19
    and 23.

    Equals, without storing the logits::

        z = logit_scale * torch.einsum("md,nkd->mnk", image_features.float(), text_features.float()) + logit_bias
        sign = 2 * torch.eye(N)[:, :, None] - 1
        loss = -F.logsigmoid(sign * z).sum() / (N * K)

    With K = 1 it is SigLIP's (Zhai et al., 2023); with K captions the multi-positive sigmoid loss of FLAIR (Xiao et
    al., 2025). Differentiable once in features, scale and bias; what needs no gradient costs none.

    Args:
        image_features: [N, D], normalized by the caller; float32, bfloat16, float16 or float64.
        text_features: [N, K, D], same device; of two dtypes torch's promotion decides.
        logit_scale: the multiplier: pass ``logit_scale.exp()``.
        logit_bias: added to every logit, a float or a tensor of one value; SigLIP starts it at -10,
            for nearly all pairs are negatives.
        image_mask: [N] bool, False for an image that only fills a batch: it is no negative, and its captions are
            missing.
        text_mask: [N, K] bool, True where a sub-caption is present; the mean is over those.
        image_ids: [N] int64, equal where two images of the batch, on any rank, are known to be the same one. By default
            every image is another.
        same_image: what captions of the same image elsewhere in the batch are: "ignore", no question at all;
            "positive", positives. The loss is divided by the number of captions in either case.
        label_smoothing: in [0, 1): labels of 1 and 0 become 1 - label_smoothing / 2 and label_smoothing / 2, smoothed
            towards 1/2 as Keras' BinaryCrossentropy does.
        reduction: "mean"; "sum" over all pairs; or "none" for the [N, K] losses of the captions, each the sum over all
            images, 0 where a caption is missing. Their mean over those present is the loss. Torch code alone has it.
        group: process group; None is the world group where one is initialized. N is then this rank's share,
            equal on every rank; averaging the ranks' losses (and gradients, as DDP and ZeRO do) gives exactly the
            single-process loss.
        backend: "auto" or one that ``explain()`` lists for sigmoid_pairs.

    Returns:
        Scalar or [N, K], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or ranks hold different shapes.
        RuntimeError: the requested backend cannot run here.
    """
    fn = "multi_positive_sigmoid_loss"
    check_pairs(fn, image_features, text_features, image_mask, text_mask, image_ids)
    check_targets(fn, label_smoothing, same_image)
    check_reduction(fn, reduction, backend)
    n, k, d = text_features.shape
    image_features, text_features = promoted(image_features, text_features)
    scale = as_scale(fn, "logit_scale", logit_scale, image_features)
    bias = as_scale(fn, "logit_bias", logit_bias, image_features)
    rank, world = rank_and_size(group)
    mask_NK = of_present_images(image_mask, text_mask, k)
    mask = None if mask_NK is None else mask_NK.reshape(-1)
    if reduction == "none":
        backend = "torch"
    op_backend = dispatch.select("sigmoid_pairs", image_features, backend, M=world * n, C=n * k, D=d)
    sizes = agreement_sizes(text_features, image_mask, text_mask, image_ids, label_smoothing, same_image)
    scale, common_backend = check_agreement(fn, sizes, scale, group, backend=op_backend)
    op_backend = common_backend if backend == "auto" else op_backend
    x_mask = None if image_mask is None else all_gather_rows(image_mask, group)
    images = gathered_images(image_ids, group)
    everyone = all_gather_rows(image_features, group)
    operands = everyone, text_features.flatten(0, 1), scale, bias, x_mask, mask
    options: dict[str, Any] = dict(first=rank * n, k=k, same_image=same_image)
    options["x_images"] = None if images is None else images.world
    if reduction == "none":
        loss = sigmoid_captions(*operands, **options).view(n, k)
    else:
        loss = sigmoid_pairs(*operands, **options, backend=op_backend)
    if label_smoothing > 0:
        slots = Slots(everyone, text_features.transpose(0, 1), x_mask, None if mask_NK is None else mask_NK.T, images)
        smoothing_KN = smoothing_of_sigmoids(
            slots, scale, bias, first=rank * n, label_smoothing=label_smoothing, same_image=same_image
        )
        loss = loss + (smoothing_KN.T if reduction == "none" else smoothing_KN.sum())
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss * world
    if mask is None:
        return loss / max(n * k, 1)
    return loss * world / all_reduce_sum(mask.sum(dtype=torch.int64), group).clamp(min=1)


def check_reduction(fn: str, reduction: str, backend: str) -> None:
    """Raise ValueError unless the reduction exists and the backend has it."""
    check_choice(fn, "reduction", reduction, REDUCTIONS)
    if reduction == "none" and backend not in ("auto", "torch"):
        raise ValueError(
            f"{fn}: reduction='none' is torch code alone, got backend={backend!r}; use backend='auto' or 'torch'"
        )
