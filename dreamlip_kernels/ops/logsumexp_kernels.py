"""The Triton kernels of bidirectional_logsumexp: both sums in one pass, exact rows where those left fp32's range, and the gradient's coefficients.

M rows, C columns, K slots, D width. Operands are 16-bit, or float32 with PRECISION "tf32x3". Where DESCRIPTOR says so they come as tensor descriptors, which
Hopper's TMA reads, else as pointers, which Ampere's cp.async reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _x_tile(x, stride, first, M, d, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr):
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
def _y_tile(
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
def _drop_columns(acc, keep_c, slope, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ELEMENT: tl.constexpr):
    """acc, with slope * acc at minus infinity in the columns that are not kept (a slope of 0 is the caller's to avoid).

    By one more product of depth 16, ones times 0 or -inf: a mask spread over the tile's layout took 108 registers, and with them the second program on a
    processor.
    """
    ones = tl.full((BLOCK_M, 16), 1.0, ELEMENT)
    far = tl.where(keep_c, 0.0, tl.where(slope < 0, float("inf"), float("-inf"))).to(ELEMENT)
    return tl.dot(ones, far[:, None].broadcast_to(BLOCK_C, 16).T, acc, input_precision="tf32")


@triton.jit
def exp_sums(
    x, y, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr,
    M, C, D, stride_x, stride_yk, stride_y, first_tile, row_tiles_stride, band_rows,
    HAS_X_MASK: tl.constexpr, HAS_Y_MASK: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
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
    slope = tl.load(scale_ptr)
    offset = tl.load(scale_ptr + 1)
    # Rows r and r + 8 of a tile lie in one thread (wgmma and mma layouts), so this partial sum over rows needs no exchange of lanes.
    columns = tl.zeros((BLOCK_M // 16, 8, BLOCK_C), tl.float32)
    stop = tl.minimum((pid_b + 1) * band_rows, M)
    for first_m in range(pid_b * band_rows, stop, BLOCK_M):
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for d in range(0, D, BLOCK_D):
            x_tile = _x_tile(x, stride_x, first_m, M, d, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
            y_tile = _y_tile(y, stride_yk, stride_y, pid_k, first_c, C, d, D, BLOCK_C, BLOCK_D, DESCRIPTOR)
            acc = tl.dot(x_tile, y_tile.T, acc, input_precision=PRECISION)
        if MASK_COLUMNS:
            acc = _drop_columns(acc, keep_c, slope, BLOCK_M, BLOCK_C, ELEMENT)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        keep_m = offs_m < M
        if HAS_X_MASK:
            keep_m = keep_m & (tl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
        # A dropped row has an infinite offset: two registers a thread, where a mask of the tile would take one for each element.
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        row = row_ptr + (pid_k.to(tl.int64) * row_tiles_stride + tl.program_id(0)) * M + offs_m
        tl.store(row, tl.sum(e, 1), mask=offs_m < M)
        columns += tl.sum(tl.reshape(e, (BLOCK_M // 16, 2, 8, BLOCK_C)), 1)
    sums = tl.sum(tl.sum(columns, 0), 0)
    tl.store(col_ptr + (pid_b.to(tl.int64) * tl.num_programs(2) + pid_k) * C + offs_c, sums, mask=offs_c < C)


@triton.jit
def online_rows(
    flag_ptr, q_ptr, k_ptr, q_mask_ptr, k_mask_ptr, scale_ptr, out_ptr,
    R, S, D, stride_qk, stride_qr, stride_kk, stride_ks,
    q_mask_k, k_mask_k, HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[k, r] = logsumexp over s of slope * q[k, r] . k[k, s] with running maxima, for any finite input; nothing unless *flag_ptr."""
    if tl.load(flag_ptr) == 0:
        return
    pid_k = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep_r = offs_r < R
    offs_d = tl.arange(0, BLOCK_D)
    slope = tl.load(scale_ptr)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    q_rows = q_ptr + pid_k * stride_qk + offs_r.to(tl.int64)[:, None] * stride_qr
    for first_s in range(0, S, BLOCK_S):
        offs_s = first_s + tl.arange(0, BLOCK_S)
        keep_s = offs_s < S
        k_rows = k_ptr + pid_k * stride_kk + offs_s.to(tl.int64)[:, None] * stride_ks
        acc = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
        for d in range(0, D, BLOCK_D):
            keep_d = (d + offs_d < D)[None, :]
            q = tl.load(q_rows + (d + offs_d)[None, :], mask=keep_r[:, None] & keep_d, other=0.0)
            k = tl.load(k_rows + (d + offs_d)[None, :], mask=keep_s[:, None] & keep_d, other=0.0)
            acc = tl.dot(q, k.T, acc, input_precision=PRECISION)
        if HAS_K_MASK:
            keep_s = keep_s & (tl.load(k_mask_ptr + pid_k * k_mask_k + offs_s, mask=keep_s, other=0) != 0)
        z = tl.where(keep_s[None, :], acc * slope, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
        top = new_top
    out = (tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)) * 0.6931471805599453
    if HAS_Q_MASK:
        masked = tl.load(q_mask_ptr + pid_k * q_mask_k + offs_r, mask=keep_r, other=0) == 0
        out = tl.where(masked, float("-inf"), out)
    tl.store(out_ptr + pid_k * R + offs_r, out, mask=keep_r)


@triton.jit
def _gradient_of(
    tile_m, tile_c, x, y, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr, g_ptr,
    M, C, D, stride_x, stride_yk, stride_y, slot, first_row, first_col, rows, cols, diagonal,
    EXACT: tl.constexpr, HAS_X_MASK: tl.constexpr, HAS_Y_MASK: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """One tile of gradient_tile's G."""
    ELEMENT: tl.constexpr = x.dtype if DESCRIPTOR else x.dtype.element_ty
    first_m = first_row + tile_m * BLOCK_M
    first_c = first_col + tile_c * BLOCK_C
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_tile = _x_tile(x, stride_x, first_m, M, d, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
        y_tile = _y_tile(y, stride_yk, stride_y, slot, first_c, C, d, D, BLOCK_C, BLOCK_D, DESCRIPTOR)
        acc = tl.dot(x_tile, y_tile.T, acc, input_precision=PRECISION)
    slope = tl.load(scale_ptr)
    if HAS_Y_MASK and not EXACT:
        kept = first_c + tl.arange(0, BLOCK_C)  # in a layout of its own, which the tile's columns below need not share
        acc = _drop_columns(
            acc, tl.load(y_mask_ptr + kept, mask=kept < C, other=0) != 0, slope, BLOCK_M, BLOCK_C, ELEMENT
        )
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    keep_m = offs_m < M
    inside_c = offs_c < C
    if HAS_X_MASK:
        keep_m = keep_m & (tl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
    if not EXACT:
        offset = tl.load(scale_ptr + 1)
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        r = tl.load(row_ptr + offs_m, mask=keep_m, other=0.0)
        c = tl.load(col_ptr + offs_c, mask=inside_c, other=0.0)
        g = e * (r[:, None] + c[None, :])
    else:
        z = acc * slope
        row = tl.load(row_ptr + M + offs_m, mask=keep_m, other=float("inf"))
        col = tl.load(col_ptr + C + offs_c, mask=inside_c, other=float("inf"))
        a = tl.load(row_ptr + 2 * M + offs_m, mask=keep_m, other=0.0)
        b = tl.load(col_ptr + 2 * C + offs_c, mask=inside_c, other=0.0)
        g = tl.exp2(z - row[:, None]) * a[:, None] + tl.exp2(z - col[None, :]) * b[None, :]
        g = tl.where(keep_m[:, None], g, 0.0)
        if HAS_Y_MASK:
            g = tl.where((tl.load(y_mask_ptr + offs_c, mask=inside_c, other=0) != 0)[None, :], g, 0.0)
    if HAS_DIAGONAL:  # noqa: SIM102 - decided when compiling, the next when running
        if (first_m < first_c + diagonal + BLOCK_C) & (first_c + diagonal < first_m + BLOCK_M):
            g = tl.where(offs_m[:, None] == (offs_c + diagonal)[None, :], 0.0, g)
    place_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    place_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place_m < rows)[:, None] & (place_c < cols)[None, :]
    tl.store(g_ptr + place_m.to(tl.int64)[:, None] * cols + place_c[None, :], g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_tile(
    flag_ptr, x, y, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr, g_ptr,
    M, C, D, stride_x, stride_yk, stride_y, slot, first_row, first_col, rows, cols, diagonal,
    EXACT: tl.constexpr, HAS_X_MASK: tl.constexpr, HAS_Y_MASK: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """G [rows, cols] = a exp(z - row) + b exp(z - col) of one slot and chunk, rounded once; the pairs (diagonal + j, j) are left 0.

    row_ptr and col_ptr hold three vectors each, [3, M] and [3, C]: the coefficient of exp2(z - offset) (one exp2 a pair), and for EXACT
    the log-sum-exp in powers of two and the upstream gradient (two exp2, always in range). Both are launched; the flag says which runs. A program makes one
    tile; of EXACT, which as a rule has nothing to do, few programs make many: thousands that only read the flag would be waited for.
    """
    if (tl.load(flag_ptr) != 0) != EXACT:
        return
    across = tl.cdiv(cols, BLOCK_C)
    if EXACT:
        for tile in tl.range(tl.program_id(0), across * tl.cdiv(rows, BLOCK_M), tl.num_programs(0), disable_licm=True):
            _gradient_of(
                tile // across, tile % across, x, y, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr, g_ptr, M, C, D, stride_x, stride_yk, stride_y,
                slot, first_row, first_col, rows, cols, diagonal, EXACT, HAS_X_MASK, HAS_Y_MASK, HAS_DIAGONAL, BLOCK_M, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTOR,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _gradient_of(
            tile // across, tile % across, x, y, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr, g_ptr, M, C, D, stride_x, stride_yk, stride_y,
            slot, first_row, first_col, rows, cols, diagonal, EXACT, HAS_X_MASK, HAS_Y_MASK, HAS_DIAGONAL, BLOCK_M, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTOR,
        )  # fmt: skip
