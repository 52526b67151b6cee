"""The tiles of G, the gradient's coefficients of the pairs, as a Triton kernel of bidirectional_logsumexp.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits_kernels import drop_columns, logits_tile, present, slope_and_offset, without_same_image


@triton.jit
def _weighed(acc, slope, offset, row_ptr, col_ptr, offs_m, offs_c, keep_m, C):
    """exp2(z - offset) times the sum of the row's and the column's coefficient: one exp2 a pair."""
    e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
    r = tl.load(row_ptr + offs_m, mask=keep_m, other=0.0)
    c = tl.load(col_ptr + offs_c, mask=offs_c < C, other=0.0)
    return e * (r[:, None] + c[None, :])


@triton.jit
def _both_softmaxes(z, row_ptr, col_ptr, y_mask_ptr, offs_m, offs_c, keep_m, M, C, K):
    """The two softmaxes times their upstream: two exp2 a pair, always in range."""
    all_m, all_c = K.to(tl.int64) * M, K.to(tl.int64) * C
    inside_c = offs_c < C
    row = tl.load(row_ptr + all_m + offs_m, mask=keep_m, other=float("inf"))
    col = tl.load(col_ptr + all_c + offs_c, mask=inside_c, other=float("inf"))
    a = tl.load(row_ptr + 2 * all_m + offs_m, mask=keep_m, other=0.0)
    b = tl.load(col_ptr + 2 * all_c + offs_c, mask=inside_c, other=0.0)
    g = tl.exp2(z - row[:, None]) * a[:, None] + tl.exp2(z - col[None, :]) * b[None, :]
    g = tl.where(keep_m[:, None], g, 0.0)
    if y_mask_ptr is not None:
        keep_c = tl.load(y_mask_ptr + offs_c, mask=inside_c, other=0) != 0
        g = tl.where(keep_c[None, :], g, 0.0)
    return g


@triton.jit
def _gradient_of(acc, vectors, masks, slot, first_m, first_c, sizes, EXACT: tl.constexpr, DTYPE: tl.constexpr):
    """G of a tile's products acc, zero where a mask drops the row or the column, or both are of one image."""
    scale_ptr, slope_ptr, row_ptr, col_ptr = vectors
    x_mask_ptr, y_mask_ptr, x_images_ptr, y_images_ptr = masks
    M, C, K, _ = sizes
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    if y_mask_ptr is not None:
        y_mask_ptr += slot.to(tl.int64) * C
    if y_mask_ptr is not None and not EXACT:
        ours = first_c + tl.arange(0, acc.shape[1])  # in a layout of its own, which offs_c below need not share
        keep_c = tl.load(y_mask_ptr + ours, mask=ours < C, other=0) != 0
        acc = drop_columns(acc, keep_c, slope, DTYPE)
    offs_m = first_m + tl.arange(0, acc.shape[0])
    offs_c = first_c + tl.arange(0, acc.shape[1])
    keep_m = present(offs_m, M, x_mask_ptr)
    row_ptr += slot.to(tl.int64) * M
    col_ptr += slot.to(tl.int64) * C
    if EXACT:
        g = _both_softmaxes(acc * slope, row_ptr, col_ptr, y_mask_ptr, offs_m, offs_c, keep_m, M, C, K)
    else:
        g = _weighed(acc, slope, offset, row_ptr, col_ptr, offs_m, offs_c, keep_m, C)
    return without_same_image(g, x_images_ptr, y_images_ptr, offs_m, offs_c, M, C)


@triton.jit
def _without_pairs(g, first_m, first_c, C, diagonal, first_pair, stop_pair):
    """g with zeros at the positives, which are added in float32 later, and beyond C, where columns are padding."""
    meets_diagonal = (first_m < first_c + diagonal + g.shape[1]) & (first_c + diagonal < first_m + g.shape[0])
    if meets_diagonal | (first_c + g.shape[1] > C):
        offs_m = first_m + tl.arange(0, g.shape[0])
        offs_c = first_c + tl.arange(0, g.shape[1])
        partner = tl.where((offs_c >= first_pair) & (offs_c < stop_pair), offs_c + diagonal, -1)
        g = tl.where((offs_m[:, None] == partner[None, :]) | (offs_c >= C)[None, :], 0.0, g)
    return g


