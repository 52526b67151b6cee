"""Triton kernels of group_patches: one program per image, patches read in chunks; the second pass over them hits the L2
cache.

    pool_forward   pass 1: similarities and norms -> statistics of each row -> pass 2, columns by columns:
                   pooled = weights @ patches
    pool_backward  pass 1: gradients of the weights -> row sums -> gradients of the similarities -> pass 2,
                   columns by columns: dx, dt

One image's sub-captions and patches meet nobody else's, so every sum has one owner: no atomics, the same bits each
time. Products take the raw 16-bit values and norms multiply afterwards in float32. Weights and their gradients enter
the second product as a high and a low part, since one rounding to 16 bits would cost more than the output's.

K sub-captions (KP: a power of two, at least 16), P patches, D width. A chunk is BLOCK_P patches and BLOCK_D columns.
NORMALIZATION is 0 for "minmax", 1 for "softmax", 2 for "none". Equations are those of docs/math.md section 3.
"""

import triton
import triton.language as tl


@triton.jit
def _valid(mask_ptr, n, offs_p, P, HAS_MASK: tl.constexpr):
    """[BLOCK_P] whether there is such a patch and it counts. Others are never read: a NaN among them has no effect."""
    valid = offs_p < P
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + n * P + offs_p, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _load_tile(rows_ptr, stride, offs_r, keep_r, offs_d, D):
    """[rows, BLOCK_D], zeros where there is nothing."""
    return tl.load(
        rows_ptr + offs_r[:, None] * stride + offs_d[None, :], mask=keep_r[:, None] & (offs_d < D)[None, :], other=0.0
    )


@triton.jit
def _inverse_norm(squares):
    return tl.where(squares == 0, 0.0, 1.0 / tl.sqrt(squares))


@triton.jit
def _two_dots(weights, features, acc, PRECISION: tl.constexpr):
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
        wide = features.to(tl.float32)
        acc = tl.dot(high, wide, acc, input_precision="tf32")
        acc = tl.dot(weights - high, wide, acc, input_precision="tf32")
    return acc


