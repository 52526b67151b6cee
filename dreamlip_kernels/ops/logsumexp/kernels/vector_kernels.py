"""What surrounds the products, as Triton kernels: float16 operands and the coefficients of G before them, scales and
positives after.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .float16_kernels import largest_of, make_float16
from .logits_kernels import LARGEST_SUM, LOG2E, SMALLEST_SUM, slope_and_offset

# The largest coefficient is brought below 2^14: a row's and a column's together stay within float16.
GRADIENT_EXPONENT = tl.constexpr(13.0)
LARGEST_FEATURE, FLOAT16, LARGEST_UPSTREAM, COEFFICIENTS = range(4)  # phases of ``vectors``


@triton.jit
def _upstream(lse_ptr, upstream_ptr, offs, inside):
    """Log-sum-exps in powers of two and their upstream.

    One without a logit is +inf and has no gradient, whatever its upstream.
    """
    lse = tl.load(lse_ptr + offs, mask=inside, other=float("-inf")) * LOG2E
    upstream = tl.load(upstream_ptr + offs, mask=inside, other=0.0)
    empty = lse == float("-inf")
    return tl.where(empty, float("inf"), lse), tl.where(empty, 0.0, upstream)


@triton.jit
def _divisor(largest_ptr, programs, BLOCK: tl.constexpr):
    """The power of two that G was divided by, from every program's largest upstream."""
    top = largest_of(largest_ptr, programs, BLOCK)
    return tl.where(top > 0, tl.exp2(tl.floor(tl.log2(top)) - GRADIENT_EXPONENT), 1.0)


@triton.jit
def _store_coefficients(out_ptr, flag_ptr, lse, upstream, divisor, offset, offs, inside, total):
    """The three vectors that gradient_tile reads, and the flag where exp2(z - offset) can't serve one of them."""
    log_sum = lse - offset
    right = ((log_sum >= SMALLEST_SUM) & (log_sum <= LARGEST_SUM)) | (lse == float("inf"))
    scaled = upstream / divisor
    tl.store(out_ptr + offs, scaled * tl.exp2(offset - lse), mask=inside)
    tl.store(out_ptr + total + offs, lse, mask=inside)
    tl.store(out_ptr + 2 * total + offs, scaled, mask=inside)
    tl.store(flag_ptr, 1, mask=tl.max((inside & (right == 0)).to(tl.int32), 0) != 0)


