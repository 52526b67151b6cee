"""exp_sums for Hopper, in Gluon: a tile of columns stays in shared memory while the rows stream past it.

A program of the Triton kernel loads both operands of every tile, 64 bytes a cycle for each processor at the full rate
of its tensor cores: more than L2 delivers. Here one producer warp loads ``y`` once and then boxes of ``x``;
two groups of four warps take alternate row tiles, so that one group's exponentials run while the other's matrix
products do.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Rows and columns of a tile, depth of a box of x and y, boxes of x in flight. H100, N = 8192, K = 4, D = 512, masked:
# 709 TFLOP/s; with 128 rows and 4 boxes 664; the Triton kernel 503 to 535.
BLOCK_M, BLOCK_C, BLOCK_D, STAGES = 64, 128, 64, 6
LARGEST_WIDTH = 512  # the columns' tile takes 128 KB of shared memory
BAND_ROWS = 4096  # of x at most for a program: they stay in L2 while the other programs of their band read them too
COLUMN_PARTS = 8  # sums over rows that a band writes: one for each consuming warp
WARPS = 4  # of a group; there are two groups and a producer


def takes(x: Tensor, y: Tensor, arch: int) -> bool:
    """Whether this kernel can read x [M, D] and y [K, C, D] on a device of compute capability ``arch``."""
    d = x.shape[1]
    fits = arch == 90 and x.element_size() == 2 and d % BLOCK_D == 0 and 0 < d <= LARGEST_WIDTH
    return fits and _slots(y) is not None


def _slots(y: Tensor) -> tuple[list[int], int, int] | None:
    """y [K, C, D] as one matrix: its shape, and how many rows and columns of it lie between slots;
    None if it is none.
    """
    (k, c, d), (stride_k, stride_c, _) = y.shape, y.stride()
    if k == 1:
        return [c, d], 0, 0
    if stride_k % stride_c == 0 and stride_k >= stride_c:
        return [(k - 1) * (stride_k // stride_c) + c, d], stride_k // stride_c, 0
    if d <= stride_k < stride_c:
        return [c, (k - 1) * stride_k + d], 0, stride_k
    return None


def launch(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    slope: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    first_tile: int,
    band_rows: int,
    rows: Tensor,
    columns: Tensor,
) -> None:
    """Write the sums of exp2(z - offset) of the column tiles first_tile..: rows [K, tiles, M], columns [bands * 8, K,
    C].

    ``band_rows`` is a multiple of BLOCK_M; the masks [M] and [K, C] are dense.
    """
    (m, d), (k, c, _) = x.shape, y.shape
    shape, rows_between, columns_between = _slots(y)
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], _DTYPES[x.dtype])
    exp_sums_resident[(rows.shape[1], triton.cdiv(m, band_rows), k)](
        TensorDescriptor(x, [m, d], [x.stride(0), 1], [BLOCK_M, BLOCK_D], layout),
        TensorDescriptor(y, shape, [y.stride(1), 1], [BLOCK_C, BLOCK_D], layout),
        x_mask,
        y_mask,
        scale,
        slope,
        rows,
        columns,
        m,
        c,
        first_tile,
        rows.shape[1],
        band_rows,
        rows_between,
        columns_between,
        DEPTHS=d // BLOCK_D,
        MASK_COLUMNS=y_mask is not None or c % BLOCK_C != 0,
        STAGES=STAGES,
        num_warps=WARPS,
    )


_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _slope_and_offset(scale_ptr, slope_ptr):
    """As slope_and_offset of logits_kernels, which Gluon cannot call."""
    bound = gl.abs(gl.load(scale_ptr)) * 1.4426950408889634
    return gl.load(slope_ptr) * 1.4426950408889634, gl.maximum(bound - 106.0, gl.minimum(0.0, 82.0 - bound))


@gluon.jit
def _produce(x, y, shared, first_c, first_d, first_m, tiles, DEPTHS: gl.constexpr):
    """Load the tile of y, then every box of x as soon as its place is free."""
    xs, ys, full, empty, y_full = shared
    STAGES: gl.constexpr = xs.shape[0]
    HALF: gl.constexpr = STAGES // 2  # each consumer has its own half of the ring
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_D: gl.constexpr = xs.shape[2]
    mbarrier.expect(y_full, y.block_type.nbytes * DEPTHS)
    for d in gl.static_range(DEPTHS):
        tma.async_copy_global_to_shared(y, [first_c, first_d + d * BLOCK_D], y_full, ys.index(d))
    for t in range(tiles):
        for j in range(DEPTHS):
            turn = (t // 2) * DEPTHS + j
            stage = (t % 2) * HALF + turn % HALF
            mbarrier.wait(empty.index(stage), ((turn // HALF) & 1) ^ 1)
            mbarrier.expect(full.index(stage), x.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [first_m + t * BLOCK_M, j * BLOCK_D], full.index(stage), xs.index(stage))


@gluon.jit
def _store_columns(columns, col_ptr, col_stride, first_c, stop_c):
    """The sums over rows [BLOCK_M // 16, 8, BLOCK_C]: over a thread's own, then over lanes; the four warps' apart,
    without an exchange through shared memory."""
    ROWS: gl.constexpr = columns.shape[0]
    BLOCK_C: gl.constexpr = columns.shape[2]
    sums = gl.sum(gl.sum(gl.reshape(columns, (ROWS // 4, 4, 8, BLOCK_C)), 0), 1)
    layout_wc: gl.constexpr = sums.type.layout
    warps = gl.arange(0, 4, layout=gl.SliceLayout(1, layout_wc))
    offs_c = first_c + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, layout_wc))
    places = gl.expand_dims(warps, 1).to(gl.int64) * col_stride + gl.expand_dims(offs_c, 0)
    gl.store(col_ptr + places, sums, mask=gl.expand_dims(offs_c, 0) < stop_c)


@gluon.jit
def _store_column_mask(ones, far, first_c, C, y_mask_ptr, slot, slope):
    """The operands of one more product, 1 times 0 or -inf, which drops columns beyond C and those that a mask drops."""
    BLOCK_M: gl.constexpr = ones.shape[0]
    BLOCK_C: gl.constexpr = far.shape[0]
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    offs = first_c + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(1, flat))
    keep = offs < C
    if y_mask_ptr is not None:
        keep = keep & (gl.load(y_mask_ptr + slot.to(gl.int64) * C + offs, mask=keep, other=0) != 0)
    away = gl.where(slope < 0, float("inf"), float("-inf"))
    values = gl.expand_dims(gl.where(keep, 0.0, away), 1) + gl.zeros([BLOCK_C, 16], gl.float32, flat)
    far.store(values.to(far.dtype))
    ones.store(gl.full([BLOCK_M, 16], 1.0, ones.dtype, flat))
    fence_async_shared()


@gluon.jit
def _consume(
    which,
    shared,
    drops,
    exponents,
    x_mask_ptr,
    row_ptr,
    col_ptr,
    col_stride,
    area,
    DEPTHS: gl.constexpr,
    MASK_COLUMNS: gl.constexpr,
):
    """The row tiles which, which + 2, ..: their logits, both sums of exp2(z - offset)."""
    xs, ys, full, empty, y_full = shared
    ones, far = drops
    slope, offset = exponents
    first_m, tiles, M, first_c, stop_c = area
    STAGES: gl.constexpr = xs.shape[0]
    HALF: gl.constexpr = STAGES // 2
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_C: gl.constexpr = ys.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_C, 16])
    # Rows r and r + 8 of a tile lie in one thread, so this partial sum over rows needs no exchange of lanes.
    columns = gl.sum(gl.reshape(gl.zeros([BLOCK_M, BLOCK_C], gl.float32, layout), (BLOCK_M // 16, 2, 8, BLOCK_C)), 1)
    mbarrier.wait(y_full, 0)
    for t in range(which, tiles, 2):
        first = (t // 2) * DEPTHS
        acc = gl.zeros([BLOCK_M, BLOCK_C], gl.float32, layout)
        for j in range(DEPTHS):
            stage = which * HALF + (first + j) % HALF
            mbarrier.wait(full.index(stage), ((first + j) // HALF) & 1)
            token = warpgroup_mma(xs.index(stage), ys.index(j).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(empty.index(which * HALF + (first + j + HALF - 1) % HALF), count=1, pred=j > 0)
        if MASK_COLUMNS:  # dropped columns come to minus infinity by one more product of depth 16
            acc = warpgroup_mma(ones, far.permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(which * HALF + (first + DEPTHS - 1) % HALF), count=1)
        offs_m = first_m + t * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        keep_m = offs_m < M
        if x_mask_ptr is not None:
            keep_m = keep_m & (gl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
        # A dropped row has an infinite offset.
        e = gl.exp2(acc * slope - gl.expand_dims(gl.where(keep_m, offset, float("inf")), 1))
        gl.store(row_ptr + offs_m, gl.sum(e, 1), mask=offs_m < M)
        columns += gl.sum(gl.reshape(e, (BLOCK_M // 16, 2, 8, BLOCK_C)), 1)
    _store_columns(columns, col_ptr, col_stride, first_c, stop_c)


@gluon.jit(
    do_not_specialize=["M", "C", "first_tile", "row_tiles_stride", "band_rows", "rows_between", "columns_between"]
)
def exp_sums_resident(
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
    first_tile,
    row_tiles_stride,
    band_rows,
    rows_between,
    columns_between,
    DEPTHS: gl.constexpr,
    MASK_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sums of e = exp2(z - offset): row [K, tiles, M] of each column tile, col [bands, 8, K, C] of each band and warp.

    x [M, D] and y, a matrix of all slots, are descriptors of boxes [BLOCK_M, BLOCK_D] and [BLOCK_C, BLOCK_D].
    Grid (tiles, bands, K).
    """
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_C: gl.constexpr = y.block_type.shape[0]
    band, slot = gl.program_id(1), gl.program_id(2)
    xs = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)  # noqa: RUF005 - Gluon has no star
    ys = gl.allocate_shared_memory(y.dtype, [DEPTHS] + y.block_type.shape, y.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    y_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    thin: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    ones = gl.allocate_shared_memory(x.dtype, [BLOCK_M, 16], thin)
    far = gl.allocate_shared_memory(x.dtype, [BLOCK_C, 16], thin)
    slope, offset = _slope_and_offset(scale_ptr, slope_ptr)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(y_full, count=1)
    first_c = (first_tile + gl.program_id(0)) * BLOCK_C
    if MASK_COLUMNS:
        _store_column_mask(ones, far, first_c, C, y_mask_ptr, slot, slope)
    first_m = band * band_rows
    tiles = (gl.minimum(band_rows, M - first_m) + BLOCK_M - 1) // BLOCK_M
    row = row_ptr + (slot.to(gl.int64) * row_tiles_stride + gl.program_id(0)) * M
    col_stride = gl.num_programs(2).to(gl.int64) * C
    col = col_ptr + band.to(gl.int64) * 8 * col_stride + slot.to(gl.int64) * C
    shared, drops, exponents = (xs, ys, full, empty, y_full), (ones, far), (slope, offset)
    area = (first_m, tiles, M, first_c, C)
    col_odd = col + 4 * col_stride
    slot_c, slot_d = slot * rows_between + first_c, slot * columns_between
    gl.warp_specialize(
        [
            (_consume, (0, shared, drops, exponents, x_mask_ptr, row, col, col_stride, area, DEPTHS, MASK_COLUMNS)),
            (_consume, (1, shared, drops, exponents, x_mask_ptr, row, col_odd, col_stride, area, DEPTHS, MASK_COLUMNS)),
            (_produce, (x, y, shared, slot_c, slot_d, first_m, tiles, DEPTHS)),
        ],
        [4, 1],
        [232, 24],
    )
