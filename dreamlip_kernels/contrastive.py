"""Image-text contrast with many captions per image (docs/math.md sections 1 and 2).

    features -> gathered_logsumexp (images travel, one rectangle a rank, logits never stored) -> [K,
    n] arithmetic -> scalar

N images (n on this rank), K sub-captions per image, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import dispatch
from .checks import as_scale, check_choice, check_pairs, promoted
from .distributed.agreement import agreement_sizes, check_agreement
from .distributed.collectives import Group, of_present_images, rank_and_size, reduced
from .distributed.gathered_logsumexp import gathered_logsumexp
from .numerics import logsumexp_of_any
from .options import NEGATIVES, POSITIVES, REDUCTIONS, ContrastiveBackend, Negatives, Positives, Reduction
from .targets.options import SameImage, check_targets
from .targets.same_image import gathered_images
from .targets.soft_targets import Slots, soft_targets


def multi_positive_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_ids: Tensor | None = None,
    same_image: SameImage = "ignore",
    label_smoothing: float = 0.0,
    negatives: Negatives = "slot",
    positives: Positives = "mean",
    reduction: Reduction = "mean",
    group: Group = None,
    backend: ContrastiveBackend = "auto",
) -> Tensor:
    """Contrast of each image with its K sub-captions against every other image's, docs/math.md eq. 5-7, 21 and 22.

    negatives="slot" equals the mean over k of K plain CLIP losses (DreamLIP); "all" puts all N*K captions into one
    softmax::

        row, col = bidirectional_logsumexp(image_features, text_features.transpose(0, 1), logit_scale)   # [K, N] each
        pos = logit_scale * torch.einsum("nd,nkd->kn", image_features, text_features)
        row = row.logsumexp(0) if negatives == "all" else row
        loss = ((row - pos) + (col - pos)).mean() / 2

    positives="logsum" (with negatives="all") sums an image's positives inside the logarithm of the image-to-text term.

    Args:
        image_features: [N, D], normalized by the caller; float32, bfloat16, float16 or float64.
        text_features: [N, K, D], same device; of two dtypes torch's promotion decides.
        logit_scale: the multiplier, 1 / temperature: pass ``logit_scale.exp()``.
        image_mask: [N] bool, False for an image that only fills a batch: it is no negative, and its captions are
            missing.
        text_mask: [N, K] bool, True where a sub-caption is present; missing ones are neither positive nor negative.
        image_ids: [N] int64, equal where two images of the batch, on any rank, are known to be the same one. By default
            every image is another.
        same_image: what captions of the same image elsewhere in the batch are: "ignore", neither positives nor
            negatives (they are left out of both softmaxes; an image's own captions stay); "positive", positives: the
            target of each softmax is uniform over all its positives.
        label_smoothing: in [0, 1), as ``F.cross_entropy`` defines it: each softmax's target is 1 - label_smoothing of
            its own, and label_smoothing uniformly over all that the softmax is over.
        reduction: "mean"; "sum", with positives="logsum" of images' and captions' terms, half each; or "none" for the
            [N, K] pair losses with masked entries 0 (positives="mean" only).
        group: process group; None is the world group where one is initialized. N is then this rank's share,
            equal on every rank; averaging the ranks' losses (and gradients, as DDP and ZeRO do) gives exactly the
            single-process loss.
        backend: as in ``bidirectional_logsumexp``.

    Returns:
        Scalar, or [N, K]; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or options disagree, or ranks hold different shapes.
        RuntimeError: the requested backend cannot run here.
    """
    fn = "multi_positive_contrastive_loss"
    check_pairs(fn, image_features, text_features, image_mask, text_mask, image_ids)
    check_options(fn, negatives, positives, reduction)
    check_targets(fn, label_smoothing, same_image, positives)
    n, k, d = text_features.shape
    image_features, text_features = promoted(image_features, text_features)
    scale = as_scale(fn, "logit_scale", logit_scale, image_features)
    rows = n * rank_and_size(group)[1]
    op_backend = dispatch.select("bidirectional_logsumexp", image_features, backend, M=rows, C=n, K=k, D=d)
    sizes = agreement_sizes(text_features, image_mask, text_mask, image_ids, label_smoothing, same_image)
    scale, common_backend = check_agreement(fn, sizes, scale, group, backend=op_backend)
    op_backend = common_backend if backend == "auto" else op_backend

    text_KND = text_features.transpose(0, 1)
    text_mask = of_present_images(image_mask, text_mask, k)
    mask_KN = None if text_mask is None else text_mask.T.contiguous()  # once, and not in each op that reads it
    images = gathered_images(image_ids, group)
    images_to_ignore = images.world if images is not None and same_image == "ignore" else None
    row, col, pos, everyone, everyone_mask = gathered_logsumexp(
        image_features, text_KND, scale, image_mask, mask_KN, op_backend, group, images_to_ignore
    )  # [K, n] each of the first three
    row_target, col_target = pos, pos
    if negatives == "all":
        row = logsumexp_of_any(row, keepdim=True).expand_as(pos)
    if positives == "logsum":
        of_present = pos if mask_KN is None else pos.masked_fill(~mask_KN, -torch.inf)
        row_target = logsumexp_of_any(of_present, keepdim=True)
    if label_smoothing > 0 or (images is not None and same_image == "positive"):
        slots = Slots(everyone, text_KND, everyone_mask, mask_KN, images)
        how: dict[str, Any] = dict(label_smoothing=label_smoothing, same_image=same_image)
        how.update(over_slots=negatives == "all", group=group)
        row_target, col_target = soft_targets(slots, scale, pos, row_target, **how)
    if positives == "logsum":
        has_caption = None if mask_KN is None else mask_KN.any(0)
        row_term, col_term = _where(has_caption, row[0] - row_target[0]), _where(mask_KN, col - col_target)
        return (reduced(row_term, has_caption, reduction, group) + reduced(col_term, mask_KN, reduction, group)) / 2
    pair = _where(mask_KN, (row - row_target) + (col - col_target)) / 2
    return reduced(pair.T, text_mask, reduction, group)


def check_options(fn: str, negatives: str, positives: str, reduction: Reduction = "mean") -> None:
    """Raise ValueError unless these options of the contrast exist and go together."""
    check_choice(fn, "negatives", negatives, NEGATIVES)
    check_choice(fn, "positives", positives, POSITIVES)
    check_choice(fn, "reduction", reduction, REDUCTIONS)
    if positives == "logsum" and negatives != "all":
        raise ValueError(f"{fn}: positives='logsum' needs negatives='all', got negatives={negatives!r}")
    if positives == "logsum" and reduction == "none":
        raise ValueError(
            f"{fn}: reduction='none' needs positives='mean': the sum inside the log has no loss of a single pair"
        )


def _where(mask: Tensor | None, value: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0)