@triton.jit
def _similarities(
    rows_ptr, stride_k, x_ptr, stride_p, offs_k, offs_p, keep_k, keep_p, D,
    PRECISION: tl.constexpr, KP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows @ x.T [KP, BLOCK_P], and the squared norms of the rows [KP] and of x [BLOCK_P]."""
    dots = tl.zeros((KP, BLOCK_P), tl.float32)
    of_rows = tl.zeros((KP,), tl.float32)
    of_x = tl.zeros((BLOCK_P,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        r = _load_tile(rows_ptr, stride_k, offs_k, keep_k, offs_d, D)
        x = _load_tile(x_ptr, stride_p, offs_p, keep_p, offs_d, D)
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
def _kept(u, compared, cut, valid):
    # NaN compares false with everything: a NaN score is kept, so that it shows in the result.
    return ((compared < cut[:, None]) == 0) & ((u < 0) == 0) & valid[None, :]


@triton.jit
def _row_statistics(
    s_ptr, mask_ptr, n, K, P, threshold, offs_k,
    NORMALIZATION: tl.constexpr, HAS_MASK: tl.constexpr, KP: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
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
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
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
            valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
            w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
            mass += tl.sum(tl.where(valid[None, :], tl.exp(w - tl.where(uniform, 0.0, hi)[:, None]), 0.0), 1)
        scale = 1.0 / tl.where(uniform, 1.0, mass)
    total = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        w = tl.load(rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
        u, compared = _scores(w, lo, hi, scale, NORMALIZATION)
        total += tl.sum(tl.where(_kept(u, compared, cut, valid), u, 0.0), 1)
    uniform = uniform | (total <= 0)
    return lo, hi, scale, 1.0 / tl.where(uniform, 1.0, total), uniform, cut, even


@triton.jit
def _weights(w, rows, valid, NORMALIZATION: tl.constexpr):
    """-> weights a [KP, BLOCK_P] (eq. 11), the score u and whether it was kept; ``rows`` is what _row_statistics
    gave.
    """
    lo, hi, scale, inv_total, uniform, cut, even = rows
    u, compared = _scores(w, lo, hi, scale, NORMALIZATION)
    kept = _kept(u, compared, cut, valid)
    spread = tl.where(valid[None, :], even[:, None], 0.0)
    return tl.where(uniform[:, None], spread, tl.where(kept, u * inv_total[:, None], 0.0)), u, kept


# One compiled kernel serves every K and P: specialized on 1 and on multiples of 16 each shape would compile its own.
@triton.jit(do_not_specialize=["K", "P", "threshold"])
def pool_forward(
    x_ptr, t_ptr, mask_ptr, out_ptr, s_ptr, inv_ptr,
    K, P, D, threshold, stride_xn, stride_xp, stride_tn, stride_tk,
    NORMALIZATION: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, K, D], s [N, K, P] and inv [N, P] of one image. A threshold below -1e30 is 1 / (number of valid
    patches).
    """
    n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, KP)
    keep_k = offs_k < K
    x_image, t_image = x_ptr + n * stride_xn, t_ptr + n * stride_tn
    s_rows = s_ptr + (n * K + offs_k)[:, None] * P
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        w, of_t, of_x = _similarities(
            t_image, stride_tk, x_image, stride_xp, offs_k, offs_p, keep_k, valid, D, PRECISION, KP, BLOCK_P, BLOCK_D
        )
        inv = _inverse_norm(of_x)
        w = w * _inverse_norm(of_t)[:, None] * inv[None, :]
        tl.store(inv_ptr + n * P + offs_p, inv, mask=offs_p < P)
        tl.store(s_rows + offs_p[None, :], w, mask=keep_k[:, None] & (offs_p < P)[None, :])
    tl.debug_barrier()  # other threads of this program read what was stored
    rows = _row_statistics(s_ptr, mask_ptr, n, K, P, threshold, offs_k, NORMALIZATION, HAS_MASK, KP, BLOCK_P)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((KP, BLOCK_D), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
            w = tl.load(s_rows + offs_p[None, :], mask=keep_k[:, None] & valid[None, :], other=0.0)
            inv = tl.load(inv_ptr + n * P + offs_p, mask=valid, other=0.0)
            x = _load_tile(x_image, stride_xp, offs_p, valid, offs_d, D)
            a, _, _ = _weights(w, rows, valid, NORMALIZATION)
            acc = _two_dots(a * inv[None, :], x, acc, PRECISION)
        out = out_ptr + (n * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=keep_k[:, None] & (offs_d < D)[None, :])


@triton.jit
def _kept_gradient(u, kept, rows, da, mean, NORMALIZATION: tl.constexpr):
    """The gradient of the similarities [KP, BLOCK_P] before the smallest one takes its share, eq. 13."""
    inv_total, uniform = rows[3], rows[4]
    slope = u * inv_total[:, None] if NORMALIZATION == 1 else inv_total[:, None]
    return tl.where(kept & (uniform == 0)[:, None], slope * ((da - mean[0][:, None]) - mean[1][:, None]), 0.0)


@triton.jit
def _mean_weight_gradient(
    x_image, up_image, mask_ptr, s_rows, inv_row, dw_rows, n, K, P, D, stride_xp, stride_uk, offs_k, rows,
    NORMALIZATION: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of the weights, da, in dw_rows -> their mean under the weights as a rounded value and the
    rest, [KP] each.
    """
    keep_k = offs_k < K
    mean = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        da, _, _ = _similarities(
            up_image, stride_uk, x_image, stride_xp, offs_k, offs_p, keep_k, valid, D, PRECISION, KP, BLOCK_P, BLOCK_D
        )
        da *= tl.load(inv_row + offs_p, mask=valid, other=0.0)[None, :]
        a, _, _ = _weights(tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0), rows, valid, NORMALIZATION)
        mean += tl.sum(a * da, 1)
        tl.store(dw_rows + offs_p[None, :], da, mask=keep_k[:, None] & (offs_p < P)[None, :])
    tl.debug_barrier()
    # A large mean is rounded, every patch would get that error, and what is summed over them is near zero:
    # so the mean of what is left.
    rest = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        a, _, _ = _weights(tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0), rows, valid, NORMALIZATION)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0)
        rest += tl.sum(a * (da - mean[:, None]), 1)
    return mean, rest


@triton.jit
def _similarity_gradient(
    mask_ptr, s_rows, inv_row, dw_rows, radial_row, n, K, P, offs_k, rows, mean,
    NORMALIZATION: tl.constexpr, HAS_MASK: tl.constexpr, KP: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """da -> dw in place (eq. 13-14), and the part of each patch's gradient along the patch itself -> sum dw w [KP]."""
    lo, uniform = rows[0], rows[4]
    keep_k = offs_k < K
    # With "minmax" the dw of a row add up to zero, so that sum dw w = sum dw (w - lo), which does not cancel.
    total = tl.zeros((KP,), tl.float32)
    along = tl.zeros((KP,), tl.float32)
    lowest = tl.zeros((KP,), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0)
        _, u, kept = _weights(w, rows, valid, NORMALIZATION)
        dw = _kept_gradient(u, kept, rows, da, mean, NORMALIZATION)
        total += tl.sum(dw, 1)
        if NORMALIZATION == 0:
            along += tl.sum(tl.where(kept, dw * (w - lo[:, None]), 0.0), 1)
            lowest += tl.sum(tl.where(valid[None, :] & (w == lo[:, None]), 1.0, 0.0), 1)
        else:
            along += tl.sum(dw * w, 1)
    share = tl.where(uniform, 0.0, total / tl.where(lowest == 0, 1.0, lowest))
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
        keep = keep_k[:, None] & valid[None, :]
        w = tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0)
        da = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0)
        a, u, kept = _weights(w, rows, valid, NORMALIZATION)
        dw = _kept_gradient(u, kept, rows, da, mean, NORMALIZATION)
        if NORMALIZATION == 0:
            dw = tl.where(valid[None, :] & (w == lo[:, None]) & (uniform == 0)[:, None], dw - share[:, None], dw)
        tl.store(dw_rows + offs_p[None, :], dw, mask=keep_k[:, None] & (offs_p < P)[None, :])
        inv = tl.load(inv_row + offs_p, mask=valid, other=0.0)
        radial = tl.sum(tl.where(keep, a * da + dw * w, 0.0), 0) * inv * inv
        tl.store(radial_row + offs_p, radial, mask=offs_p < P)
    tl.debug_barrier()
    return along


