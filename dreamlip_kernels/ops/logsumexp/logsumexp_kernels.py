"""Forward's Triton kernels of bidirectional_logsumexp: both sums in one pass, and their logarithms.

M rows, C columns, K slots, D width. Operands are 16-bit, or float32 with PRECISION "tf32x3". Where DESCRIPTOR says so
they come as tensor descriptors, which Hopper's TMA reads, else as pointers, which Ampere's cp.async reads. Sizes that
vary from call to call are not specialized on: another batch compiles nothing."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Binary exponents: of the largest term that unit vectors may have, and of the sums that are right to float32.
LARGEST_TERM, SMALLEST_SUM, LARGEST_SUM = tl.constexpr(106.0), tl.constexpr(-82.0), tl.constexpr(126.0)
NO_DIAGONAL = 2**30  # of a rectangle without positives: no column meets it


@triton.jit
def slope_and_offset(scale_ptr, slope_ptr):
    """z in powers of two is slope * acc; exp2(z - offset) has no term too large, nor sum too small up to a scale of 65.

    *scale_ptr bounds the logits of unit vectors; *slope_ptr has the units that float32 operands were divided by too.
    The offset nearest 0 rounds z least."""
    bound = tl.abs(tl.load(scale_ptr)) * LOG2E
    offset = tl.maximum(bound - LARGEST_TERM, tl.minimum(0.0, -SMALLEST_SUM - bound))
    return tl.load(slope_ptr) * LOG2E, offset


@triton.jit
def x_tile(x, stride, first, M, d, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Rows first.. and columns d.. of x [M, D], zeros beyond its edges."""
    if DESCRIPTOR:
        tile = x.load([first, d])
    else:
        rows = first + tl.arange(0, BLOCK_M)
        cols = d + tl.arange(0, BLOCK_D)
        tile = tl.load(
            x + rows.to(tl.int64)[:, None] * stride + cols[None, :],
            mask=(rows < M)[:, None] & (cols < D)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def y_tile(
    y, stride_k, stride_c, slot, first, C, d, D, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """Rows first.. and columns d.. of y [K, C, D] in one slot, zeros beyond its edges."""
    if DESCRIPTOR:
        tile = y.load([slot, first, d]).reshape(BLOCK_C, BLOCK_D)
    else:
        rows = first + tl.arange(0, BLOCK_C)
        cols = d + tl.arange(0, BLOCK_D)
        base = y + tl.cast(slot, tl.int64) * stride_k
        tile = tl.load(
            base + rows.to(tl.int64)[:, None] * stride_c + cols[None, :],
            mask=(rows < C)[:, None] & (cols < D)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def drop_columns(acc, keep_c, slope, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ELEMENT: tl.constexpr):
    """acc, with slope * acc at minus infinity in the columns that are not kept (a slope of 0 is the caller's to avoid).

    By one more product of depth 16, ones times 0 or -inf: a mask spread over the tile's layout took 108 registers, and
    with them the second program on a processor."""
    ones = tl.full((BLOCK_M, 16), 1.0, ELEMENT)
    far = tl.where(keep_c, 0.0, tl.where(slope < 0, float("inf"), float("-inf"))).to(ELEMENT)
    return tl.dot(ones, far[:, None].broadcast_to(BLOCK_C, 16).T, acc, input_precision="tf32")


@triton.jit(do_not_specialize=["M", "C", "first_tile", "row_tiles_stride", "band_rows"])
def exp_sums(
    x,
    y,
    x_mask_ptr,
    y_mask_ptr,
    scale_ptr,
    slope_ptr,
    row_ptr,
    col_ptr,
    M,
    C,
    D,
    stride_x,
    stride_yk,
    stride_y,
    first_tile,
    row_tiles_stride,
    band_rows,
    HAS_X_MASK: tl.constexpr,
    HAS_Y_MASK: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Sums of e = exp2(z - offset): row [K, tiles, M] of each column tile, col [bands, K, C] of each band of rows."""
    ELEMENT: tl.constexpr = x.dtype if DESCRIPTOR else x.dtype.element_ty
    tile_c = first_tile + tl.program_id(0)
    pid_b = tl.program_id(1)
    pid_k = tl.program_id(2)
    first_c = tile_c * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    keep_c = offs_c < C
    if HAS_Y_MASK:
        keep_c = keep_c & (tl.load(y_mask_ptr + pid_k.to(tl.int64) * C + offs_c, mask=keep_c, other=0) != 0)
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    # Rows r and r + 8 of a tile lie in one thread (wgmma and mma layouts), so this partial sum over rows needs no
    # exchange of lanes.
    columns = tl.zeros((BLOCK_M // 16, 8, BLOCK_C), tl.float32)
    stop = tl.minimum((pid_b + 1) * band_rows, M)
    for first_m in range(pid_b * band_rows, stop, BLOCK_M):
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for d in range(0, D, BLOCK_D):
            x_part = x_tile(x, stride_x, first_m, M, d, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
            y_part = y_tile(y, stride_yk, stride_y, pid_k, first_c, C, d, D, BLOCK_C, BLOCK_D, DESCRIPTOR)
            acc = tl.dot(x_part, y_part.T, acc, input_precision=PRECISION)
        if MASK_COLUMNS:
            acc = drop_columns(acc, keep_c, slope, BLOCK_M, BLOCK_C, ELEMENT)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        keep_m = offs_m < M
        if HAS_X_MASK:
            keep_m = keep_m & (tl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
        # A dropped row has an infinite offset: two registers a thread, where a mask of the tile would take one for each
        # element.
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        row = row_ptr + (pid_k.to(tl.int64) * row_tiles_stride + tl.program_id(0)) * M + offs_m
        tl.store(row, tl.sum(e, 1), mask=offs_m < M)
        columns += tl.sum(tl.reshape(e, (BLOCK_M // 16, 2, 8, BLOCK_C)), 1)
    sums = tl.sum(tl.sum(columns, 0), 0)
    tl.store(col_ptr + (pid_b.to(tl.int64) * tl.num_programs(2) + pid_k) * C + offs_c, sums, mask=offs_c < C)


@triton.jit
def _online_logsumexp(
    q_rows,
    k_base,
    k_mask_ptr,
    slope,
    keep_r,
    S,
    D,
    stride_ks,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    PRECISION: tl.constexpr,
    has_k_mask,
):
    """log2 of the sum over s of exp2(slope * q[r] . k[s]) with running maxima, for any finite input."""
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
        if HAS_MASKS:
            keep_s = keep_s & (tl.load(k_mask_ptr + offs_s, mask=keep_s & (has_k_mask != 0), other=1) != 0)
        z = tl.where(keep_s[None, :], acc * slope, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)


@triton.jit
def _paired_dots(q_rows, k_rows, keep_r, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """q[r] . k[r] of two blocks of rows."""
    offs_d = tl.arange(0, BLOCK_D)
    dots = tl.zeros((BLOCK_R,), tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = keep_r[:, None] & (d + offs_d < D)[None, :]
        q = tl.load(q_rows + (d + offs_d)[None, :], mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_rows + (d + offs_d)[None, :], mask=inside, other=0.0).to(tl.float32)
        dots += tl.sum(q * k, 1)
    return dots


@triton.jit(
    do_not_specialize=[
        "R", "S", "parts", "part_stride", "part_slot_stride", "q_mask_k", "k_mask_k", "has_q_mask", "has_k_mask",
        "paired",
    ]
)  # fmt: skip
def finish_sums(
    part_ptr,
    q_ptr,
    k_ptr,
    q_mask_ptr,
    k_mask_ptr,
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
    HAS_MASKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[k, r] = logsumexp over s of z[k, r, s], from partial sums of exp2(z - offset) over ``parts`` stretches of s.

    Sums outside float32's range, NaN among them, are computed again with running maxima, for the program's own rows
    alone. With ``paired`` also pos[k, r] = z[k, r, r]. One code for rows and for columns: what differs is not compiled
    in."""
    pid_k = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep_r = offs_r < R
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    total = tl.zeros((BLOCK_R,), tl.float32)
    part_base = part_ptr + pid_k * part_slot_stride + offs_r[None, :]
    for first in range(0, parts, BLOCK_PARTS):
        offs_p = first + tl.arange(0, BLOCK_PARTS)
        inside = (offs_p < parts)[:, None] & keep_r[None, :]
        total += tl.sum(tl.load(part_base + offs_p.to(tl.int64)[:, None] * part_stride, mask=inside, other=0.0), 0)
    log_sum = tl.log2(total)
    lse = log_sum + offset
    dropped = offs_r < 0
    if HAS_MASKS:
        q_kept = tl.load(q_mask_ptr + pid_k * q_mask_k + offs_r, mask=keep_r & (has_q_mask != 0), other=1)
        dropped = q_kept == 0
    right = (log_sum >= SMALLEST_SUM) & (log_sum <= LARGEST_SUM)
    wrong = keep_r & (dropped == 0) & (right == 0)
    q_rows = q_ptr + pid_k * stride_qk + offs_r.to(tl.int64)[:, None] * stride_qr
    k_base = k_ptr + pid_k * stride_kk
    if tl.max(wrong.to(tl.int32), 0) != 0:
        lse = _online_logsumexp(
            q_rows, k_base, k_mask_ptr + pid_k * k_mask_k if HAS_MASKS else k_mask_ptr, slope, keep_r, S, D, stride_ks,
            BLOCK_R, BLOCK_S, BLOCK_D, HAS_MASKS, PRECISION, has_k_mask,
        )  # fmt: skip
    lse = tl.where(dropped, float("-inf"), lse * LN2)
    tl.store(out_ptr + pid_k * R + offs_r, lse, mask=keep_r)
    if paired != 0:
        k_rows = k_base + offs_r.to(tl.int64)[:, None] * stride_ks
        dots = _paired_dots(q_rows, k_rows, keep_r & (offs_r < S), D, BLOCK_R, BLOCK_D)
        tl.store(pos_ptr + pid_k * R + offs_r, dots * tl.load(slope_ptr), mask=keep_r)
