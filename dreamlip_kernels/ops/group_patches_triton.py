"""Triton backend of group_patches: a program an image, patches read in chunks; the second pass over them hits the L2 cache.

    forward   pass 1: similarities, norms, range of each row -> totals of the kept scores -> pass 2, columns by columns: pooled = weights @ patches
    backward  pass 1: gradients of the weights -> row sums -> their gradients -> pass 2, columns by columns: dx, dt

One image's sub-captions and patches meet nobody else's, so every sum has one owner: no atomics, the same bits each time.
Products take the raw 16-bit values and norms multiply afterwards in float32; weights and their gradients enter the second GEMM as two
16-bit numbers (high and low part), since the tensor cores have time and one 16-bit rounding would cost more than the output's.

N images, K sub-captions (KP: a power of two, at least 16), P patches, D width (BLOCK_D columns at a time), BLOCK_P patches a chunk.
Formulas: docs/math.md eq. 9-15. csrc/patch_pool_math.h has the same of one row in C++.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TEXTS = 32


@triton.jit
def _scores(w, lo, hi, scale, NORMALIZATION: tl.constexpr):
    """(the score before the threshold, the number compared with it) of similarities w [KP, BLOCK_P]."""
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
def _kept(u, compared, cut, valid):
    # NaN compares false with everything: a NaN score is kept, so that it shows in the result.
    return ((compared < cut[:, None]) == 0) & ((u < 0) == 0) & valid[None, :]


@triton.jit
def _valid(mask_ptr, n, offs_p, P, HAS_MASK: tl.constexpr):
    valid = offs_p < P
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + n * P + offs_p, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _two_dots(weights, features, acc, PRECISION: tl.constexpr):
    """acc + weights @ features, the float32 weights as two numbers of the features' type where that is 16 bits."""
    high = weights.to(features.dtype)
    acc = tl.dot(high, features, acc, input_precision=PRECISION)
    if features.dtype.primitive_bitwidth == 16:
        acc = tl.dot((weights - high.to(tl.float32)).to(features.dtype), features, acc)
    return acc


@triton.jit
def _range_and_total(
    s_ptr, mask_ptr, n, K, P, threshold, offs_k,
    NORMALIZATION: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_MASK: tl.constexpr, KP: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of each row of similarities: lo, hi, scale, 1 / total, uniform; and what a score must reach and a patch's uniform weight."""
    keep_k = offs_k < K
    lo = tl.full((KP,), float("inf"), tl.float32)
    hi = tl.full((KP,), float("-inf"), tl.float32)
    nans = tl.zeros((KP,), tl.float32)
    count = tl.zeros((KP,), tl.float32)
    rows = s_ptr + (n * K + offs_k)[:, None] * P
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & (offs_p < P)[None, :], other=0.0)
        lo = tl.minimum(lo, tl.min(tl.where(valid[None, :] & (w == w), w, float("inf")), 1))
        hi = tl.maximum(hi, tl.max(tl.where(valid[None, :] & (w == w), w, float("-inf")), 1))
        nans += tl.sum(tl.where(valid[None, :] & (w != w), 1.0, 0.0), 1)
        count += tl.sum(valid.to(tl.float32), 0)
    lo = tl.where(nans > 0, float("nan"), lo)
    hi = tl.where(nans > 0, float("nan"), hi)
    even = 1.0 / tl.maximum(count, 1.0)
    cut = even
    if HAS_THRESHOLD:
        cut = tl.zeros((KP,), tl.float32) + threshold
    uniform = count == 0
    scale = tl.full((KP,), 1.0, tl.float32)
    if NORMALIZATION == 0:
        uniform = uniform | (hi - lo <= 32 * 1.1920928955078125e-07)  # 32 ulp of one: rounding
        scale = 1.0 / tl.where(uniform, 1.0, hi - lo)
    if NORMALIZATION == 1:
        mass = tl.zeros((KP,), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
            w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & (offs_p < P)[None, :], other=0.0)
            mass += tl.sum(tl.where(valid[None, :], tl.exp(w - tl.where(uniform, 0.0, hi)[:, None]), 0.0), 1)
        scale = 1.0 / tl.where(uniform, 1.0, mass)
    total = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & (offs_p < P)[None, :], other=0.0)
        u, compared = _scores(w, lo, hi, scale, NORMALIZATION)
        total += tl.sum(tl.where(_kept(u, compared, cut, valid), u, 0.0), 1)
    uniform = uniform | (total <= 0)
    return lo, hi, scale, 1.0 / tl.where(uniform, 1.0, total), uniform, cut, even


