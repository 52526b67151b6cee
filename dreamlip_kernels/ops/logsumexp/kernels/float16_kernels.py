"""float32 features as float16 operands, a part of the Triton kernel ``vectors`` of bidirectional_logsumexp.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits_kernels import present

SMALLEST_DIVISOR = tl.constexpr(2.0**-126)


@triton.jit
def largest_of(largest_ptr, programs, BLOCK: tl.constexpr):
    """The largest of what so many programs wrote."""
    offs = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        largest = tl.maximum(largest, tl.load(largest_ptr + first + offs, mask=first + offs < programs, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def _power_of_two(largest):
    """The power of two just not above a number, at least 2^-126: the bits of its exponent."""
    bits = tl.maximum(largest, SMALLEST_DIVISOR).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _rows(v_ptr, strides, mask_ptr, sizes, block, BLOCK_R: tl.constexpr):
    """Numbers of a block's rows of v [K, C, D], which are present, and their addresses."""
    stride_k, stride_c, _ = strides
    K, C, _ = sizes
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    slot, row = offs_r // C, offs_r % C
    return offs_r, present(offs_r, K * C, mask_ptr), v_ptr + slot.to(tl.int64) * stride_k + row.to(tl.int64) * stride_c


@triton.jit
def _largest_feature(v_ptr, strides, mask_ptr, sizes, first, step, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The largest element of v [K, C, D] that a mask keeps, in every ``step``-th block of rows from ``first`` on."""
    K, C, D = sizes
    largest = tl.zeros((BLOCK_R,), tl.float32)
    for block in range(first, tl.cdiv(K * C, BLOCK_R), step):
        _, keep_r, rows = _rows(v_ptr, strides, mask_ptr, sizes, block, BLOCK_R)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            inside = keep_r[:, None] & (offs_d < D)[None, :]
            v = tl.load(rows[:, None] + offs_d.to(tl.int64)[None, :] * strides[2], mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    return tl.max(largest, 0)


@triton.jit
def _store_float16(
    out_ptr, v_ptr, strides, mask_ptr, sizes, width, divisor, block, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out [K, C, width] = v / divisor of a block of rows, zeros in rows that a mask drops and beyond D."""
    K, C, D = sizes
    offs_r, keep_r, rows = _rows(v_ptr, strides, mask_ptr, sizes, block, BLOCK_R)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        inside = keep_r[:, None] & (offs_d < D)[None, :]
        v = tl.load(rows[:, None] + offs_d.to(tl.int64)[None, :] * strides[2], mask=inside, other=0.0)
        to = out_ptr + offs_r.to(tl.int64)[:, None] * width + offs_d[None, :]
        tl.store(to, tl.div_rn(v, divisor).to(tl.float16), mask=(offs_r < K * C)[:, None] & (offs_d < width)[None, :])


@triton.jit
def make_float16(
    writes,
    x_side,
    y_side,
    sizes,
    numbers,
    largest_ptr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Unless it ``writes``: each program's largest feature, x's programs before y's.

    Else, one program for each block of rows: x / divisor and y / divisor in float16, and the numbers that belong to
    them."""
    x_ptr, x_strides, x_mask_ptr, x_out_ptr, x_programs = x_side
    y_ptr, y_strides, y_mask_ptr, y_out_ptr, y_programs = y_side
    M, C, K, D, width = sizes
    pid = tl.program_id(0)
    if writes:
        x_divisor = _power_of_two(largest_of(largest_ptr, x_programs, BLOCK))
        y_divisor = _power_of_two(largest_of(largest_ptr + x_programs, y_programs, BLOCK))
        y_block = pid - tl.cdiv(M, BLOCK_R)
        if y_block < 0:
            _store_float16(x_out_ptr, x_ptr, x_strides, x_mask_ptr, (1, M, D), width, x_divisor, pid, BLOCK_R, BLOCK_D)
        else:
            _store_float16(
                y_out_ptr, y_ptr, y_strides, y_mask_ptr, (K, C, D), width, y_divisor, y_block, BLOCK_R, BLOCK_D
            )
        if pid == 0:
            numbers_ptr, scale_ptr = numbers
            scale = tl.load(scale_ptr)
            tl.store(numbers_ptr, x_divisor)
            tl.store(numbers_ptr + 4, y_divisor)
            tl.store(numbers_ptr + 8, scale * x_divisor)
            tl.store(numbers_ptr + 12, scale * y_divisor)
            tl.store(numbers_ptr + 16, scale * x_divisor * y_divisor)
    elif pid < x_programs:
        largest = _largest_feature(x_ptr, x_strides, x_mask_ptr, (1, M, D), pid, x_programs, BLOCK_R, BLOCK_D)
        tl.store(largest_ptr + pid, largest)
    else:
        first = pid - x_programs
        largest = _largest_feature(y_ptr, y_strides, y_mask_ptr, (K, C, D), first, y_programs, BLOCK_R, BLOCK_D)
        tl.store(largest_ptr + pid, largest)
