"""pool_backward, a Triton kernel: one program per image, as pool_forward.

    pass 1: gradients of the weights -> row sums -> gradients of the similarities -> pass 2, columns by columns: dx, dt

Names of sizes are those of scores_kernels.py.
"""

import triton
import triton.language as tl

from .scores_kernels import (
    inverse_norm,
    load_tile,
    pooling_weights,
    row_statistics,
    similarities,
    two_dots,
    valid_patches,
)


@triton.jit
def _gradient_above(u, above, rows, da, mean, NORMALIZATION: tl.constexpr):
    """The gradient of the similarities [KP, BLOCK_P] before the smallest one takes its share, eq. 13."""
    inv_total, uniform = rows[3], rows[4]
    slope = u * inv_total[:, None] if NORMALIZATION == 1 else inv_total[:, None]
    return tl.where(above & (uniform == 0)[:, None], slope * ((da - mean[0][:, None]) - mean[1][:, None]), 0.0)


@triton.jit
def _mean_weight_gradient(
    image,
    work,
    sizes,
    offs_k,
    rows,
    NORMALIZATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores the gradients of the weights, da, in dw_rows -> their mean under the weights as a rounded value and the
    rest, [KP] each.
    """
    x_image, stride_xp, up_image, stride_uk, mask_ptr = image
    s_rows, inv_row, dw_rows = work[0], work[1], work[2]
    n, K, P, D = sizes
    keep_k = offs_k < K
    mean = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        da, _, _ = similarities(
            up_image, stride_uk, x_image, stride_xp, offs_k, offs_p, keep_k, valid, D, PRECISION, KP, BLOCK_P, BLOCK_D
        )
        da *= tl.load(inv_row + offs_p, mask=valid, other=0.0)[None, :]
        a, _, _ = pooling_weights(tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0), rows, valid, NORMALIZATION)
        mean += tl.sum(a * da, 1)
        tl.store(dw_rows + offs_p[None, :], da, mask=keep_k[:, None] & (offs_p < P)[None, :])
    tl.debug_barrier()
    # A large mean is rounded, every patch would get that error, and what is summed over them is near zero:
    # so the mean of what is left.
    rest = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        a, _, _ = pooling_weights(tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0), rows, valid, NORMALIZATION)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0)
        rest += tl.sum(a * (da - mean[:, None]), 1)
    return mean, rest


@triton.jit
def _similarity_gradient(
    mask_ptr,
    work,
    sizes,
    offs_k,
    rows,
    mean,
    NORMALIZATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """da -> dw in place (eq. 13-14), and the part of each patch's gradient along the patch itself -> sum dw w [KP]."""
    s_rows, inv_row, dw_rows, radial_row = work
    n, K, P = sizes[0], sizes[1], sizes[2]
    lo, uniform = rows[0], rows[4]
    keep_k = offs_k < K
    # With "minmax" the dw of a row add up to zero, so that sum dw w = sum dw (w - lo), which does not cancel.
    total = tl.zeros((KP,), tl.float32)
    along = tl.zeros((KP,), tl.float32)
    lowest = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0)
        _, u, above = pooling_weights(w, rows, valid, NORMALIZATION)
        dw = _gradient_above(u, above, rows, da, mean, NORMALIZATION)
        total += tl.sum(dw, 1)
        if NORMALIZATION == 0:
            along += tl.sum(tl.where(above, dw * (w - lo[:, None]), 0.0), 1)
            lowest += tl.sum(tl.where(valid[None, :] & (w == lo[:, None]), 1.0, 0.0), 1)
        else:
            along += tl.sum(dw * w, 1)
    share = tl.where(uniform, 0.0, total / tl.where(lowest == 0, 1.0, lowest))
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0)
        a, u, above = pooling_weights(w, rows, valid, NORMALIZATION)
        dw = _gradient_above(u, above, rows, da, mean, NORMALIZATION)
        if NORMALIZATION == 0:
            dw = tl.where(valid[None, :] & (w == lo[:, None]) & (uniform == 0)[:, None], dw - share[:, None], dw)
        tl.store(dw_rows + offs_p[None, :], dw, mask=keep_k[:, None] & (offs_p < P)[None, :])
        inv = tl.load(inv_row + offs_p, mask=valid, other=0.0)
        radial = tl.sum(tl.where(keep, a * da + dw * w, 0.0), 0) * inv * inv
        tl.store(radial_row + offs_p, radial, mask=offs_p < P)
    tl.debug_barrier()
    return along


