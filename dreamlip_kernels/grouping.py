"""Sub-caption grouping: pool the patches each sub-caption is about, then contrast the groups (docs/math.md section 3).

    patches, texts -> group_patches (similarity, min-max, threshold, weighted mean; local to a rank)
                   -> contrast within the image, or over the batch by bidirectional_logsumexp -> scalar

N images, K sub-captions an image, P patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backends import dispatch
from .checks import accumulate_dtype, as_scale, check_choice, check_features, check_mask, check_shared
from .contrastive import agreement_sizes, global_mean
from .distributed.collectives import Group, all_gather_rows, check_agreement, reduce_scatter_logsumexp
from .ops.logsumexp import bidirectional_logsumexp

NORMALIZATIONS = ("minmax", "softmax", "none")
# Patch values the torch backend widens to float32 at a time.
_CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**26}


def group_patches(
    patch_features: Tensor,
    text_features: Tensor,
    *,
    threshold: float | None = None,
    normalization: str = "minmax",
    patch_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One embedding a sub-caption: the weighted mean of the patches it is about, docs/math.md eq. 9-12.

    Equals, with ``unit(v) = v / |v|``::

        w = torch.einsum("nkd,npd->nkp", unit(text_features), unit(patch_features))
        score = (w - w.amin(-1)) / (w.amax(-1) - w.amin(-1))        # "minmax"; w.softmax(-1) for "softmax"; w for "none"
        score = torch.where(score >= threshold, score.clamp(min=0), 0)
        return score / score.sum(-1) @ unit(patch_features)

    Where nothing tells the patches apart (all similarities equal, or none reaches the threshold) the weights are uniform over the
    valid patches and carry no gradient; an image without a valid patch gives zeros. Zero vectors stay zero and take no gradient.

    Args:
        patch_features: [N, P, D], need not be normalised; float32, bfloat16, float16 or float64, any strides.
        text_features: [N, K, D], same dtype and device.
        threshold: sigma; None means 1 / (number of valid patches of the image).
        normalization: "minmax", "softmax" or "none", see above.
        patch_mask: [N, P] bool, False for padding patches.
        backend: "auto" or one that ``explain()`` lists.

    Returns:
        [N, K, D] in the inputs' dtype, not normalised.

    Raises:
        ValueError: shapes, dtypes, devices or options disagree.  RuntimeError: the requested backend cannot run here.
    """
    fn = "group_patches"
    _check(fn, patch_features, text_features, threshold, normalization, patch_mask)
    (n, p, d), k = patch_features.shape, text_features.shape[1]
    chosen = dispatch.select(fn, patch_features, backend, N=n, P=p, K=k, D=d)
    return _group_patches(patch_features, text_features, threshold, normalization, patch_mask, chosen)[0]


def patch_weights(
    patch_features: Tensor,
    text_features: Tensor,
    *,
    threshold: float | None = None,
    normalization: str = "minmax",
    patch_mask: Tensor | None = None,
) -> Tensor:
    """The weights [N, K, P] with which ``group_patches`` pools: what each sub-caption selects. Arguments and errors as there."""
    _check("patch_weights", patch_features, text_features, threshold, normalization, patch_mask)
    wide = accumulate_dtype(patch_features)
    with torch.autocast(patch_features.device.type, enabled=False):
        return reference.patch_weights(
            patch_features.to(wide),
            text_features.to(wide),
            threshold=threshold,
            normalization=normalization,
            patch_mask=patch_mask,
        )