@triton.jit
def _make_coefficients(writes, ours, outs, exponents, largest_ptr, pairs, BLOCK: tl.constexpr):
    """The phases LARGEST_UPSTREAM and, where it ``writes``, COEFFICIENTS."""
    row_ptr, col_ptr, d_row_ptr, d_col_ptr, pos_ptr, d_pos_ptr = ours
    flag_ptr, divisor_ptr, rows_ptr, cols_ptr, own_ptr = outs
    scale_ptr, slope_ptr = exponents
    M, C, K, diagonal, first_pair, stop_pair = pairs
    pid = tl.program_id(0).to(tl.int64)
    row_programs = tl.cdiv(K * M, BLOCK)
    of_rows = pid < row_programs
    offs = tl.where(of_rows, pid, pid - row_programs) * BLOCK + tl.arange(0, BLOCK)
    total = K.to(tl.int64) * tl.where(of_rows, M, C)
    inside = offs < total
    if of_rows:
        lse, upstream = _upstream(row_ptr, d_row_ptr, offs, inside)
    else:
        lse, upstream = _upstream(col_ptr, d_col_ptr, offs, inside)
    if writes:
        slope, offset = slope_and_offset(scale_ptr, slope_ptr)
        divisor = _divisor(largest_ptr, tl.num_programs(0), BLOCK)
        tl.store(divisor_ptr, divisor, mask=pid == 0)
        tl.store(flag_ptr, 1, mask=(pid == 0) & (slope == 0))  # the infinity that drops a column would be NaN
        if of_rows:
            _store_coefficients(rows_ptr, flag_ptr, lse, upstream, divisor, offset, offs, inside, total)
        else:
            _store_coefficients(cols_ptr, flag_ptr, lse, upstream, divisor, offset, offs, inside, total)
            column = offs % C
            partner = column + diagonal
            paired = inside & (column >= first_pair) & (column < stop_pair) & (lse != float("inf"))
            row, d_row = _upstream(row_ptr, d_row_ptr, offs // C * M + partner, paired)
            z = tl.load(pos_ptr + offs, mask=paired, other=0.0) * LOG2E
            own = tl.exp2(z - row) * d_row + tl.exp2(z - lse) * upstream
            own += tl.load(d_pos_ptr + offs, mask=paired, other=0.0)
            tl.store(own_ptr + offs, tl.where(paired & (row != float("inf")), own, 0.0), mask=inside)
    else:
        tl.store(largest_ptr + pid, tl.max(tl.abs(upstream), 0))
        tl.store(flag_ptr, 0, mask=pid == 0)


VARY = ["phase", "M", "C", "K", "x_programs", "y_programs", "diagonal", "first_pair", "stop_pair"]


@triton.jit(do_not_specialize=VARY)
def vectors(
    phase,
    x_ptr,
    y_ptr,
    x_mask_ptr,
    y_mask_ptr,
    x_out_ptr,
    y_out_ptr,
    numbers_ptr,
    row_ptr,
    col_ptr,
    d_row_ptr,
    d_col_ptr,
    pos_ptr,
    d_pos_ptr,
    scale_ptr,
    slope_ptr,
    largest_ptr,
    flag_ptr,
    divisor_ptr,
    rows_ptr,
    cols_ptr,
    own_ptr,
    M,
    C,
    K,
    D,
    width,
    stride_x,
    stride_xd,
    stride_yk,
    stride_y,
    stride_yd,
    x_programs,
    y_programs,
    diagonal,
    first_pair,
    stop_pair,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the tiles read beside 16-bit features, in four phases; one kernel, for the sake of what a first step
    compiles. Of 16-bit features, whose pointers are None, there are the last two alone.

    LARGEST_FEATURE: of each program's part of x [M, D] and of y [K, C, D], float32, rows that a mask drops apart.
    FLOAT16: x and y over their divisors, the powers of two just not above those, rounded, [M, width] and [K, C,
    width], zeros where a mask drops; and numbers [5, 4], of which each first one counts: the two divisors, scale times
    each, and scale times both.
    LARGEST_UPSTREAM: of each program's part of the upstream of row [K, M] and col [K, C], and the flag lowered.
    COEFFICIENTS: the divisor of G, rows [3, K, M] and cols [3, K, C] (``_store_coefficients``), the flag raised where
    needed, and own [K, C]: the gradient of the logits of the pairs (diagonal + j, j), first_pair <= j < stop_pair,
    their share of both softmaxes and d_pos; elsewhere 0."""
    if phase < 2:  # of the features
        if x_ptr is not None:
            x_side = (x_ptr, (0, stride_x, stride_xd), x_mask_ptr, x_out_ptr, x_programs)
            y_side = (y_ptr, (stride_yk, stride_y, stride_yd), y_mask_ptr, y_out_ptr, y_programs)
            sizes, numbers = (M, C, K, D, width), (numbers_ptr, scale_ptr)
            make_float16(phase == 1, x_side, y_side, sizes, numbers, largest_ptr, BLOCK, BLOCK_R, BLOCK_D)
    else:
        ours = (row_ptr, col_ptr, d_row_ptr, d_col_ptr, pos_ptr, d_pos_ptr)
        outs = (flag_ptr, divisor_ptr, rows_ptr, cols_ptr, own_ptr)
        exponents, pairs = (scale_ptr, slope_ptr), (M, C, K, diagonal, first_pair, stop_pair)
        _make_coefficients(phase == 3, ours, outs, exponents, largest_ptr, pairs, BLOCK)


@triton.jit(do_not_specialize=["R", "V", "own_q", "own_t", "terms", "shift", "own_shift", "wants_dots"])
def finish_gradient(
    acc_ptr,
    v_ptr,
    own_ptr,
    self_ptr,
    divisor_ptr,
    scale_ptr,
    numbers_ptr,
    out_ptr,
    dots_ptr,
    R,
    V,
    D,
    acc_q,
    acc_r,
    v_t,
    v_r,
    self_q,
    self_r,
    out_q,
    out_r,
    own_q,
    own_t,
    terms,
    shift,
    own_shift,
    wants_dots,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[q, r] = *scale * t[q, r]; t[q, r] = *divisor * acc[q, r] + the sum of ``terms`` positives,
    own[q, t, r + own_shift] * v[t, r + shift].

    Where 0 <= r + shift < V: the gradients of a chunk's products, with their positives added in float32.
    ``wants_dots``: also each program's sum of t[q, r] . self[q, r], times both divisors where ``vectors`` wrote
    numbers: their total is the scale's gradient."""
    pid_q = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep_r = offs_r < R
    partner = offs_r + shift
    paired = keep_r & (partner >= 0) & (partner < V)
    own_base = own_ptr + pid_q * own_q + offs_r + own_shift
    divisor, scale = tl.load(divisor_ptr), tl.load(scale_ptr)
    dots = tl.zeros((BLOCK_R,), tl.float32)
    rows = offs_r.to(tl.int64)[:, None]
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        inside = keep_r[:, None] & keep_d
        t = tl.load(acc_ptr + pid_q * acc_q + rows * acc_r + offs_d[None, :], mask=inside, other=0.0) * divisor
        own_at = own_base
        v_at = v_ptr + partner.to(tl.int64)[:, None] * v_r + offs_d[None, :]
        for _ in range(0, terms):
            own = tl.load(own_at, mask=paired, other=0.0)
            t += own[:, None] * tl.load(v_at, mask=paired[:, None] & keep_d, other=0.0).to(tl.float32)
            own_at += own_t
            v_at += v_t
        if wants_dots != 0:
            own_rows = tl.load(self_ptr + pid_q * self_q + rows * self_r + offs_d[None, :], mask=inside, other=0.0)
            dots += tl.sum(t * own_rows.to(tl.float32), 1)
        out = out_ptr + pid_q * out_q + rows * out_r + offs_d[None, :]
        tl.store(out, (t * scale).to(out_ptr.dtype.element_ty), mask=inside)
    if wants_dots != 0:
        if numbers_ptr is not None:
            dots = dots * tl.load(numbers_ptr) * tl.load(numbers_ptr + 4)
        tl.store(dots_ptr + pid_q * tl.num_programs(0) + tl.program_id(0), tl.sum(dots, 0))
