"""The oracle: every op and loss of this package in plain torch, for any dtype. The specification;
a definition changes here first.

Nothing here is fast and everything is materialized. It computes in the dtype it is given, so float64 inputs give the
gold values of the tests and 16-bit inputs show what eager code of that dtype loses.

N images, K sub-captions per image, D width, P patches, M rows, C columns. Equation numbers are those of docs/math.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bidirectional_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor | float, *, x_mask: Tensor | None = None, y_mask: Tensor | None = None
):
    """Row and column log-sum-exp of ``z = scale * einsum("md,kcd->kmc", x, y)``, eq. 1-2.

    x [M,D], y [K,C,D], x_mask [M] and y_mask [K,C] bool (False drops the column or row:
    its logits are -inf) -> row [K,M], col [K,C].
    """
    z = scale * torch.einsum("md,kcd->kmc", x, y)
    if y_mask is not None:
        z = z.masked_fill(~y_mask[:, None, :], -torch.inf)
    if x_mask is not None:
        z = z.masked_fill(~x_mask[None, :, None], -torch.inf)
    return _logsumexp(z, 2), _logsumexp(z, 1)


def multi_positive_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_ids: Tensor | None = None,
    same_image: str = "ignore",
    label_smoothing: float = 0.0,
    negatives: str = "slot",
    positives: str = "mean",
    reduction: str = "mean",
) -> Tensor:
    """Multi-positive image-text contrast, eq. 5-7, 21 and 22. images [N,D], texts [N,K,D], text_mask [N,K] bool,
    image_ids [N] -> scalar, or [N,K].
    """
    text_mask = _of_present_images(image_mask, text_mask, text_features)
    image_features = _without_masked(image_features, image_mask)
    text_features = _without_masked(text_features, text_mask)
    n, k, _ = text_features.shape
    valid = torch.ones(n, k, dtype=torch.bool, device=text_features.device) if text_mask is None else text_mask
    z = logit_scale * torch.einsum("id,jkd->ijk", image_features, text_features)
    own, same = _own_and_same_image(z, image_ids)
    candidate = (valid if image_mask is None else valid & image_mask[:, None, None]).expand(n, n, k)
    if same_image == "ignore":
        candidate = candidate & (own | ~same)
    positive = candidate & same
    z = z.masked_fill(~candidate, -torch.inf)
    row, col = _logsumexp(z, 1), _logsumexp(z, 0)  # [N, K]
    of_row = (1, 2) if negatives == "all" else (1,)  # what one softmax of an image is over
    if negatives == "all":
        row = _logsumexp(row, 1)[:, None].expand(n, k)

    pos = logit_scale * torch.einsum("nd,nkd->nk", image_features, text_features)
    row_target, col_target = pos, pos
    if positives == "logsum":
        row_target = _logsumexp(pos.masked_fill(~valid, -torch.inf), 1)[:, None]
    if image_ids is not None and same_image == "positive":
        row_target, col_target = _mean_over(z, positive, of_row), _mean_over(z, positive, 0)
    if label_smoothing:
        row_target = (1 - label_smoothing) * row_target + label_smoothing * _mean_over(z, candidate, of_row)
        col_target = (1 - label_smoothing) * col_target + label_smoothing * _mean_over(z, candidate, 0)
    col_term = torch.where(valid, col - col_target, 0)
    if positives == "logsum":
        has_caption = valid.any(1)
        row_term = torch.where(has_caption, row[:, 0] - row_target[:, 0], 0)
        return _reduced(row_term, has_caption, reduction) / 2 + _reduced(col_term, valid, reduction) / 2
    return _reduced((torch.where(valid, row - row_target, 0) + col_term) / 2, valid, reduction)


def multi_positive_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_ids: Tensor | None = None,
    same_image: str = "ignore",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Every image-caption pair as a question of its own, eq. 19 and 23. images [N,D], texts [N,K,D], text_mask [N,K]
    bool, image_ids [N] -> scalar, or [N,K]: of each caption, the sum over images.
    """
    text_mask = _of_present_images(image_mask, text_mask, text_features)
    image_features = _without_masked(image_features, image_mask)
    text_features = _without_masked(text_features, text_mask)
    n, k, _ = text_features.shape
    valid = torch.ones(n, k, dtype=torch.bool, device=text_features.device) if text_mask is None else text_mask
    z = logit_scale * torch.einsum("md,nkd->mnk", image_features, text_features) + logit_bias
    own, same = _own_and_same_image(z, image_ids)
    candidate = valid if image_mask is None else valid & image_mask[:, None, None]
    if same_image == "ignore":
        candidate = candidate & (own | ~same)
    label = (same if same_image == "positive" else own).to(z.dtype)
    label = (1 - label_smoothing) * label + label_smoothing / 2
    pair = -label * torch.nn.functional.logsigmoid(z) - (1 - label) * torch.nn.functional.logsigmoid(-z)
    return _reduced(torch.where(candidate, pair, 0).sum(0), valid, reduction)


