"""Torch backend of group_patches: a bounded number of images at a time, the normalized patches never stored, only [N,
K, P].

    similarities -> pooling_weights -> weighted sum of raw patches over their norms; backward the same way back, eq.
    13-15

N images, K sub-captions, P patches, D width. Equations are those of docs/math.md section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...numerics import accumulate_dtype, flat_tolerance, inverse_norm

# Patch values held in float32 at a time.
CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**26}


class PoolingWeights(NamedTuple):
    """Weights of the patches and what their backward needs."""

    a: Tensor  # [n, K, P], rows that sum to one
    above: Tensor  # [n, K, P] bool, whether a valid patch reaches the threshold
    total: Tensor  # [n, K, 1] sum of their scores
    uniform: Tensor  # [n, K, 1] bool, whether nothing told the patches apart


def pooling_weights(
    w: Tensor, threshold: float | None, normalization: str, patch_mask: Tensor | None
) -> PoolingWeights:
    """Weights of the patches from similarities w [n, K, P], eq. 10-11."""
    valid = None if patch_mask is None else patch_mask[:, None, :]
    if valid is None:
        count = torch.full_like(w[:, :1, :1], w.shape[-1])
    else:
        count = valid.sum(-1, keepdim=True).clamp(min=1).to(w.dtype)
    uniform = torch.zeros_like(w[..., :1], dtype=torch.bool)
    score = compared = w
    if normalization == "minmax":
        lo = (w if valid is None else w.masked_fill(~valid, torch.inf)).amin(-1, keepdim=True)
        hi = (w if valid is None else w.masked_fill(~valid, -torch.inf)).amax(-1, keepdim=True)
        uniform = hi - lo <= flat_tolerance(w.dtype)
        score = w - lo  # the range cancels in score / sum(score): hi only decides what is above the threshold
        compared = score / (hi - lo)
    elif normalization == "softmax":
        score = compared = (w if valid is None else w.masked_fill(~valid, torch.finfo(w.dtype).min)).softmax(-1)
    drop = (compared < (1 / count if threshold is None else threshold)) | (score < 0)
    above = ~(drop if valid is None else drop | ~valid)
    score = torch.where(above, score, 0)
    total = score.sum(-1, keepdim=True)
    uniform = uniform | (total <= 0)
    even = 1 / count if valid is None else valid / count
    return PoolingWeights(torch.where(uniform, even, score / torch.where(uniform, 1, total)), above, total, uniform)


def _similarity_gradient(w: Tensor, weights: PoolingWeights, da: Tensor, normalization: str, patch_mask: Tensor | None):
    """The gradient of similarities w [n, K, P] from the weights' own, eq. 13-14."""
    a, above, total, uniform = weights
    centered = da - (a * da).sum(-1, keepdim=True)
    # A large mean is rounded, every patch would get that error, and what is summed over them is near zero:
    # so once more.
    centered = centered - (a * centered).sum(-1, keepdim=True)
    if normalization == "softmax":
        dw = a * centered
    else:
        dw = torch.where(above, centered / torch.where(uniform, 1, total), 0)
    if normalization == "minmax":
        w = w if patch_mask is None else w.masked_fill(~patch_mask[:, None, :], torch.inf)
        lowest = w == w.amin(-1, keepdim=True)
        dw = dw - lowest * (dw.sum(-1, keepdim=True) / lowest.sum(-1, keepdim=True))
    return dw.masked_fill(uniform, 0)


