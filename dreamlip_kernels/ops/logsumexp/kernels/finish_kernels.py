"""Forward's last step as a Triton kernel of bidirectional_logsumexp: logarithms of the sums, and the positives' logits.

It sees rows and columns alike: R of one side, whose S partners lie on the other, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits_kernels import LARGEST_SUM, LN2, SMALLEST_SUM, slope_and_offset


@triton.jit
def _online_logsumexp(queries, keys, slope, D, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """log2 of the sum over s of exp2(slope * q[r] . k[s]) with running maxima, for any finite input."""
    q_rows, offs_r, keep_r, q_images_ptr = queries
    k_base, stride_ks, S, k_mask_ptr, has_k_mask, k_images_ptr = keys
    PRECISION: tl.constexpr = "tf32x3" if k_base.dtype.element_ty == tl.float32 else "tf32"
    offs_d = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first_s in range(0, S, BLOCK_S):
        offs_s = first_s + tl.arange(0, BLOCK_S)
        keep_s = offs_s < S
        k_rows = k_base + offs_s.to(tl.int64)[:, None] * stride_ks
        acc = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
        for d in range(0, D, BLOCK_D):
            keep_d = (d + offs_d < D)[None, :]
            q = tl.load(q_rows + (d + offs_d)[None, :], mask=keep_r[:, None] & keep_d, other=0.0)
            k = tl.load(k_rows + (d + offs_d)[None, :], mask=keep_s[:, None] & keep_d, other=0.0)
            acc = tl.dot(q, k.T, acc, input_precision=PRECISION)
        if k_mask_ptr is not None:
            keep_s = keep_s & (tl.load(k_mask_ptr + offs_s, mask=keep_s & (has_k_mask != 0), other=1) != 0)
        keep = keep_s[None, :]
        if q_images_ptr is not None:
            q_image = tl.load(q_images_ptr + offs_r, mask=keep_r, other=-1)
            k_image = tl.load(k_images_ptr + offs_s, mask=keep_s, other=-2)
            keep = keep & (q_image[:, None] != k_image[None, :])
        z = tl.where(keep, acc * slope, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)


@triton.jit
def _paired_dots(q_rows, k_rows, keep_r, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """q[r] . k[r] of two blocks of rows: the diagonal of a tile of logits.

    From the same products in the same order as the sums are made of. A tensor core cuts what it adds, and a positive
    without that error is no part of the sum that it is divided by: the scale's gradient, left over where positives and
    sums cancel, would be off by hundreds of the error of a logit."""
    PRECISION: tl.constexpr = "tf32x3" if q_rows.dtype.element_ty == tl.float32 else "tf32"
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = keep_r[:, None] & (d + offs_d < D)[None, :]
        q = tl.load(q_rows + (d + offs_d)[None, :], mask=inside, other=0.0)
        k = tl.load(k_rows + (d + offs_d)[None, :], mask=inside, other=0.0)
        acc = tl.dot(k, q.T, acc, input_precision=PRECISION)
    offs_r = tl.arange(0, BLOCK_R)
    return tl.sum(tl.where(offs_r[:, None] == offs_r[None, :], acc, 0.0), 1)


@triton.jit
def _total(part_base, part_stride, parts, keep_r, BLOCK_R: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """The sum over ``parts`` rows of the matrix whose first row begins at part_base [1, BLOCK_R]."""
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        offs_p = first + tl.arange(0, BLOCK_PARTS)
        inside = (offs_p < parts)[:, None] & keep_r[None, :]
        total += tl.sum(tl.load(part_base + offs_p.to(tl.int64)[:, None] * part_stride, mask=inside, other=0.0), 0)
    return total


VARY_IN_FINISH = ["R", "S", "parts", "part_stride", "part_slot_stride", "q_mask_k", "k_mask_k", "paired"]


@triton.jit(do_not_specialize=[*VARY_IN_FINISH, "has_q_mask", "has_k_mask"])
def finish_sums(
    part_ptr,
    q_ptr,
    k_ptr,
    q_mask_ptr,
    k_mask_ptr,
    q_images_ptr,
    k_images_ptr,
    scale_ptr,
    slope_ptr,
    out_ptr,
    pos_ptr,
    R,
    S,
    D,
    stride_qk,
    stride_qr,
    stride_kk,
    stride_ks,
    parts,
    part_stride,
    part_slot_stride,
    q_mask_k,
    k_mask_k,
    has_q_mask,
    has_k_mask,
    paired,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """out[k, r] = logsumexp over s of z[k, r, s], from partial sums of exp2(z - offset) over ``parts`` stretches of s.

    Sums outside float32's range, NaN among them, are computed again with running maxima, for the program's own rows
    alone. With ``paired`` also pos[k, r] = z[k, r, r]. One code for rows and for columns: what differs is not compiled
    in. Both masks are None or neither is; ``has_q_mask`` and ``has_k_mask`` say which are read. Numbers of images are
    those of exp_sums."""
    pid_k = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep_r = offs_r < R
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    part_base = part_ptr + pid_k * part_slot_stride + offs_r[None, :]
    log_sum = tl.log2(_total(part_base, part_stride, parts, keep_r, BLOCK_R, BLOCK_PARTS))
    lse = log_sum + offset
    dropped = offs_r < 0
    if q_mask_ptr is not None:
        q_kept = tl.load(q_mask_ptr + pid_k * q_mask_k + offs_r, mask=keep_r & (has_q_mask != 0), other=1)
        dropped = q_kept == 0
        k_mask_ptr += pid_k * k_mask_k
    right = (log_sum >= SMALLEST_SUM) & (log_sum <= LARGEST_SUM)
    wrong = keep_r & (dropped == 0) & (right == 0)
    q_rows = q_ptr + pid_k * stride_qk + offs_r.to(tl.int64)[:, None] * stride_qr
    k_base = k_ptr + pid_k * stride_kk
    if tl.max(wrong.to(tl.int32), 0) != 0:
        queries = (q_rows, offs_r, keep_r, q_images_ptr)
        keys = (k_base, stride_ks, S, k_mask_ptr, has_k_mask, k_images_ptr)
        lse = _online_logsumexp(queries, keys, slope, D, BLOCK_R, BLOCK_S, BLOCK_D)
    lse = tl.where(dropped, float("-inf"), lse * LN2)
    tl.store(out_ptr + pid_k * R + offs_r, lse, mask=keep_r)
    if paired != 0:
        k_rows = k_base + offs_r.to(tl.int64)[:, None] * stride_ks
        dots = _paired_dots(q_rows, k_rows, keep_r & (offs_r < S), D, BLOCK_R, BLOCK_D)
        tl.store(pos_ptr + pid_k * R + offs_r, dots * tl.load(slope_ptr), mask=keep_r)