def subcaption_grouping_loss(
    patch_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    text_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    threshold: float | None = None,
    normalization: str = "minmax",
    contrast: str = "image",
    direction: str = "both",
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Contrast of each sub-caption with its own group of patches, docs/math.md eq. 16-17.

    With ``v = unit(group_patches(...))`` and ``t = unit(text_features)``: cross-entropy of ``logit_scale * v @ t.T`` against the
    diagonal, within each image's own K sub-captions (contrast="image", the paper) or over all N*K ("batch").

    Args:
        patch_features, text_features, patch_mask, threshold, normalization: as in ``group_patches``; but float32 texts may come with bfloat16 or
            float16 patches (what autocast towers give, normalised or not): they are rounded for the pooling, and contrasted as they are.
        logit_scale: the multiplier of this loss, its own or the contrastive one.
        text_mask: [N, K] bool; missing sub-captions are out of numerator and denominator. An image with one contributes 0 within itself.
        direction: "both", or "t2v" for the paper's one: each sub-caption picks its group among the groups.
        group, backend: as in ``multi_positive_contrastive_loss``. Patches never travel; contrast="batch" gathers the pooled [n, K, D].

    Returns:
        Scalar, float32 (float64 for float64 inputs): the mean over the sub-captions present in the world.

    Raises:
        ValueError, RuntimeError: as ``group_patches`` and ``multi_positive_contrastive_loss``.
    """
    fn = "subcaption_grouping_loss"
    mixed = text_features.dtype == torch.float32 and patch_features.dtype in (torch.bfloat16, torch.float16)
    queries = text_features.to(patch_features.dtype) if mixed else text_features
    _check(fn, patch_features, queries, threshold, normalization, patch_mask)
    n, k, d = text_features.shape
    check_mask(fn, "text_mask", text_mask, (n, k), text_features)
    check_choice(fn, "contrast", contrast, ("image", "batch"))
    check_choice(fn, "direction", direction, ("both", "t2v"))
    check_agreement(fn, agreement_sizes(text_features, text_mask), text_features.device, group)
    scale = as_scale(fn, "logit_scale", logit_scale, text_features)
    pooled = group_patches(
        patch_features,
        queries,
        threshold=threshold,
        normalization=normalization,
        patch_mask=patch_mask,
        backend=backend,
    )
    with torch.autocast(text_features.device.type, enabled=False):
        pooled, text = reference.unit(pooled.to(scale.dtype)), reference.unit(text_features.to(scale.dtype))
        pos = scale * (pooled * text).sum(-1)  # [n, K]
        if contrast == "image":
            over_texts, over_groups = _within_image(pooled, text, scale, text_mask)
        else:
            flat = None if text_mask is None else text_mask.reshape(-1)
            groups = all_gather_rows(pooled.reshape(n * k, d), group)
            row, col = bidirectional_logsumexp(
                groups, text.reshape(1, n * k, d), scale,
                y_mask=None if flat is None else flat[None],
                x_mask=None if flat is None else all_gather_rows(flat, group),
            )  # fmt: skip
            over_texts, over_groups = reduce_scatter_logsumexp(row, group).reshape(n, k), col.reshape(n, k)
        pair = over_groups - pos
        if direction == "both":
            pair = (pair + over_texts - pos) / 2
        if text_mask is not None:
            pair = torch.where(text_mask, pair, 0)
        return global_mean(pair, text_mask, group)


def _within_image(pooled: Tensor, text: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over texts and over groups of each image's own [K, K] logits -> two [n, K]; masked entries hold any finite value."""
    z = scale * pooled @ text.mT
    if mask is not None:
        # A masked slot meets only itself: its own row and column stay finite, nobody else's sees it.
        alone = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        z = z.masked_fill(~((mask[:, :, None] & mask[:, None, :]) | alone), -torch.inf)
    return z.logsumexp(2), z.logsumexp(1)


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
            f"{fn}: patch_features and text_features need a width D of at least 1, got shape {tuple(patch_features.shape)}"
        )
    check_mask(fn, "patch_mask", patch_mask, patch_features.shape[:2], patch_features)
    check_choice(fn, "normalization", normalization, NORMALIZATIONS)
    if threshold is not None and not isinstance(threshold, (int, float)):
        raise ValueError(
            f"{fn}: threshold must be a number or None (1 / valid patches), got {type(threshold).__name__}"
        )


