"""Backward's Triton kernels of bidirectional_logsumexp: the gradient's coefficients, its tiles, and what is left to do with its products.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logsumexp_kernels import LARGEST_SUM, LOG2E, SMALLEST_SUM, drop_columns, slope_and_offset, x_tile, y_tile

# The largest coefficient is brought below 2^14: a row's and a column's together stay within float16.
GRADIENT_EXPONENT = tl.constexpr(13.0)


@triton.jit
def _upstream(lse_ptr, upstream_ptr, offs, inside):
    """Log-sum-exps in powers of two and their upstream; one without a logit is +inf and has no gradient, whatever its upstream."""
    lse = tl.load(lse_ptr + offs, mask=inside, other=float("-inf")) * LOG2E
    upstream = tl.load(upstream_ptr + offs, mask=inside, other=0.0)
    empty = lse == float("-inf")
    return tl.where(empty, float("inf"), lse), tl.where(empty, 0.0, upstream)


@triton.jit
def _unit(largest_ptr, programs, BLOCK: tl.constexpr):
    """The power of two that G is in units of, from every program's largest upstream."""
    offs = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        largest = tl.maximum(largest, tl.load(largest_ptr + first + offs, mask=first + offs < programs, other=0.0))
    top = tl.max(largest, 0)
    return tl.where(top > 0, tl.exp2(tl.floor(tl.log2(top)) - GRADIENT_EXPONENT), 1.0)


@triton.jit
def _store_coefficients(out_ptr, flag_ptr, lse, upstream, unit, offset, offs, inside, total):
    """The three vectors that gradient_tile reads, and the flag where exp2(z - offset) can't serve one of them."""
    log_sum = lse - offset
    right = ((log_sum >= SMALLEST_SUM) & (log_sum <= LARGEST_SUM)) | (lse == float("inf"))
    scaled = upstream / unit
    tl.store(out_ptr + offs, scaled * tl.exp2(offset - lse), mask=inside)
    tl.store(out_ptr + total + offs, lse, mask=inside)
    tl.store(out_ptr + 2 * total + offs, scaled, mask=inside)
    tl.store(flag_ptr, 1, mask=tl.max((inside & (right == 0)).to(tl.int32), 0) != 0)


@triton.jit(do_not_specialize=["phase", "M", "C", "K", "diagonal", "first_pair", "stop_pair"])
def coefficients(
    phase,
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
    unit_ptr,
    rows_ptr,
    cols_ptr,
    own_ptr,
    M,
    C,
    K,
    diagonal,
    first_pair,
    stop_pair,
    BLOCK: tl.constexpr,
):
    """What gradient_tile needs of row and col, [K, M] and [K, C], and their upstream; and the whole gradient of each positive.

    Phase 0: the largest upstream of each program, and the flag lowered. Phase 1, by then complete: the unit of G, rows
    [3, K, M] and cols [3, K, C] (``_store_coefficients``), the flag raised where needed, and own [K, C]: the gradient of the
    logits of the pairs (diagonal + j, j), first_pair <= j < stop_pair, their share of both softmaxes and d_pos; elsewhere 0.
    One kernel, for the sake of what a first step compiles.
    """
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
    if phase == 0:
        tl.store(largest_ptr + pid, tl.max(tl.abs(upstream), 0))
        tl.store(flag_ptr, 0, mask=pid == 0)
        return
    slope, offset = slope_and_offset(scale_ptr, slope_ptr)
    unit = _unit(largest_ptr, tl.num_programs(0), BLOCK)
    tl.store(unit_ptr, unit, mask=pid == 0)
    tl.store(flag_ptr, 1, mask=(pid == 0) & (slope == 0))  # the infinity that drops a column would be NaN
    if of_rows:
        _store_coefficients(rows_ptr, flag_ptr, lse, upstream, unit, offset, offs, inside, total)
    else:
        _store_coefficients(cols_ptr, flag_ptr, lse, upstream, unit, offset, offs, inside, total)
        column = offs % C
        partner = column + diagonal
        paired = inside & (column >= first_pair) & (column < stop_pair) & (lse != float("inf"))
        row, d_row = _upstream(row_ptr, d_row_ptr, offs // C * M + partner, paired)
        z = tl.load(pos_ptr + offs, mask=paired, other=0.0) * LOG2E
        own = tl.exp2(z - row) * d_row + tl.exp2(z - lse) * upstream
        own += tl.load(d_pos_ptr + offs, mask=paired, other=0.0)
        tl.store(own_ptr + offs, tl.where(paired & (row != float("inf")), own, 0.0), mask=inside)


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
    """G [rows, slots, cols] = a exp(z - row) + b exp(z - col) of a chunk, rounded once; the pairs (diagonal + j, j), first_pair <= j < stop_pair, are left 0.

    Columns are counted in octets; rows of G are ``pitch`` columns apart and slots ``slot_octets``. row_ptr and col_ptr are what ``coefficients`` wrote: of
    exp2(z - offset), one exp2 a pair, or for EXACT the log-sum-exps and the upstream, two exp2, always in range. Both are
    launched; the flag says which runs. A program makes one tile; of EXACT, which as a rule has nothing to do, few programs
    make many: thousands that only read the flag would be waited for.
    """
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


@triton.jit(do_not_specialize=["R", "V", "own_q", "own_t", "terms", "shift", "own_shift", "wants_dots"])
def finish_gradient(
    acc_ptr,
    v_ptr,
    own_ptr,
    self_ptr,
    unit_ptr,
    scale_ptr,
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
    """out[q, r] = *scale * t[q, r],  t[q, r] = *unit * acc[q, r] + sum over t < terms of own[q, t, r + own_shift] * v[t, r + shift].

    Where 0 <= r + shift < V: the gradients of a chunk's products, with their positives added in float32. ``wants_dots``:
    also each program's sum of t[q, r] . self[q, r], whose total is the scale's gradient.
    """
    pid_q = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep_r = offs_r < R
    partner = offs_r + shift
    paired = keep_r & (partner >= 0) & (partner < V)
    own_base = own_ptr + pid_q * own_q + offs_r + own_shift
    unit, scale = tl.load(unit_ptr), tl.load(scale_ptr)
    dots = tl.zeros((BLOCK_R,), tl.float32)
    rows = offs_r.to(tl.int64)[:, None]
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        keep_d = (offs_d < D)[None, :]
        inside = keep_r[:, None] & keep_d
        t = tl.load(acc_ptr + pid_q * acc_q + rows * acc_r + offs_d[None, :], mask=inside, other=0.0) * unit
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
        tl.store(dots_ptr + pid_q * tl.num_programs(0) + tl.program_id(0), tl.sum(dots, 0))