def patch_weights(
    patch_features: Tensor,
    text_features: Tensor,
    *,
    threshold: float | None = None,
    normalization: str = "minmax",
    patch_mask: Tensor | None = None,
) -> Tensor:
    """The weight of each patch in each sub-caption's group, eq. 9-11. patches [N,P,D], texts [N,K,D],
    patch_mask [N,P] bool -> [N,K,P].

    Rows sum to one. Where nothing distinguishes the patches (all similarities equal, or none kept) the weights are
    uniform over the valid patches and carry no gradient; an image without a valid patch has zero weights.
    """
    patch_features = _without_masked(patch_features, patch_mask)
    w = torch.einsum("nkd,npd->nkp", unit(text_features), unit(patch_features))
    valid = torch.ones_like(w[:, :1], dtype=torch.bool) if patch_mask is None else patch_mask[:, None, :]
    count = valid.sum(-1, keepdim=True)
    sigma = 1 / count.clamp(min=1).to(w.dtype) if threshold is None else threshold
    flat = count == 0
    if normalization == "minmax":
        lo = torch.where(flat, 0, w.masked_fill(~valid, torch.inf).amin(-1, keepdim=True))
        hi = torch.where(flat, 0, w.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True))
        flat = hi - lo <= flat_tolerance(w.dtype)
        w = (w - lo) / torch.where(flat, 1, hi - lo)
    elif normalization == "softmax":
        w = w.masked_fill(~valid, torch.finfo(w.dtype).min).softmax(-1)
    drop = (w < sigma) | ~valid  # not (w >= sigma): a NaN similarity must show in the result
    score = torch.where(drop, 0, w.clamp(min=0))
    total = score.sum(-1, keepdim=True)
    flat = flat | (total <= 0)
    uniform = valid.to(w.dtype) / count.clamp(min=1)
    return torch.where(flat, uniform, score / torch.where(flat, 1, total))


def group_patches(
    patch_features: Tensor,
    text_features: Tensor,
    *,
    patch_mask: Tensor | None = None,
    normalize_patches: bool = True,
    **options,
) -> Tensor:
    """``patch_weights(...) @ unit(patch_features)``: one embedding per sub-caption, eq. 12 -> [N,K,D], not normalized.

    Without ``normalize_patches`` the mean is of the patches as they are, as DreamLIP's eq. 7 prints it.
    """
    patch_features = _without_masked(patch_features, patch_mask)
    weights = patch_weights(patch_features, text_features, patch_mask=patch_mask, **options)
    return weights @ (unit(patch_features) if normalize_patches else patch_features)


def subcaption_grouping_loss(
    patch_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    contrast: str = "image",
    candidates: int = 4,
    direction: str = "both",
    reduction: str = "mean",
    patch_mask: Tensor | None = None,
    **options,
) -> Tensor:
    """Contrast of each sub-caption with its own group of patches, eq. 16-17 and 20. Options as patch_weights ->
    scalar, or [N,K].
    """
    text_mask = _of_present_images(image_mask, text_mask, text_features)
    patch_mask = _of_present_images(image_mask, patch_mask, patch_features)
    text_features = _without_masked(text_features, text_mask)
    if contrast == "conditioned":
        options |= dict(direction=direction, reduction=reduction)
        options |= dict(image_mask=image_mask, text_mask=text_mask, patch_mask=patch_mask)
        return _conditioned(patch_features, text_features, logit_scale, candidates, **options)
    group = unit(group_patches(patch_features, text_features, patch_mask=patch_mask, **options))
    text = unit(text_features)
    n, k, d = text.shape
    valid = torch.ones(n, k, dtype=torch.bool, device=text.device) if text_mask is None else text_mask
    if contrast == "image":
        z = logit_scale * torch.einsum("nkd,nld->nkl", group, text)  # [N, K groups, K texts]
        z = z.masked_fill(~(valid[:, :, None] & valid[:, None, :]), -torch.inf)
        over_texts, over_groups = _logsumexp(z, 2), _logsumexp(z, 1)
    else:
        keep = valid.reshape(-1)
        row, col = bidirectional_logsumexp(
            group.reshape(-1, d), text.reshape(1, -1, d), logit_scale, x_mask=keep, y_mask=keep[None]
        )
        over_texts, over_groups = row.reshape(n, k), col.reshape(n, k)
    pos = logit_scale * (group * text).sum(-1)
    t2v = torch.where(valid, over_groups - pos, 0)
    pair = t2v if direction == "t2v" else (t2v + torch.where(valid, over_texts - pos, 0)) / 2
    return _reduced(pair, valid, reduction)