# --- registered ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dreamlip_kernels::group_patches", mutates_args=())
def _group_patches(
    patches: Tensor, texts: Tensor, threshold: float | None, normalization: str, patch_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> pooled [N,K,D], and for backward the similarities [N,K,P] and inverse patch norms [N,P]."""
    with torch.autocast(patches.device.type, enabled=False):
        return _FORWARD[backend](patches, texts, threshold, normalization, patch_mask)


@_group_patches.register_fake
def _(patches, texts, threshold, normalization, patch_mask, backend):
    n, p, _ = patches.shape
    wide = accumulate_dtype(patches)
    pooled = texts.new_empty(texts.shape)
    return pooled, patches.new_empty(n, texts.shape[1], p, dtype=wide), patches.new_empty(n, p, dtype=wide)


@torch.library.custom_op("dreamlip_kernels::group_patches_backward", mutates_args=())
def _group_patches_backward(
    patches: Tensor,
    texts: Tensor,
    similarity: Tensor,
    inv_norm: Tensor,
    threshold: float | None,
    normalization: str,
    patch_mask: Tensor | None,
    d_pooled: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(patches.device.type, enabled=False):
        return _BACKWARD[backend](patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled)


@_group_patches_backward.register_fake
def _(patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled, backend):
    return patches.new_empty(patches.shape), texts.new_empty(texts.shape)


def _setup_context(ctx, inputs, output):
    patches, texts, ctx.threshold, ctx.normalization, patch_mask, ctx.backend = inputs
    _, similarity, inv_norm = output
    ctx.save_for_backward(patches, texts, similarity, inv_norm, patch_mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_pooled, d_similarity, d_inv_norm):
    patches, texts, similarity, inv_norm, patch_mask = ctx.saved_tensors
    if d_pooled is None:
        return None, None, None, None, None, None
    d_patches, d_texts = _group_patches_backward(
        patches, texts, similarity, inv_norm, ctx.threshold, ctx.normalization, patch_mask, d_pooled, ctx.backend
    )
    return d_patches, d_texts, None, None, None, None


_group_patches.register_autograd(_backward, setup_context=_setup_context)


# --- torch backend: the normalised patches are never stored, only [N, K, P] --------------------------------------------------


def _chunks(patches: Tensor):
    """Slices of images whose patches, widened, stay within a bounded number of values."""
    n, p, d = patches.shape
    budget = _CHUNK_VALUES.get(patches.device.type, _CHUNK_VALUES["cpu"])
    size = max(1, budget // max(1, p * d))
    for start in range(0, n, size):
        yield slice(start, start + size)


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1)
    return torch.where(norm == 0, 0, 1 / norm)


def _weights(w: Tensor, threshold: float | None, normalization: str, patch_mask: Tensor | None):
    """Similarities w [n,K,P] -> weights a [n,K,P] (eq. 10-11), and for their backward: kept [n,K,P], total [n,K,1], uniform [n,K,1]."""
    valid = None if patch_mask is None else patch_mask[:, None, :]
    count = (
        torch.full_like(w[:, :1, :1], w.shape[-1])
        if valid is None
        else valid.sum(-1, keepdim=True).clamp(min=1).to(w.dtype)
    )
    uniform = torch.zeros_like(w[..., :1], dtype=torch.bool)
    u = relative = w
    if normalization == "minmax":
        lo = (w if valid is None else w.masked_fill(~valid, torch.inf)).amin(-1, keepdim=True)
        hi = (w if valid is None else w.masked_fill(~valid, -torch.inf)).amax(-1, keepdim=True)
        uniform = hi - lo <= reference.flat_tolerance(w.dtype)
        u = w - lo  # the range cancels in u / sum(u): hi only decides what is kept
        relative = u / (hi - lo)
    elif normalization == "softmax":
        u = relative = (w if valid is None else w.masked_fill(~valid, torch.finfo(w.dtype).min)).softmax(-1)
    drop = relative < (1 / count if threshold is None else threshold)
    kept = ~(drop | (u < 0) if valid is None else drop | (u < 0) | ~valid)
    u = torch.where(kept, u, 0)
    total = u.sum(-1, keepdim=True)
    uniform = uniform | (total <= 0)
    even = 1 / count if valid is None else valid / count
    return torch.where(uniform, even, u / torch.where(uniform, 1, total)), kept, total, uniform


def _weights_backward(w, a, kept, total, uniform, da, normalization: str, patch_mask: Tensor | None) -> Tensor:
    """The gradient of the weights' similarities [n,K,P] from the weights' own, eq. 13-14."""
    centred = da - (a * da).sum(-1, keepdim=True)
    if normalization == "softmax":
        dw = a * centred
    else:
        dw = torch.where(kept, centred / torch.where(uniform, 1, total), 0)
    if normalization == "minmax":
        w = w if patch_mask is None else w.masked_fill(~patch_mask[:, None, :], torch.inf)
        lowest = w == w.amin(-1, keepdim=True)
        dw = dw - lowest * (dw.sum(-1, keepdim=True) / lowest.sum(-1, keepdim=True))
    return dw.masked_fill(uniform, 0)


def _forward_torch(patches, texts, threshold, normalization, patch_mask):
    wide = accumulate_dtype(patches)
    n, p, _ = patches.shape
    pooled = texts.new_empty(texts.shape)
    similarity = patches.new_empty(n, texts.shape[1], p, dtype=wide)
    inv_norm = patches.new_empty(n, p, dtype=wide)
    for i in _chunks(patches):
        x, t = patches[i].to(wide), texts[i].to(wide)
        inv_norm[i] = _inverse_norm(x)
        w = (t * _inverse_norm(t)[..., None]) @ x.mT * inv_norm[i, None, :]
        similarity[i] = w
        a, *_ = _weights(w, threshold, normalization, None if patch_mask is None else patch_mask[i])
        pooled[i] = ((a * inv_norm[i, None, :]) @ x).to(pooled.dtype)
    return pooled, similarity, inv_norm


def _backward_torch(patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled):
    wide = accumulate_dtype(patches)
    d_patches, d_texts = patches.new_empty(patches.shape), texts.new_empty(texts.shape)
    for i in _chunks(patches):
        x, t, dv, w, inv_x = (
            patches[i].to(wide),
            texts[i].to(wide),
            d_pooled[i].to(wide),
            similarity[i],
            inv_norm[i, None, :],
        )
        inv_t = _inverse_norm(t)[..., None]
        t_unit = t * inv_t
        mask = None if patch_mask is None else patch_mask[i]
        a, kept, total, uniform = _weights(w, threshold, normalization, mask)
        da = dv @ x.mT * inv_x
        dw = _weights_backward(w, a, kept, total, uniform, da, normalization, mask)
        d_text_unit = (dw * inv_x) @ x
        d_texts[i] = ((d_text_unit - t_unit * (dw * w).sum(-1, keepdim=True)) * inv_t).to(texts.dtype)
        radial = (a * da + dw * w).sum(1)  # [n, P]: the part of the gradient along the patch itself
        d_unit = torch.cat([a, dw], 1).mT @ torch.cat([dv, t_unit], 1)
        inv_x = inv_norm[i, :, None]
        d_patches[i] = d_unit.addcmul_(x, radial[..., None] * inv_x, value=-1).mul_(inv_x).to(patches.dtype)
    return d_patches, d_texts


# --- cpp and cuda backends: csrc/ ------------------------------------------------------------------------------------

_DEFAULT_THRESHOLD = -1e38  # csrc reads anything below -1e30 as 1 / (valid patches)


def _compiled_options(threshold: float | None, normalization: str) -> tuple[float, int]:
    sigma = _DEFAULT_THRESHOLD if threshold is None else max(float(threshold), -1e29)
    return sigma, NORMALIZATIONS.index(normalization)


def _forward_compiled(patches, texts, threshold, normalization, patch_mask):
    return torch.ops.dreamlip_csrc.patch_pool_forward(
        patches, texts, *_compiled_options(threshold, normalization), patch_mask
    )


def _backward_compiled(patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled):
    options = _compiled_options(threshold, normalization)
    return torch.ops.dreamlip_csrc.patch_pool_backward(
        patches, texts, similarity, inv_norm, *options, patch_mask, d_pooled
    )


# --- triton backend: ops/group_patches_triton.py --------------------------------------------------------------------------------------


def _forward_triton(*arguments):
    from .ops import group_patches_triton

    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, which need not be theirs
        return group_patches_triton.forward(*arguments)


def _backward_triton(*arguments):
    from .ops import group_patches_triton

    with torch.cuda.device_of(arguments[0]):
        return group_patches_triton.backward(*arguments)


_FORWARD = {"torch": _forward_torch, "cpp": _forward_compiled, "triton": _forward_triton, "cuda": _forward_compiled}
_BACKWARD = {
    "torch": _backward_torch,
    "cpp": _backward_compiled,
    "triton": _backward_triton,
    "cuda": _backward_compiled,
}