@triton.jit(do_not_specialize=["K", "P", "threshold"])
def pool_backward(
    x_ptr, t_ptr, up_ptr, mask_ptr, s_ptr, inv_ptr, dw_ptr, radial_ptr, dx_ptr, dt_ptr,
    K, P, D, threshold, stride_xn, stride_xp, stride_tn, stride_tk, stride_un, stride_uk,
    NORMALIZATION: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [N, P, D] and dt [N, K, D] of one image (eq. 15); dw [N, K, P] and radial [N, P] are workspace."""
    n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, KP)
    keep_k = offs_k < K
    x_image, t_image, up_image = x_ptr + n * stride_xn, t_ptr + n * stride_tn, up_ptr + n * stride_un
    inv_row, radial_row = inv_ptr + n * P, radial_ptr + n * P
    s_rows, dw_rows = s_ptr + (n * K + offs_k)[:, None] * P, dw_ptr + (n * K + offs_k)[:, None] * P
    rows = _row_statistics(s_ptr, mask_ptr, n, K, P, threshold, offs_k, NORMALIZATION, HAS_MASK, KP, BLOCK_P)
    mean = _mean_weight_gradient(
        x_image, up_image, mask_ptr, s_rows, inv_row, dw_rows, n, K, P, D, stride_xp, stride_uk, offs_k, rows,
        NORMALIZATION, HAS_MASK, PRECISION, KP, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    along = _similarity_gradient(
        mask_ptr,
        s_rows,
        inv_row,
        dw_rows,
        radial_row,
        n,
        K,
        P,
        offs_k,
        rows,
        mean,
        NORMALIZATION,
        HAS_MASK,
        KP,
        BLOCK_P,
    )
    of_t = tl.zeros((KP,), tl.float32)
    for d in range(0, D, BLOCK_D):
        t = _load_tile(t_image, stride_tk, offs_k, keep_k, d + tl.arange(0, BLOCK_D), D)
        of_t += tl.sum(t.to(tl.float32) * t.to(tl.float32), 1)
    inv_t = _inverse_norm(of_t)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        t = _load_tile(t_image, stride_tk, offs_k, keep_k, offs_d, D)
        up = _load_tile(up_image, stride_uk, offs_k, keep_k, offs_d, D)
        dt = tl.zeros((KP, BLOCK_D), tl.float32)
        for first in range(0, P, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            valid = _valid(mask_ptr, n, offs_p, P, HAS_MASK)
            keep = keep_k[:, None] & valid[None, :]
            inv = tl.load(inv_row + offs_p, mask=valid, other=0.0)
            dw = tl.load(dw_rows + offs_p[None, :], mask=keep, other=0.0) * inv[None, :]
            a, _, _ = _weights(tl.load(s_rows + offs_p[None, :], mask=keep, other=0.0), rows, valid, NORMALIZATION)
            a = tl.where(keep, a, 0.0) * inv[None, :]
            x = _load_tile(x_image, stride_xp, offs_p, valid, offs_d, D)
            dt = _two_dots(dw, x, dt, PRECISION)
            dx = -tl.load(radial_row + offs_p, mask=valid, other=0.0)[:, None] * x.to(tl.float32)
            dx = _two_dots(a.T, up, dx, PRECISION)
            dx = _two_dots((dw * inv_t[:, None]).T, t, dx, PRECISION)
            to = dx_ptr + (n * P + offs_p)[:, None] * D + offs_d[None, :]
            tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=(offs_p < P)[:, None] & keep_d)
        dt = (dt - t.to(tl.float32) * (inv_t * along)[:, None]) * inv_t[:, None]
        to = dt_ptr + (n * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(to, dt.to(dt_ptr.dtype.element_ty), mask=keep_k[:, None] & keep_d)