@triton.jit
def _store(g_ptr, g, place_m, place_c, rows, cols, pitch):
    """Write the part of g that lies inside G [rows, cols]."""
    offs_m = place_m + tl.arange(0, g.shape[0])
    offs_c = place_c + tl.arange(0, g.shape[1])
    inside = (offs_m < rows)[:, None] & (offs_c < cols)[None, :]
    at = g_ptr + offs_m.to(tl.int64)[:, None] * pitch + offs_c[None, :]
    tl.store(at, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _make_tile(
    tile,
    operands,
    vectors,
    masks,
    g_ptr,
    sizes,
    chunk,
    pairs,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Tile number ``tile`` of a chunk's G, slot by slot and row by row."""
    x, stride_x, y, stride_yk, stride_y = operands
    DTYPE: tl.constexpr = x.dtype if DESCRIPTOR else x.dtype.element_ty
    M, C, _, D = sizes
    first_slot, first_row, first_col, rows, cols, pitch = chunk
    diagonal, first_pair, stop_pair = pairs
    across, down = tl.cdiv(cols, BLOCK_C), tl.cdiv(rows, BLOCK_M)
    place_k = tile // (across * down)
    place_m = tile % (across * down) // across * BLOCK_M
    place_c = tile % across * BLOCK_C
    slot, first_m, first_c = first_slot + place_k, first_row + place_m, first_col + place_c
    acc = logits_tile(
        x, stride_x, y, stride_yk, stride_y, slot, first_m, first_c, M, C, D, BLOCK_M, BLOCK_C, BLOCK_D, DESCRIPTOR
    )
    g = _gradient_of(acc, vectors, masks, slot, first_m, first_c, sizes, EXACT, DTYPE)
    g = _without_pairs(g, first_m, first_c, C, diagonal, first_pair, stop_pair)
    _store(g_ptr + place_k.to(tl.int64) * cols, g, place_m, place_c, rows, cols, pitch)


VARY_BY_CHUNK = ["slots", "first_slot", "first_row", "first_col", "rows", "col_octets"]


@triton.jit(do_not_specialize=["M", "C", "K", *VARY_BY_CHUNK, "diagonal", "first_pair", "stop_pair"])
def gradient_tile(
    flag_ptr,
    x,
    y,
    x_mask_ptr,
    y_mask_ptr,
    x_images_ptr,
    y_images_ptr,
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
    pitch,
    diagonal,
    first_pair,
    stop_pair,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """G [rows, slots, cols] = a exp(z - row) + b exp(z - col) of a chunk, rounded once; the pairs (diagonal + j, j),
    first_pair <= j < stop_pair, are left 0, and those of one image.

    Columns are counted in octets; rows of G are ``pitch`` columns apart. row_ptr and col_ptr are what ``vectors``
    wrote: of exp2(z - offset), or for EXACT the log-sum-exps and the upstream. Both are launched; the flag says which
    runs. A program makes one tile; of EXACT, which as a rule has nothing to do, few programs make many: thousands that
    only read the flag would be waited for."""
    if (tl.load(flag_ptr) != 0) != EXACT:
        return
    cols = col_octets * 8  # said so, that stores are 16 bytes wide
    operands, vectors = (x, stride_x, y, stride_yk, stride_y), (scale_ptr, slope_ptr, row_ptr, col_ptr)
    masks = (x_mask_ptr, y_mask_ptr, x_images_ptr, y_images_ptr)
    sizes, pairs = (M, C, K, D), (diagonal, first_pair, stop_pair)
    chunk = (first_slot, first_row, first_col, rows, cols, pitch)
    first = tl.program_id(0)
    if EXACT:
        tiles = slots * tl.cdiv(cols, BLOCK_C) * tl.cdiv(rows, BLOCK_M)
        for t in tl.range(first, tiles, tl.num_programs(0), disable_licm=True):
            _make_tile(
                t, operands, vectors, masks, g_ptr, sizes, chunk, pairs, EXACT, BLOCK_M, BLOCK_C, BLOCK_D, DESCRIPTOR
            )
    else:
        _make_tile(
            first, operands, vectors, masks, g_ptr, sizes, chunk, pairs, EXACT, BLOCK_M, BLOCK_C, BLOCK_D, DESCRIPTOR
        )
