"""Similarities of texts and patches, their statistics, and the weights made of them, as pieces of Triton kernels.

Products take the raw 16-bit values and norms multiply afterwards in float32. Weights and their gradients enter a
product as a high and a low part, since one rounding to 16 bits would cost more than the output's.

K sub-captions (KP: a power of two, at least 16), P patches, D width. A chunk is BLOCK_P patches and BLOCK_D columns.
NORMALIZATION is 0 for "minmax", 1 for "softmax", 2 for "none". Equations are those of docs/math.md section 3.
"""

import triton
import triton.language as tl


@triton.jit
def valid_patches(mask_ptr, n, offs_p, P, HAS_MASK: tl.constexpr):
    """[BLOCK_P] whether there is such a patch and it counts. Others are never read: a NaN among them has no effect."""
    valid = offs_p < P
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + n * P + offs_p, mask=valid, other=0) != 0)
    return valid


@triton.jit
def load_tile(rows_ptr, stride, offs_r, keep_r, offs_d, D):
    """[rows, BLOCK_D], zeros where there is nothing."""
    return tl.load(
        rows_ptr + offs_r[:, None] * stride + offs_d[None, :], mask=keep_r[:, None] & (offs_d < D)[None, :], other=0.0
    )


@triton.jit
def inverse_norm(squares):
    return tl.where(squares == 0, 0.0, 1.0 / tl.sqrt(squares))


@triton.jit
def two_dots(weights, features, acc, PRECISION: tl.constexpr):
    """acc + weights @ features, the float32 weights as a high and a low part where the features have 16 bits."""
    if features.dtype == tl.float32:
        acc = tl.dot(weights, features, acc, input_precision=PRECISION)
    elif features.dtype == tl.bfloat16:
        high = weights.to(tl.bfloat16)
        acc = tl.dot(high, features, acc)
        acc = tl.dot((weights - high.to(tl.float32)).to(tl.bfloat16), features, acc)
    else:
        # float16 cannot hold the low part of a weight over a norm, about 1e-5. TF32 holds every float16 and has
        # float32's exponent. The high part is what the tensor core reads of the weights: their upper 19 bits.
        high = (weights.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        features32 = features.to(tl.float32)
        acc = tl.dot(high, features32, acc, input_precision="tf32")
        acc = tl.dot(weights - high, features32, acc, input_precision="tf32")
    return acc


@triton.jit
def similarities(
    rows_ptr,
    stride_k,
    x_ptr,
    stride_p,
    offs_k,
    offs_p,
    keep_k,
    keep_p,
    D,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows @ x.T [KP, BLOCK_P], and the squared norms of the rows [KP] and of x [BLOCK_P]."""
    dots = tl.zeros((KP, BLOCK_P), tl.float32)
    of_rows = tl.zeros((KP,), tl.float32)
    of_x = tl.zeros((BLOCK_P,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        r = load_tile(rows_ptr, stride_k, offs_k, keep_k, offs_d, D)
        x = load_tile(x_ptr, stride_p, offs_p, keep_p, offs_d, D)
        dots = tl.dot(r, x.T, dots, input_precision=PRECISION)
        of_rows += tl.sum(r.to(tl.float32) * r.to(tl.float32), 1)
        of_x += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    return dots, of_rows, of_x


@triton.jit
def _scores(w, lo, hi, scale, NORMALIZATION: tl.constexpr):
    """(the score before the threshold, the number compared with it) of similarities w [KP, BLOCK_P], eq. 10."""
    if NORMALIZATION == 0:
        u = w - lo[:, None]
        compared = u * scale[:, None]
    elif NORMALIZATION == 1:
        u = tl.exp(w - hi[:, None]) * scale[:, None]
        compared = u
    else:
        u = w
        compared = w
    return u, compared


@triton.jit
def _is_above(u, compared, cut, valid):
    # NaN compares false with everything: a NaN score is above the threshold, so that it shows in the result.
    return ((compared < cut[:, None]) == 0) & ((u < 0) == 0) & valid[None, :]


@triton.jit
def row_statistics(
    s_ptr,
    mask_ptr,
    n,
    K,
    P,
    threshold,
    offs_k,
    NORMALIZATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each row of similarities [KP]: lo, hi, scale, 1 / total, uniform, what a score must reach,
    a patch's uniform weight.
    """
    keep_k = offs_k < K
    lo = tl.full((KP,), float("inf"), tl.float32)
    hi = tl.full((KP,), float("-inf"), tl.float32)
    nans = tl.zeros((KP,), tl.float32)
    count = tl.zeros((KP,), tl.float32)
    rows = s_ptr + (n * K + offs_k)[:, None] * P
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
        lo = tl.minimum(lo, tl.min(tl.where(valid[None, :] & (w == w), w, float("inf")), 1))
        hi = tl.maximum(hi, tl.max(tl.where(valid[None, :] & (w == w), w, float("-inf")), 1))
        nans += tl.sum(tl.where(valid[None, :] & (w != w), 1.0, 0.0), 1)
        count += tl.sum(valid.to(tl.float32), 0)
    lo = tl.where(nans > 0, float("nan"), lo)
    hi = tl.where(nans > 0, float("nan"), hi)
    even = 1.0 / tl.maximum(count, 1.0)
    cut = tl.where(threshold < -1e30, even, threshold)
    uniform = count == 0
    scale = tl.full((KP,), 1.0, tl.float32)
    if NORMALIZATION == 0:
        uniform = uniform | (hi - lo <= 32 * 1.1920928955078125e-07)  # numerics.flat_tolerance: 32 ulp of one
        scale = 1.0 / tl.where(uniform, 1.0, hi - lo)
    if NORMALIZATION == 1:
        mass = tl.zeros((KP,), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
            w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
            mass += tl.sum(tl.where(valid[None, :], tl.exp(w - tl.where(uniform, 0.0, hi)[:, None]), 0.0), 1)
        scale = 1.0 / tl.where(uniform, 1.0, mass)
    total = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
        u, compared = _scores(w, lo, hi, scale, NORMALIZATION)
        total += tl.sum(tl.where(_is_above(u, compared, cut, valid), u, 0.0), 1)
    uniform = uniform | (total <= 0)
    return lo, hi, scale, 1.0 / tl.where(uniform, 1.0, total), uniform, cut, even


@triton.jit
def pooling_weights(w, rows, valid, NORMALIZATION: tl.constexpr):
    """-> weights a [KP, BLOCK_P] (eq. 11), the score u and whether it is above the threshold; ``rows`` is what
    row_statistics gave.
    """
    lo, hi, scale, inv_total, uniform, cut, even = rows
    u, compared = _scores(w, lo, hi, scale, NORMALIZATION)
    above = _is_above(u, compared, cut, valid)
    spread = tl.where(valid[None, :], even[:, None], 0.0)
    return tl.where(uniform[:, None], spread, tl.where(above, u * inv_total[:, None], 0.0)), u, above
