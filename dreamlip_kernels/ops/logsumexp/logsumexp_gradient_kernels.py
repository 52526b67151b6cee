"""The tiles of G, the gradient's coefficients of the pairs, as a Triton kernel of bidirectional_logsumexp.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logsumexp_kernels import drop_columns, slope_and_offset, x_tile, y_tile


@triton.jit
def _gradient_of(
    tile,
    x,
    y,
    x_mask_ptr,
    y_mask_ptr,
    scale_ptr,
    slope_ptr,
    row_ptr,
    col_ptr,
    g_ptr,
    M,
    C,
    K,
    D,
    stride_x,
    stride_yk,
    stride_y,
    first_slot,
    first_row,
    first_col,
    rows,
    col_octets,
    slot_octets,
    pitch,
    diagonal,
    first_pair,
    stop_pair,
    EXACT: tl.constexpr,
    HAS_X_MASK: tl.constexpr,
    HAS_Y_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """One tile of gradient_tile's G."""
    ELEMENT: tl.constexpr = x.dtype if DESCRIPTOR else x.dtype.element_ty
    cols = col_octets * 8  # said so, that stores are 16 bytes wide
    across, down = tl.cdiv(cols, BLOCK_C), tl.cdiv(rows, BLOCK_M)
    place_k = tile // (across * down)
    tile_m, tile_c = tile % (across * down) // across, tile % across
    slot = first_slot + place_k
    first_m = first_row + tile_m * BLOCK_M
    first_c = first_col + tile_c * BLOCK_C
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_part = x_tile(x, stride_x, first_m, M, d, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
        y_part = y_tile(y, stride_yk, stride_y, slot, first_c, C, d, D, BLOCK_C, BLOCK_D, DESCRIPTOR)
        acc = tl.dot(x_part, y_part.T, acc, input_precision=PRECISION)
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    if HAS_Y_MASK:
        y_mask_ptr += slot.to(tl.int64) * C
    if HAS_Y_MASK and not EXACT:
        kept = first_c + tl.arange(0, BLOCK_C)  # in a layout of its own, which the tile's columns below need not share
        keep_c = tl.load(y_mask_ptr + kept, mask=kept < C, other=0) != 0
        acc = drop_columns(acc, keep_c, slope, BLOCK_M, BLOCK_C, ELEMENT)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    keep_m = offs_m < M
    inside_c = offs_c < C
    if HAS_X_MASK:
        keep_m = keep_m & (tl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
    row_ptr += slot.to(tl.int64) * M
    col_ptr += slot.to(tl.int64) * C
    if not EXACT:
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        r = tl.load(row_ptr + offs_m, mask=keep_m, other=0.0)
        c = tl.load(col_ptr + offs_c, mask=inside_c, other=0.0)
        g = e * (r[:, None] + c[None, :])
    else:
        z = acc * slope
        all_m, all_c = K.to(tl.int64) * M, K.to(tl.int64) * C
        row = tl.load(row_ptr + all_m + offs_m, mask=keep_m, other=float("inf"))
        col = tl.load(col_ptr + all_c + offs_c, mask=inside_c, other=float("inf"))
        a = tl.load(row_ptr + 2 * all_m + offs_m, mask=keep_m, other=0.0)
        b = tl.load(col_ptr + 2 * all_c + offs_c, mask=inside_c, other=0.0)
        g = tl.exp2(z - row[:, None]) * a[:, None] + tl.exp2(z - col[None, :]) * b[None, :]
        g = tl.where(keep_m[:, None], g, 0.0)
        if HAS_Y_MASK:
            g = tl.where((tl.load(y_mask_ptr + offs_c, mask=inside_c, other=0) != 0)[None, :], g, 0.0)
    meets_diagonal = (first_m < first_c + diagonal + BLOCK_C) & (first_c + diagonal < first_m + BLOCK_M)
    if meets_diagonal | (
        first_c + BLOCK_C > C
    ):  # positives are added in float32 later; beyond C are columns of padding
        partner = tl.where((offs_c >= first_pair) & (offs_c < stop_pair), offs_c + diagonal, -1)
        g = tl.where((offs_m[:, None] == partner[None, :]) | (offs_c >= C)[None, :], 0.0, g)
    place_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    place_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place_m < rows)[:, None] & (place_c < cols)[None, :]
    base = g_ptr + place_k.to(tl.int64) * (slot_octets * 8)
    tl.store(base + place_m.to(tl.int64)[:, None] * pitch + place_c[None, :], g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "M", "C", "K", "slots", "first_slot", "first_row", "first_col", "rows", "col_octets", "slot_octets", "diagonal",
        "first_pair", "stop_pair",
    ]
)  # fmt: skip
def gradient_tile(
    flag_ptr,
    x,
    y,
    x_mask_ptr,
    y_mask_ptr,
    scale_ptr,
    slope_ptr,
    row_ptr,
    col_ptr,
    g_ptr,
    M,
    C,
    K,
    D,
    stride_x,
    stride_yk,
    stride_y,
    slots,
    first_slot,
    first_row,
    first_col,
    rows,
    col_octets,
    slot_octets,
    pitch,
    diagonal,
    first_pair,
    stop_pair,
    EXACT: tl.constexpr,
    HAS_X_MASK: tl.constexpr,
    HAS_Y_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """G [rows, slots, cols] = a exp(z - row) + b exp(z - col) of a chunk, rounded once; the pairs (diagonal + j, j),
    first_pair <= j < stop_pair, are left 0.

    Columns are counted in octets; rows of G are ``pitch`` columns apart and slots ``slot_octets``. row_ptr and col_ptr
    are what ``coefficients`` wrote: of exp2(z - offset), one exp2 a pair, or for EXACT the log-sum-exps and the
    upstream, two exp2, always in range. Both are launched; the flag says which runs. A program makes one tile; of
    EXACT, which as a rule has nothing to do, few programs make many: thousands that only read the flag would be waited
    for."""
    if (tl.load(flag_ptr) != 0) != EXACT:
        return
    if EXACT:
        tiles = slots * tl.cdiv(col_octets * 8, BLOCK_C) * tl.cdiv(rows, BLOCK_M)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
            _gradient_of(
                tile, x, y, x_mask_ptr, y_mask_ptr, scale_ptr, slope_ptr, row_ptr, col_ptr, g_ptr,
                M, C, K, D, stride_x, stride_yk, stride_y,
                first_slot, first_row, first_col, rows, col_octets, slot_octets, pitch, diagonal, first_pair, stop_pair,
                EXACT, HAS_X_MASK, HAS_Y_MASK, BLOCK_M, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTOR,
            )  # fmt: skip
    else:
        _gradient_of(
            tl.program_id(0), x, y, x_mask_ptr, y_mask_ptr, scale_ptr, slope_ptr, row_ptr, col_ptr, g_ptr,
            M, C, K, D, stride_x, stride_yk, stride_y,
            first_slot, first_row, first_col, rows, col_octets, slot_octets, pitch, diagonal, first_pair, stop_pair,
            EXACT, HAS_X_MASK, HAS_Y_MASK, BLOCK_M, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTOR,
        )  # fmt: skip
