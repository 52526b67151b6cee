"""Forward's pass over the pairs as a Triton kernel of bidirectional_logsumexp: both sums of the exponentials.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits_kernels import drop_columns, logits_tile, present, slope_and_offset, without_same_image


@triton.jit(do_not_specialize=["M", "C", "first_tile", "row_tiles_stride", "band_rows"])
def exp_sums(
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
    M,
    C,
    D,
    stride_x,
    stride_yk,
    stride_y,
    first_tile,
    row_tiles_stride,
    band_rows,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Sums of e = exp2(z - offset): row [K, tiles, M] of each column tile, col [bands, K, C] of each band of rows.

    With numbers of images [M] and [C], pairs of one image, a row's own too, are left out."""
    DTYPE: tl.constexpr = x.dtype if DESCRIPTOR else x.dtype.element_ty
    tile_c = first_tile + tl.program_id(0)
    pid_b = tl.program_id(1)
    pid_k = tl.program_id(2)
    first_c = tile_c * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    if y_mask_ptr is not None:
        y_mask_ptr += pid_k.to(tl.int64) * C
    keep_c = present(offs_c, C, y_mask_ptr)
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    # Rows r and r + 8 of a tile lie in one thread (wgmma and mma layouts), so this partial sum over rows needs no
    # exchange of lanes.
    columns = tl.zeros((BLOCK_M // 16, 8, BLOCK_C), tl.float32)
    stop = tl.minimum((pid_b + 1) * band_rows, M)
    for first_m in range(pid_b * band_rows, stop, BLOCK_M):
        acc = logits_tile(
            x, stride_x, y, stride_yk, stride_y, pid_k, first_m, first_c, M, C, D, BLOCK_M, BLOCK_C, BLOCK_D, DESCRIPTOR
        )
        if MASK_COLUMNS:
            acc = drop_columns(acc, keep_c, slope, DTYPE)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        keep_m = present(offs_m, M, x_mask_ptr)
        # A dropped row has an infinite offset: two registers a thread, where a mask of the tile would take one for each
        # element.
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        e = without_same_image(e, x_images_ptr, y_images_ptr, offs_m, offs_c, M, C)
        row = row_ptr + (pid_k.to(tl.int64) * row_tiles_stride + tl.program_id(0)) * M + offs_m
        tl.store(row, tl.sum(e, 1), mask=offs_m < M)
        columns += tl.sum(tl.reshape(e, (BLOCK_M // 16, 2, 8, BLOCK_C)), 1)
    sums = tl.sum(tl.sum(columns, 0), 0)
    tl.store(col_ptr + (pid_b.to(tl.int64) * tl.num_programs(2) + pid_k) * C + offs_c, sums, mask=offs_c < C)
