"""Sub-caption grouping: pool the patches each sub-caption is about, then contrast the groups (docs/math.md section 3).

    patches, texts -> group_patches (similarity, min-max, threshold, weighted mean; local to a rank)
                   -> contrast within the image, or over the batch by gathered_logsumexp -> scalar

N images, K sub-captions per image, P patches, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import options as choices
from .backends import dispatch
from .checks import as_scale, check_choice, check_features, check_mask, check_shared, promoted
from .distributed.agreement import agreement_sizes, check_agreement
from .distributed.collectives import Group, of_present_images, rank_and_size, reduced
from .distributed.gathered_logsumexp import gathered_logsumexp
from .numerics import accumulate_dtype, unit, without_autocast
from .ops.group_patches.group_patches import group_patches_op
from .ops.group_patches.group_patches_torch import pooling_weights
from .options import Backend, Contrast, ContrastiveBackend, Direction, GroupingBackend, Normalization, Reduction


def group_patches(
    patch_features: Tensor,
    text_features: Tensor,
    *,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
    patch_mask: Tensor | None = None,
    normalize_patches: bool = True,
    backend: GroupingBackend = "auto",
) -> Tensor:
    """One embedding a sub-caption: the weighted mean of the patches it is about, docs/math.md eq. 9-12.

    Equals, with ``unit(v) = v / |v|``::

        w = torch.einsum("nkd,npd->nkp", unit(text_features), unit(patch_features))
        score = (w - w.amin(-1)) / (w.amax(-1) - w.amin(-1))  # "minmax"; "softmax": w.softmax(-1); "none": w
        score = torch.where(score >= threshold, score.clamp(min=0), 0)
        return score / score.sum(-1) @ unit(patch_features)

    Where nothing tells the patches apart (all similarities equal, or none reaches the threshold) the weights are
    uniform over the valid patches and carry no gradient; an image without a valid patch gives zeros. Zero vectors stay
    zero and take no gradient.

    Args:
        patch_features: [N, P, D], need not be normalized; float32, bfloat16, float16 or float64, any strides.
        text_features: [N, K, D], same device; of two dtypes torch's promotion decides.
        threshold: sigma; None means 1 / (number of valid patches of the image).
        normalization: "minmax", "softmax" or "none", see above.
        patch_mask: [N, P] bool, False for padding patches.
        normalize_patches: False pools the patches as they are, ``score / score.sum(-1) @ patch_features``, as
            DreamLIP's eq. 7 prints it; torch code that keeps the [N, P, D] unit patches for backward.
        backend: "auto" or one that ``explain()`` lists.

    Returns:
        [N, K, D] in the inputs' dtype, not normalized.

    Raises:
        ValueError: shapes, dtypes, devices or options disagree.  RuntimeError: the requested backend cannot run here.
    """
    fn = "group_patches"
    _check(fn, patch_features, text_features, threshold, normalization, patch_mask)
    (n, p, d), k = patch_features.shape, text_features.shape[1]
    patch_features, text_features = promoted(patch_features, text_features)
    if not normalize_patches:
        dispatch.select(fn, patch_features, backend, N=n, P=p, K=k, D=d, raw=1)
        return _pooled_as_they_are(patch_features, text_features, threshold, normalization, patch_mask)
    op_backend = dispatch.select(fn, patch_features, backend, N=n, P=p, K=k, D=d)
    return group_patches_op(patch_features, text_features, threshold, normalization, patch_mask, op_backend)[0]


def _pooled_as_they_are(patches, texts, threshold, normalization, patch_mask) -> Tensor:
    dtype = accumulate_dtype(patches)
    patches = patches.to(dtype)  # once, so that a patch's two gradients are rounded together
    if patch_mask is not None:
        patches = patches.masked_fill(~patch_mask[..., None], 0)
    options: dict[str, Any] = dict(threshold=threshold, normalization=normalization, patch_mask=patch_mask)
    weights = patch_weights(patches, texts.to(dtype), **options)
    with without_autocast(patches.device):
        return (weights @ patches).to(texts.dtype)


def patch_weights(
    patch_features: Tensor,
    text_features: Tensor,
    *,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
    patch_mask: Tensor | None = None,
) -> Tensor:
    """The weights [N, K, P] with which ``group_patches`` pools. Arguments and errors as there."""
    _check("patch_weights", patch_features, text_features, threshold, normalization, patch_mask)
    patch_features, text_features = promoted(patch_features, text_features)
    dtype = accumulate_dtype(patch_features)
    if patch_mask is not None:
        patch_features = patch_features.masked_fill(~patch_mask[..., None], 0)
    with without_autocast(patch_features.device):
        similarity = unit(text_features.to(dtype)) @ unit(patch_features.to(dtype)).mT
        return pooling_weights(similarity, threshold, normalization, patch_mask).a


def subcaption_grouping_loss(
    patch_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
    normalize_patches: bool = True,
    contrast: Contrast = "image",
    candidates: int = 4,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    group: Group = None,
    backend: Backend = "auto",
    grouping_backend: GroupingBackend | None = None,
    contrastive_backend: ContrastiveBackend | None = None,
) -> Tensor:
    """Contrast of each sub-caption with its own group of patches, docs/math.md eq. 16-17 and 20.

    With ``v = unit(group_patches(...))`` and ``t = unit(text_features)``: cross-entropy of
    ``logit_scale * v @ t.T`` against the diagonal, within each image's own K sub-captions (contrast="image", the paper)
    or over all N*K ("batch"). With "conditioned" a sub-caption pools the patches of ``candidates`` images and picks the
    one it is of, which no code of the patches that ignores the picture can answer (eq. 20, FLAIR's conditioning).

    Args:
        patch_features, text_features, patch_mask, threshold, normalization, normalize_patches: as in
            ``group_patches``; but texts of another dtype than the patches' are rounded for the pooling, and contrasted
            as they are.
        logit_scale: the multiplier of this loss, its own or the contrastive one.
        image_mask: [N] bool, False for an image that only fills a batch: its captions are missing.
        text_mask: [N, K] bool; missing sub-captions are out of numerator and denominator. An image with one
            contributes 0 within itself.
        candidates: of "conditioned", at least 2: so many consecutive images make a block, within which a sub-caption
            picks its image; the last block of a rank takes what is left. Where it divides a rank's images the loss
            does not depend on the number of ranks.
        direction: "both", or "t2v" for the paper's one: each sub-caption picks its group among the groups.
        reduction: "mean", "sum", or "none" for the [N, K] losses of the sub-captions, 0 where one is missing.
        group: as in ``multi_positive_contrastive_loss``. Patches never travel; contrast="batch" gathers the pooled
            [n, K, D].
        backend: one name for both ops, which applies where an op has it.
        grouping_backend, contrastive_backend: of ``group_patches``, and of ``bidirectional_logsumexp`` with
            contrast="batch"; None takes ``backend``.

    Returns:
        Scalar, the mean over the sub-captions present in the world, or [N, K]; float32 (float64 for float64 inputs).

    Raises:
        ValueError, RuntimeError: as ``group_patches`` and ``multi_positive_contrastive_loss``.
    """
    fn = "subcaption_grouping_loss"
    queries = text_features.to(patch_features.dtype)
    _check(fn, patch_features, queries, threshold, normalization, patch_mask)
    n, k, d = text_features.shape
    check_mask(fn, "image_mask", image_mask, (n,), text_features)
    check_mask(fn, "text_mask", text_mask, (n, k), text_features)
    check_contrast(fn, contrast, direction, candidates, reduction)
    of_pooling = dispatch.requested(fn, "group_patches", grouping_backend, backend)
    of_contrast = dispatch.requested(fn, "bidirectional_logsumexp", contrastive_backend, backend)
    scale = as_scale(fn, "logit_scale", logit_scale, text_features)
    op_backend = "torch"  # of a contrast within the image there is one
    if contrast == "batch":
        pairs = dict(M=n * k * rank_and_size(group)[1], C=n * k, K=1, D=d)
        op_backend = dispatch.select("bidirectional_logsumexp", scale, of_contrast, **pairs)
    sizes = agreement_sizes(text_features, image_mask, text_mask)
    scale, common_backend = check_agreement(fn, sizes, scale, group, backend=op_backend)
    op_backend = common_backend if of_contrast == "auto" else op_backend
    text_mask = of_present_images(image_mask, text_mask, k)
    patch_mask = of_present_images(image_mask, patch_mask, patch_features.shape[1])
    if text_mask is not None:  # whatever a missing sub-caption holds, a NaN too, has no part in anything
        queries, text_features = (t.masked_fill(~text_mask[..., None], 0) for t in (queries, text_features))
    options: dict[str, Any] = dict(threshold=threshold, normalization=normalization, backend=of_pooling)
    options.update(patch_mask=patch_mask, normalize_patches=normalize_patches)
    if contrast == "conditioned":
        pooled = _pooled_for_the_block(patch_features, queries, candidates, options)
    else:
        pooled = group_patches(patch_features, queries, **options)
    with without_autocast(text_features.device):
        pooled, text = unit(pooled.to(scale.dtype)), unit(text_features.to(scale.dtype))
        if contrast == "image":
            over_texts, over_groups, pos = _within_image(pooled, text, scale, text_mask)
        elif contrast == "conditioned":
            over_texts, over_groups, pos = _among_images(pooled, text, scale, image_mask, text_mask, candidates)
        else:
            over_texts, over_groups, pos = _over_the_batch(pooled, text, scale, text_mask, op_backend, group)
        pair = over_groups - pos
        if direction == "both":
            pair = (pair + over_texts - pos) / 2
        pair = pair if text_mask is None else torch.where(text_mask, pair, 0)
        return reduced(pair, text_mask, reduction, group)


def _within_image(pooled: Tensor, text: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp over texts and over groups of each image's own [K, K] logits, and their diagonal: three [n, K],
    any value where masked.
    """
    z = scale * pooled @ text.mT
    if mask is not None:
        # A masked slot meets only itself: its own row and column stay finite, nobody else's sees it.
        alone = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        z = z.masked_fill(~((mask[:, :, None] & mask[:, None, :]) | alone), -torch.inf)
    return z.logsumexp(2), z.logsumexp(1), scale * (pooled * text).sum(-1)


def _pooled_for_the_block(patches: Tensor, queries: Tensor, candidates: int, options: dict[str, Any]) -> Tensor:
    # K sub-captions a call: fused kernels take no K * candidates.
    parts = _of_the_block(queries, candidates).split(queries.shape[1], dim=1)
    return torch.cat([group_patches(patches, part, **options) for part in parts], dim=1)


def _of_the_block(text: Tensor, candidates: int) -> Tensor:
    """[n, candidates * K, D]: for each image the sub-captions of its block; zeros where the last block is short."""
    n, k, d = text.shape
    block = _padded(text, candidates).reshape(-1, candidates * k, d)
    return block.repeat_interleave(candidates, dim=0)[:n]


def _among_images(
    pooled: Tensor, text: Tensor, scale: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp over the sub-captions of a slot and over the images of a block of z [blocks, image, image that the
    sub-caption is of, K], and the logit of each sub-caption in its own image: three [n, K], any value where masked.
    """
    n, k, _ = text.shape
    z = scale * (pooled * _of_the_block(text, candidates)).sum(-1)
    z = _padded(z, candidates).reshape(-1, candidates, candidates, k)
    images = torch.ones(n, dtype=torch.bool, device=z.device) if image_mask is None else image_mask
    texts = images[:, None].expand(n, k) if text_mask is None else text_mask
    images = _padded(images, candidates).reshape(-1, candidates, 1, 1)
    texts = _padded(texts, candidates).reshape(-1, 1, candidates, k)
    # What is masked meets only itself: its own sums stay finite, nobody else's see it.
    alone = torch.eye(candidates, dtype=torch.bool, device=z.device)[:, :, None]
    z = z.masked_fill(~((images & texts) | alone), -torch.inf)
    over_texts, over_images, pos = z.logsumexp(2), z.logsumexp(1), z.diagonal(dim1=1, dim2=2).mT
    return over_texts.flatten(0, 1)[:n], over_images.flatten(0, 1)[:n], pos.flatten(0, 1)[:n]


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """``rows`` and zeros (False) up to a multiple."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _over_the_batch(
    pooled: Tensor, text: Tensor, scale: Tensor, mask: Tensor | None, backend: str, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three over the texts and groups of every image in the world. Every group is an image with one caption;
    the positives come from the op, in which they cancel unrounded.
    """
    n, k, d = text.shape
    flat = None if mask is None else mask.reshape(1, n * k)
    flat_row = None if flat is None else flat[0]
    groups, captions = pooled.flatten(0, 1), text.reshape(1, n * k, d)
    over_texts, over_groups, pos, *_ = gathered_logsumexp(groups, captions, scale, flat_row, flat, backend, group)
    return over_texts.reshape(n, k), over_groups.reshape(n, k), pos.reshape(n, k)


def _check(fn, patch_features, text_features, threshold, normalization, patch_mask) -> None:
    check_features(fn, patch_features=(patch_features, 3), text_features=(text_features, 3))
    check_shared(fn, "N", "patch_features", patch_features.shape[:1], "text_features", text_features.shape[:1])
    for name, features, what in (
        ("patch_features", patch_features, "patch"),
        ("text_features", text_features, "sub-caption"),
    ):
        if features.shape[1] == 0:
            raise ValueError(f"{fn}: {name} needs at least one {what} an image, got shape {tuple(features.shape)}")
    if patch_features.shape[2] == 0:
        raise ValueError(
            f"{fn}: patch_features and text_features need a width D of at least 1, "
            f"got shape {tuple(patch_features.shape)}"
        )
    check_mask(fn, "patch_mask", patch_mask, patch_features.shape[:2], patch_features)
    check_pooling(fn, threshold, normalization)


def check_pooling(fn: str, threshold: float | None, normalization: str) -> None:
    """Raise ValueError unless these options of the pooling exist."""
    check_choice(fn, "normalization", normalization, choices.NORMALIZATIONS)
    if threshold is not None and (not isinstance(threshold, (int, float)) or threshold != threshold):
        raise ValueError(f"{fn}: threshold must be a number or None (1 / valid patches), got {threshold!r}")


def check_contrast(fn: str, contrast: str, direction: str, candidates: int, reduction: str) -> None:
    """Raise ValueError unless these options of the grouping's contrast exist."""
    check_choice(fn, "contrast", contrast, choices.CONTRASTS)
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 2:
        raise ValueError(f"{fn}: candidates must be an integer of at least 2, got {candidates!r}")
    check_choice(fn, "direction", direction, choices.DIRECTIONS)
    check_choice(fn, "reduction", reduction, choices.REDUCTIONS)
