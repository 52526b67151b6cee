"""Pieces of bidirectional_logsumexp's Triton kernels: a tile of logits, its masks, and the offset of its exponentials.

M rows, C columns, K slots, D width. Operands are 16-bit, or float32, which is multiplied as three TF32 products. Where
DESCRIPTOR says so they come as tensor descriptors, which Hopper's TMA reads, else as pointers, which Ampere's cp.async
reads. Sizes that vary from call to call are not specialized on: another batch compiles nothing."""

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

    *scale_ptr bounds the logits of unit vectors; *slope_ptr has the divisors of float32 operands too.
    The offset nearest 0 rounds z least."""
    bound = tl.abs(tl.load(scale_ptr)) * LOG2E
    offset = tl.maximum(bound - LARGEST_TERM, tl.minimum(0.0, -bound - SMALLEST_SUM))
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
def logits_tile(
    x,
    stride_x,
    y,
    stride_yk,
    stride_y,
    slot,
    first_m,
    first_c,
    M,
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """x[first_m + m] . y[slot, first_c + c] as acc [BLOCK_M, BLOCK_C], float32 operands as three TF32 products."""
    DTYPE: tl.constexpr = x.dtype if DESCRIPTOR else x.dtype.element_ty
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == DTYPE else "tf32"  # of 16-bit operands it has no meaning
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_part = x_tile(x, stride_x, first_m, M, d, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
        y_part = y_tile(y, stride_yk, stride_y, slot, first_c, C, d, D, BLOCK_C, BLOCK_D, DESCRIPTOR)
        acc = tl.dot(x_part, y_part.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def present(offs, count, mask_ptr):
    """Which of ``offs`` lie below ``count`` and are not masked."""
    keep = offs < count
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + offs, mask=keep, other=0) != 0)
    return keep


@triton.jit
def without_same_image(v, x_images_ptr, y_images_ptr, offs_m, offs_c, M, C):
    """v of a tile's pairs, 0 where row and column are of one image, if there are numbers of images."""
    if x_images_ptr is not None:
        x_image = tl.load(x_images_ptr + offs_m, mask=offs_m < M, other=-1)
        y_image = tl.load(y_images_ptr + offs_c, mask=offs_c < C, other=-2)
        v = tl.where(x_image[:, None] == y_image[None, :], 0.0, v)
    return v


@triton.jit
def drop_columns(acc, keep_c, slope, DTYPE: tl.constexpr):
    """acc, with slope * acc at minus infinity in the columns that are not kept (a slope of 0 is the caller's to avoid).

    By one more product of depth 16, ones times 0 or -inf: a mask spread over the tile's layout took 108 registers, and
    with them the second program on a processor."""
    ones = tl.full((acc.shape[0], 16), 1.0, DTYPE)
    far = tl.where(keep_c, 0.0, tl.where(slope < 0, float("inf"), float("-inf"))).to(DTYPE)
    return tl.dot(ones, far[:, None].broadcast_to(acc.shape[1], 16).T, acc, input_precision="tf32")