@triton.jit
def _inverse_norms(t_image, stride_tk, offs_k, keep_k, D, KP: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / |t| of each text [KP], 0 for a text of zeros."""
    squares = tl.zeros((KP,), tl.float32)
    for d in range(0, D, BLOCK_D):
        t = load_tile(t_image, stride_tk, offs_k, keep_k, d + tl.arange(0, BLOCK_D), D)
        squares += tl.sum(t.to(tl.float32) * t.to(tl.float32), 1)
    return inverse_norm(squares)


@triton.jit
def _store_gradients(
    image,
    text,
    work,
    outputs,
    sizes,
    offs_k,
    rows,
    along,
    NORMALIZATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx [P, D] and dt [K, D] of one image, columns by columns, from the gradients of the similarities, eq. 15."""
    x_image, stride_xp, up_image, stride_uk, mask_ptr = image
    t_image, stride_tk = text
    s_rows, inv_row, dw_rows, radial_row = work
    dx_ptr, dt_ptr = outputs
    n, K, P, D = sizes
    keep_k = offs_k < K
    inv_t = _inverse_norms(t_image, stride_tk, offs_k, keep_k, D, KP, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        t = load_tile(t_image, stride_tk, offs_k, keep_k, offs_d, D)
        up = load_tile(up_image, stride_uk, offs_k, keep_k, offs_d, D)
        dt = tl.zeros((KP, BLOCK_D), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            valid = valid_patches(mask_ptr, n, offs_p, P, HAS_MASK)
            keep = keep_k[:, None] & valid[None, :]
            inv = tl.load(inv_row + offs_p, mask=valid, other=0.0)
            dw = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0) * inv[None, :]
            w = tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0)
            a, _, _ = pooling_weights(w, rows, valid, NORMALIZATION)
            a = tl.where(keep, a, 0.0) * inv[None, :]
            x = load_tile(x_image, stride_xp, offs_p, valid, offs_d, D)
            dt = two_dots(dw, x, dt, PRECISION)
            dx = -tl.load(radial_row + offs_p, mask=valid, other=0.0)[:, None] * x.to(tl.float32)
            dx = two_dots(a.T, up, dx, PRECISION)
            dx = two_dots((dw * inv_t[:, None]).T, t, dx, PRECISION)
            to = dx_ptr + (n * P + offs_p)[:, None] * D + offs_d[None, :]
            tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=(offs_p < P)[:, None] & keep_d)
        dt = (dt - t.to(tl.float32) * (inv_t * along)[:, None]) * inv_t[:, None]
        to = dt_ptr + (n * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(to, dt.to(dt_ptr.dtype.element_ty), mask=keep_k[:, None] & keep_d)


@triton.jit(do_not_specialize=["K", "P", "threshold"])
def pool_backward(
    x_ptr,
    t_ptr,
    up_ptr,
    mask_ptr,
    s_ptr,
    inv_ptr,
    dw_ptr,
    radial_ptr,
    dx_ptr,
    dt_ptr,
    K,
    P,
    D,
    threshold,
    stride_xn,
    stride_xp,
    stride_tn,
    stride_tk,
    stride_un,
    stride_uk,
    NORMALIZATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx [N, P, D] and dt [N, K, D] of one image (eq. 15); dw [N, K, P] and radial [N, P] are workspace."""
    n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, KP)
    image = (x_ptr + n * stride_xn, stride_xp, up_ptr + n * stride_un, stride_uk, mask_ptr)
    s_rows, dw_rows = s_ptr + (n * K + offs_k)[:, None] * P, dw_ptr + (n * K + offs_k)[:, None] * P
    work = (s_rows, inv_ptr + n * P, dw_rows, radial_ptr + n * P)
    sizes = (n, K, P, D)
    rows = row_statistics(s_ptr, mask_ptr, n, K, P, threshold, offs_k, NORMALIZATION, HAS_MASK, KP, BLOCK_P)
    mean = _mean_weight_gradient(
        image, work, sizes, offs_k, rows, NORMALIZATION, HAS_MASK, PRECISION, KP, BLOCK_P, BLOCK_D
    )
    along = _similarity_gradient(mask_ptr, work, sizes, offs_k, rows, mean, NORMALIZATION, HAS_MASK, KP, BLOCK_P)
    text, outputs = (t_ptr + n * stride_tn, stride_tk), (dx_ptr, dt_ptr)
    _store_gradients(
        image,
        text,
        work,
        outputs,
        sizes,
        offs_k,
        rows,
        along,
        NORMALIZATION,
        HAS_MASK,
        PRECISION,
        KP,
        BLOCK_P,
        BLOCK_D,
    )