def _reduced(terms: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / valid.sum().clamp(min=1)


def _conditioned(
    patches, texts, scale, candidates, *, direction, reduction, image_mask, text_mask, patch_mask, **options
) -> Tensor:
    # Eq. 20, a caption at a time: it pools the patches of each image of its block and picks its own image.
    n, k, _ = texts.shape
    valid = torch.ones(n, k, dtype=torch.bool, device=texts.device) if text_mask is None else text_mask
    pairs = [[texts.new_zeros(())] * k for _ in range(n)]
    for first in range(0, n, candidates):
        block = [i for i in range(first, min(first + candidates, n)) if image_mask is None or image_mask[i]]
        mask = None if patch_mask is None else patch_mask[block]
        for slot in range(k):
            text_BD = unit(texts[block, slot])
            group = unit(group_patches(patches[block], text_BD.expand(len(block), -1, -1), patch_mask=mask, **options))
            z = scale * (group * text_BD).sum(-1)  # [images, captions]
            for at, i in enumerate(block):
                if valid[i, slot]:
                    t2v = torch.logsumexp(z[:, at], 0) - z[at, at]
                    v2t = torch.logsumexp(z[at, valid[block, slot]], 0) - z[at, at]
                    pairs[i][slot] = t2v if direction == "t2v" else (t2v + v2t) / 2
    pair = torch.stack([value for row in pairs for value in row]).view(n, k) if n else texts.new_zeros(n, k)
    return _reduced(pair, valid, reduction)


def _without_masked(features: Tensor, mask: Tensor | None) -> Tensor:
    # What is not there is zero, whatever it holds: a NaN times a weight of zero would be NaN.
    return features if mask is None else torch.where(mask[..., None], features, 0)


def _of_present_images(image_mask: Tensor | None, mask: Tensor | None, features: Tensor) -> Tensor | None:
    # [N,K] or [N,P]: the captions and patches of an image that is not there are not there either.
    if image_mask is None:
        return mask
    present = image_mask[:, None].expand(features.shape[:2])
    return present if mask is None else present & mask


def _own_and_same_image(z: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    # [N,N,1] each: whether caption j is image i's own, and whether their images are known to be the same one.
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)[:, :, None]
    return own, own if image_ids is None else (image_ids[:, None] == image_ids[None, :])[:, :, None]


def _mean_over(z: Tensor, included: Tensor, dims: tuple[int, ...] | int) -> Tensor:
    # The mean of the included logits, 0 of none; over slots too it is the same for each of them: [N,K].
    included = included.expand(z.shape)
    total = torch.where(included, z, 0).sum(dims, keepdim=True)
    mean = total / included.sum(dims, keepdim=True).clamp(min=1)
    return mean.expand(-1, -1, z.shape[2]).squeeze(0 if dims == 0 else 1)


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` along the last dimension; a zero vector stays zero and takes no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.inf, norm)


def flat_tolerance(dtype: torch.dtype) -> float:
    """Similarities whose range is no larger than this are all equal up to rounding: 32 ulp of one,
    in at least float32.
    """
    return 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _logsumexp(z: Tensor, dim: int) -> Tensor:
    # A row without a single logit has the value -inf and, unlike torch's, a gradient of zero rather than NaN.
    empty = torch.isneginf(z).all(dim, keepdim=True)
    out = torch.logsumexp(torch.where(empty, 0, z), dim)
    return torch.where(empty.squeeze(dim), -torch.inf, out)