@triton.jit
def _weights(w, lo, hi, scale, inv_total, uniform, cut, even, valid, NORMALIZATION: tl.constexpr):
    """-> weights a [KP, BLOCK_P], the score u and whether it was kept."""
    u, compared = _scores(w, lo, hi, scale, NORMALIZATION)
    kept = _kept(u, compared, cut, valid)
    a = tl.where(
        uniform[:, None], tl.where(valid[None, :], even[:, None], 0.0), tl.where(kept, u * inv_total[:, None], 0.0)
    )
    return a, u, kept


@triton.jit
def _inverse_norm(squares):
    return tl.where(squares == 0, 0.0, 1.0 / tl.sqrt(squares))


@triton.jit
def _similarities(rows_ptr, stride_k, x_ptr, stride_p, offs_k, offs_p, keep_k, keep_p, D, PRECISION: tl.constexpr, KP: tl.constexpr,
                  BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """rows @ x.T [KP, BLOCK_P], and the squared norms of the rows [KP] and of x [BLOCK_P]."""
    dots = tl.zeros((KP, BLOCK_P), tl.float32)
    of_rows = tl.zeros((KP,), tl.float32)
    of_x = tl.zeros((BLOCK_P,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        r = tl.load(rows_ptr + offs_k[:, None] * stride_k + offs_d[None, :], mask=keep_k[:, None] & keep_d, other=0.0)
        x = tl.load(x_ptr + offs_p[:, None] * stride_p + offs_d[None, :], mask=keep_p[:, None] & keep_d, other=0.0)
        dots = tl.dot(r, x.T, dots, input_precision=PRECISION)
        of_rows += tl.sum(r.to(tl.float32) * r.to(tl.float32), 1)
        of_x += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    return dots, of_rows, of_x


@triton.jit
def pool_forward(
    x_ptr, t_ptr, mask_ptr, out_ptr, s_ptr, inv_ptr,
    K, P, D, threshold, stride_xn, stride_xp, stride_tn, stride_tk,
    NORMALIZATION: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, K, D], s [N, K, P] and inv [N, P] of one image."""
    n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, KP)
    keep_k = offs_k < K
    x_image, t_image = x_ptr + n * stride_xn, t_ptr + n * stride_tn
    s_rows = s_ptr + (n * K + offs_k)[:, None] * P
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        keep_p = offs_p < P
        w, of_t, of_x = _similarities(
            t_image, stride_tk, x_image, stride_xp, offs_k, offs_p, keep_k, keep_p, D, PRECISION, KP, BLOCK_P, BLOCK_D
        )
        inv = _inverse_norm(of_x)
        tl.store(inv_ptr + n * P + offs_p, inv, mask=keep_p)
        tl.store(
            s_rows + offs_p[None, :],
            w * _inverse_norm(of_t)[:, None] * inv[None, :],
            mask=keep_k[:, None] & keep_p[None, :],
        )
    tl.debug_barrier()  # other threads of this program read what was stored
    lo, hi, scale, inv_total, uniform, cut, even = _range_and_total(
        s_ptr, mask_ptr, n, K, P, threshold, offs_k, NORMALIZATION, HAS_THRESHOLD, HAS_MASK, KP, BLOCK_P
    )
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        acc = tl.zeros((KP, BLOCK_D), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            keep_p = offs_p < P
            valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
            w = tl.load(s_rows + offs_p[None, :], mask=keep_k[:, None] & keep_p[None, :], other=0.0)
            inv = tl.load(inv_ptr + n * P + offs_p, mask=keep_p, other=0.0)
            x = tl.load(
                x_image + offs_p[:, None] * stride_xp + offs_d[None, :], mask=keep_p[:, None] & keep_d, other=0.0
            )
            a, _, _ = _weights(w, lo, hi, scale, inv_total, uniform, cut, even, valid, NORMALIZATION)
            acc = _two_dots(a * inv[None, :], x, acc, PRECISION)
        out = out_ptr + (n * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=keep_k[:, None] & keep_d)


@triton.jit
def pool_backward(
    x_ptr, t_ptr, up_ptr, mask_ptr, s_ptr, inv_ptr, dw_ptr, radial_ptr, dx_ptr, dt_ptr,
    K, P, D, threshold, stride_xn, stride_xp, stride_tn, stride_tk, stride_un, stride_uk,
    NORMALIZATION: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [N, P, D] and dt [N, K, D] of one image; dw [N, K, P] and radial [N, P] are workspace."""
    n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, KP)
    keep_k = offs_k < K
    x_image, t_image, up_image = x_ptr + n * stride_xn, t_ptr + n * stride_tn, up_ptr + n * stride_un
    s_rows, dw_rows = s_ptr + (n * K + offs_k)[:, None] * P, dw_ptr + (n * K + offs_k)[:, None] * P
    lo, hi, scale, inv_total, uniform, cut, even = _range_and_total(
        s_ptr, mask_ptr, n, K, P, threshold, offs_k, NORMALIZATION, HAS_THRESHOLD, HAS_MASK, KP, BLOCK_P
    )
    mean = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):  # the gradient of the weights, da
        offs_p = first + tl.arange(0, BLOCK_P)
        keep_p = offs_p < P
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep_kp = keep_k[:, None] & keep_p[None, :]
        da, _, _ = _similarities(
            up_image, stride_uk, x_image, stride_xp, offs_k, offs_p, keep_k, keep_p, D, PRECISION, KP, BLOCK_P, BLOCK_D
        )
        da *= tl.load(inv_ptr + n * P + offs_p, mask=keep_p, other=0.0)[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep_kp, other=0.0)
        a, _, _ = _weights(w, lo, hi, scale, inv_total, uniform, cut, even, valid, NORMALIZATION)
        mean += tl.sum(a * da, 1)
        tl.store(dw_rows + offs_p[None, :], da, mask=keep_kp)
    tl.debug_barrier()
    # With "minmax" the dw of a row add up to zero, so that sum dw w = sum dw (w - lo), which does not cancel.
    total = tl.zeros((KP,), tl.float32)
    along = tl.zeros((KP,), tl.float32)
    lowest = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep_kp = keep_k[:, None] & (offs_p < P)[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep_kp, other=0.0)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep_kp, other=0.0)
        _, u, kept = _weights(w, lo, hi, scale, inv_total, uniform, cut, even, valid, NORMALIZATION)
        dw = _kept_gradient(u, kept, uniform, inv_total, da, mean, NORMALIZATION)
        total += tl.sum(dw, 1)
        if NORMALIZATION == 0:
            along += tl.sum(tl.where(kept, dw * (w - lo[:, None]), 0.0), 1)
            lowest += tl.sum(tl.where(valid[None, :] & (w == lo[:, None]), 1.0, 0.0), 1)
        else:
            along += tl.sum(dw * w, 1)
    share = tl.where(uniform, 0.0, total / tl.where(lowest == 0, 1.0, lowest))
    for first in range(0, P, BLOCK_P):  # da -> dw in place, and the part of each gradient along the patch itself
        offs_p = first + tl.arange(0, BLOCK_P)
        keep_p = offs_p < P
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep_kp = keep_k[:, None] & keep_p[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep_kp, other=0.0)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep_kp, other=0.0)
        a, u, kept = _weights(w, lo, hi, scale, inv_total, uniform, cut, even, valid, NORMALIZATION)
        dw = _kept_gradient(u, kept, uniform, inv_total, da, mean, NORMALIZATION)
        if NORMALIZATION == 0:
            dw = tl.where(valid[None, :] & (w == lo[:, None]) & (uniform == 0)[:, None], dw - share[:, None], dw)
        tl.store(dw_rows + offs_p[None, :], dw, mask=keep_kp)
        inv = tl.load(inv_ptr + n * P + offs_p, mask=keep_p, other=0.0)
        tl.store(
            radial_ptr + n * P + offs_p, tl.sum(tl.where(keep_kp, a * da + dw * w, 0.0), 0) * inv * inv, mask=keep_p
        )
    tl.debug_barrier()
    of_t = tl.zeros((KP,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        t = tl.load(
            t_image + offs_k[:, None] * stride_tk + offs_d[None, :],
            mask=keep_k[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )
        of_t += tl.sum(t.to(tl.float32) * t.to(tl.float32), 1)
    inv_t = _inverse_norm(of_t)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        t = tl.load(t_image + offs_k[:, None] * stride_tk + offs_d[None, :], mask=keep_k[:, None] & keep_d, other=0.0)
        up = tl.load(up_image + offs_k[:, None] * stride_uk + offs_d[None, :], mask=keep_k[:, None] & keep_d, other=0.0)
        dt = tl.zeros((KP, BLOCK_D), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            keep_p = offs_p < P
            valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
            keep_kp = keep_k[:, None] & keep_p[None, :]
            w = tl.load(s_rows + offs_p[None, :], mask=keep_kp, other=0.0)
            inv = tl.load(inv_ptr + n * P + offs_p, mask=keep_p, other=0.0)
            dw = tl.load(dw_rows + offs_p[None, :], mask=keep_kp, other=0.0) * inv[None, :]
            a, _, _ = _weights(w, lo, hi, scale, inv_total, uniform, cut, even, valid, NORMALIZATION)
            a = tl.where(keep_kp, a, 0.0) * inv[None, :]
            x = tl.load(
                x_image + offs_p[:, None] * stride_xp + offs_d[None, :], mask=keep_p[:, None] & keep_d, other=0.0
            )
            dt = _two_dots(dw, x, dt, PRECISION)
            radial = tl.load(radial_ptr + n * P + offs_p, mask=keep_p, other=0.0)
            dx = -radial[:, None] * x.to(tl.float32)
            dx = _two_dots(a.T, up, dx, PRECISION)
            dx = _two_dots((dw * inv_t[:, None]).T, t, dx, PRECISION)
            to = dx_ptr + (n * P + offs_p)[:, None] * D + offs_d[None, :]
            tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=keep_p[:, None] & keep_d)
        dt = (dt - t.to(tl.float32) * (inv_t * along)[:, None]) * inv_t[:, None]
        to = dt_ptr + (n * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(to, dt.to(dt_ptr.dtype.element_ty), mask=keep_k[:, None] & keep_d)


@triton.jit
def _kept_gradient(u, kept, uniform, inv_total, da, mean, NORMALIZATION: tl.constexpr):
    """The gradient of the similarities [KP, BLOCK_P] before the smallest one takes its share."""
    slope = u * inv_total[:, None] if NORMALIZATION == 1 else inv_total[:, None]
    return tl.where(kept & (uniform == 0)[:, None], slope * (da - mean[:, None]), 0.0)


# (BLOCK_P, BLOCK_D, warps, stages) by (KP, float32): without spills on sm_80 and sm_90 (tests/kernels/test_compile_only.py); not tuned on a device yet.
BLOCKS = {
    (16, False): (32, 128, 4, 3),
    (16, True): (32, 64, 8, 2),
    (32, False): (32, 32, 8, 2),
    (32, True): (16, 64, 8, 2),
}


def launch_options(texts: int, dtype: torch.dtype) -> dict[str, int]:
    """The block sizes and launch options for K texts."""
    kp = max(16, triton.next_power_of_2(texts))
    block_p, block_d, warps, stages = BLOCKS[kp, dtype == torch.float32]
    return dict(KP=kp, BLOCK_P=block_p, BLOCK_D=block_d, num_warps=warps, num_stages=stages)


def _prepared(patches: Tensor, texts: Tensor, *more: Tensor) -> list[Tensor]:
    if texts.shape[1] > MAX_TEXTS:
        raise ValueError(
            f"group_patches: backend='triton' takes K up to {MAX_TEXTS} sub-captions, got text_features {tuple(texts.shape)}; use backend='torch'"
        )
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (patches, texts, *more)]


def _options(threshold: float | None, normalization: str, mask: Tensor | None, dtype: torch.dtype) -> dict:
    return dict(
        NORMALIZATION=("minmax", "softmax", "none").index(normalization),
        HAS_THRESHOLD=threshold is not None,
        HAS_MASK=mask is not None,
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
    )


def forward(patches, texts, threshold, normalization, patch_mask) -> tuple[Tensor, Tensor, Tensor]:
    """group_patches' outputs: pooled [N, K, D], similarities [N, K, P] and inverse patch norms [N, P] in float32."""
    x, t = _prepared(patches, texts)
    n, p, d = x.shape
    k = t.shape[1]
    pooled = torch.empty(n, k, d, dtype=t.dtype, device=t.device)
    similarity = torch.empty(n, k, p, dtype=torch.float32, device=x.device)
    inv_norm = torch.empty(n, p, dtype=torch.float32, device=x.device)
    if n:
        mask = inv_norm if patch_mask is None else patch_mask.contiguous()
        pool_forward[(n,)](
            x, t, mask, pooled, similarity, inv_norm, k, p, d, 0.0 if threshold is None else float(threshold), x.stride(0), x.stride(1),
            t.stride(0), t.stride(1), **_options(threshold, normalization, patch_mask, x.dtype), **launch_options(k, x.dtype),
        )  # fmt: skip
    return pooled, similarity, inv_norm


def backward(
    patches, texts, similarity, inv_norm, threshold, normalization, patch_mask, d_pooled
) -> tuple[Tensor, Tensor]:
    """The gradients of patches [N, P, D] and texts [N, K, D]."""
    x, t, up = _prepared(patches, texts, d_pooled)
    n, p, d = x.shape
    k = t.shape[1]
    d_patches = torch.empty(n, p, d, dtype=x.dtype, device=x.device)
    d_texts = torch.empty(n, k, d, dtype=t.dtype, device=t.device)
    if n:
        d_similarity, radial = torch.empty_like(similarity), torch.empty_like(inv_norm)
        mask = inv_norm if patch_mask is None else patch_mask.contiguous()
        pool_backward[(n,)](
            x, t, up, mask, similarity, inv_norm, d_similarity, radial, d_patches, d_texts, k, p, d, 0.0 if threshold is None else float(threshold),
            x.stride(0), x.stride(1), t.stride(0), t.stride(1), up.stride(0), up.stride(1),
            **_options(threshold, normalization, patch_mask, x.dtype), **launch_options(k, x.dtype),
        )  # fmt: skip
    return d_patches, d_texts