def _chunks(patches: Tensor) -> Iterator[slice]:
    """Slices of images whose patches, in float32, stay within a bounded number of values."""
    n, p, d = patches.shape
    size = max(1, CHUNK_VALUES.get(patches.device.type, CHUNK_VALUES["cpu"]) // max(1, p * d))
    for start in range(0, n, size):
        yield slice(start, start + size)


def _operand(x: Tensor) -> Tensor:
    """``x`` as products take it: 16-bit features as they are where a product of them gives float32, else widened."""
    return x if x.is_cuda and x.element_size() == 2 else x.to(accumulate_dtype(x))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x.float() @ y.float()`` [n, r, c] of two operands."""
    return torch.bmm(x, y, out_dtype=torch.float32) if x.element_size() == 2 else x @ y


def _weighted(weights: Tensor, features: Tensor) -> Tensor:
    """``weights @ features.float()``: weights [n, r, s] float32, features [n, s, D] an operand.

    16-bit features meet the weights' high and low parts. A power of two per image lifts both to where float16 has its
    full precision.
    """
    if features.element_size() != 2:
        return weights @ features
    largest = weights.abs().amax((1, 2), keepdim=True)
    divisor = torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1))) - 12)
    high = (weights / divisor).to(features.dtype)
    low = ((weights / divisor - high) * 2**8).to(features.dtype)
    return (_product(high, features) + _product(low, features).mul_(2**-8)).mul_(divisor)


def without_masked(patches: Tensor, patch_mask: Tensor | None) -> Tensor:
    """Patches with zeros for those that do not count: a NaN among them has no effect."""
    return patches if patch_mask is None else patches.masked_fill(~patch_mask[..., None], 0)


def similarities(patches: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of patches [n, P, D] and texts [n, K, D], both operands -> [n, K, P], eq. 9;
    and inverse patch norms [n, P].
    """
    inv_norm = inverse_norm(patches)
    return _product(texts, patches.mT) * inverse_norm(texts)[..., None] * inv_norm[:, None], inv_norm


def forward(patches, texts, threshold, normalization, patch_mask) -> tuple[Tensor, Tensor, Tensor]:
    """pooled [N, K, D], similarities [N, K, P] and inverse patch norms [N, P]."""
    dtype = accumulate_dtype(patches)
    n, p, _ = patches.shape
    pooled = texts.new_empty(texts.shape)
    similarity = patches.new_empty(n, texts.shape[1], p, dtype=dtype)
    inv_norm = patches.new_empty(n, p, dtype=dtype)
    for i in _chunks(patches):
        mask = None if patch_mask is None else patch_mask[i]
        x = _operand(without_masked(patches[i], mask))
        similarity[i], inv_norm[i] = similarities(x, _operand(texts[i]))
        a = pooling_weights(similarity[i], threshold, normalization, mask).a
        pooled[i] = _weighted(a * inv_norm[i, None, :], x).to(pooled.dtype)
    return pooled, similarity, inv_norm


def backward(
    patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled
) -> tuple[Tensor, Tensor]:
    """The gradients of patches [N, P, D] and texts [N, K, D]."""
    d_patches, d_texts = patches.new_empty(patches.shape), texts.new_empty(texts.shape)
    for i in _chunks(patches):
        mask = None if patch_mask is None else patch_mask[i]
        x, t, dv = _operand(without_masked(patches[i], mask)), _operand(texts[i]), _operand(d_pooled[i])
        w, inv_x, inv_t = similarity[i], inv_norm[i, None, :], inverse_norm(texts[i])[..., None]
        weights = pooling_weights(w, threshold, normalization, mask)
        da = _product(dv, x.mT) * inv_x
        dw = _similarity_gradient(w, weights, da, normalization, mask)
        along = (dw * w).sum(-1, keepdim=True) * inv_t
        d_texts[i] = (_weighted(dw * inv_x, x).addcmul_(t, along, value=-1) * inv_t).to(texts.dtype)
        radial = (weights.a * da + dw * w).sum(1) * inv_norm[i].square()  # [n, P]: the gradient along the patch itself
        d_x = _weighted(torch.cat([weights.a, dw * inv_t], 1).mT, torch.cat([dv, t], 1)).mul_(inv_x.mT)
        d_patches[i] = d_x.addcmul_(x, radial[..., None], value=-1).to(patches.dtype)
    return d_patches, d_texts
