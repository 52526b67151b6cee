"""Triton backend of bidirectional_logsumexp: one pass over the pairs forward, one recompute and two GEMMs backward.

    forward   exp_sums (a band of rows x one column tile, both sums of exp2(z - offset) in one pass) -> logs -> online_rows where sums left fp32's range
    backward  for each chunk of pairs: gradient_tile (z again, one exp2 a pair, 16-bit G) -> dx += G y, dy += G.T x (cuBLAS, fp32 accumulation)

A fixed exponent offset in place of running maxima makes row and column sums plain adds. z is at most scale for unit vectors, so the
offset ``scale - 106`` (in powers of two) puts the largest term at 2^106 and keeps sums of up to 2^20 of them in range; sums below
2^-82 or beyond 2^126 raise a flag on the device, and kernels that are always launched and otherwise exit at once recompute exactly.

M rows, C columns, K slots, D width. Kernels compute in 16 bits: bfloat16 inputs as they are, float32 inputs as float16 after a
power-of-two scaling (unit vectors cannot overflow, and float16's rounding is 8 times finer).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
HEADROOM = 106.0  # binary exponent of the largest possible term of a sum
SMALLEST_SUM, LARGEST_SUM = 2.0**-82, 2.0**126
WORKSPACE_BYTES = 2**29  # bound of the row partials forward and of the chunk of G backward
GRADIENT_EXPONENT = 14  # |G| is scaled up to 2^14: float16 then holds it normally down to 2^-28 of the largest


@triton.jit
def exp_sums(
    x_desc, y_desc, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr,
    M, C, D, first_tile, row_tiles_stride, band_rows,
    HAS_X_MASK: tl.constexpr, HAS_Y_MASK: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of e = exp2(z - offset): row [K, tiles, M] of each column tile, col [bands, K, C] of each band of rows."""
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
            x = x_desc.load([first_m, d])  # [BLOCK_M, BLOCK_D]
            y = y_desc.load([pid_k, first_c, d]).reshape(BLOCK_C, BLOCK_D)
            acc = tl.dot(x, y.T, acc)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        keep_m = offs_m < M
        if HAS_X_MASK:
            keep_m = keep_m & (tl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
        # A dropped row has an infinite offset: two registers a thread, where a mask of the tile would take one for each element.
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        if MASK_COLUMNS:
            e = tl.where(keep_c[None, :], e, 0.0)
        row = row_ptr + (pid_k.to(tl.int64) * row_tiles_stride + tl.program_id(0)) * M + offs_m
        tl.store(row, tl.sum(e, 1), mask=offs_m < M)
        columns += tl.sum(tl.reshape(e, (BLOCK_M // 16, 2, 8, BLOCK_C)), 1)
    sums = tl.sum(tl.sum(columns, 0), 0)
    if HAS_Y_MASK:
        sums = tl.where(keep_c, sums, 0.0)
    tl.store(col_ptr + (pid_b.to(tl.int64) * tl.num_programs(2) + pid_k) * C + offs_c, sums, mask=offs_c < C)


@triton.jit
def online_rows(
    flag_ptr, q_ptr, k_ptr, q_mask_ptr, k_mask_ptr, scale_ptr, out_ptr,
    R, S, D, stride_qk, stride_qr, stride_kk, stride_ks,
    q_mask_k, k_mask_k, HAS_Q_MASK: tl.constexpr, HAS_K_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
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
            acc = tl.dot(q, k.T, acc)
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
def gradient_tile(
    flag_ptr, x_desc, y_desc, x_mask_ptr, y_mask_ptr, scale_ptr, row_ptr, col_ptr, g_ptr,
    M, C, D, slot, first_row, first_col, rows, cols, diagonal,
    EXACT: tl.constexpr, HAS_X_MASK: tl.constexpr, HAS_Y_MASK: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """G [rows, cols] = a exp(z - row) + b exp(z - col) of one slot and chunk, rounded once; the pairs (diagonal + j, j) are left 0.

    row_ptr and col_ptr hold three vectors each, [3, M] and [3, C]: the coefficient of exp2(z - offset) (one exp2 a pair), and for EXACT
    the log-sum-exp in powers of two and the upstream gradient (two exp2, always in range). Both are launched; the flag says which runs.
    """
    if (tl.load(flag_ptr) != 0) != EXACT:
        return
    first_m = first_row + tl.program_id(1) * BLOCK_M
    first_c = first_col + tl.program_id(0) * BLOCK_C
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        x = x_desc.load([first_m, d])
        y = y_desc.load([slot, first_c, d]).reshape(BLOCK_C, BLOCK_D)
        acc = tl.dot(x, y.T, acc)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    keep_m = offs_m < M
    keep_c = offs_c < C
    if HAS_X_MASK:
        keep_m = keep_m & (tl.load(x_mask_ptr + offs_m, mask=keep_m, other=0) != 0)
    if HAS_Y_MASK:
        keep_c = keep_c & (tl.load(y_mask_ptr + offs_c, mask=keep_c, other=0) != 0)
    slope = tl.load(scale_ptr)
    if not EXACT:
        offset = tl.load(scale_ptr + 1)
        e = tl.exp2(acc * slope - tl.where(keep_m, offset, float("inf"))[:, None])
        r = tl.load(row_ptr + offs_m, mask=keep_m, other=0.0)
        c = tl.load(col_ptr + offs_c, mask=keep_c, other=0.0)
        g = e * (r[:, None] + c[None, :])
    else:
        z = acc * slope
        row = tl.load(row_ptr + M + offs_m, mask=keep_m, other=float("inf"))
        col = tl.load(col_ptr + C + offs_c, mask=keep_c, other=float("inf"))
        a = tl.load(row_ptr + 2 * M + offs_m, mask=keep_m, other=0.0)
        b = tl.load(col_ptr + 2 * C + offs_c, mask=keep_c, other=0.0)
        g = tl.exp2(z - row[:, None]) * a[:, None] + tl.exp2(z - col[None, :]) * b[None, :]
        g = tl.where(keep_m[:, None], g, 0.0)
    if HAS_Y_MASK:
        g = tl.where(keep_c[None, :], g, 0.0)
    if HAS_DIAGONAL:  # noqa: SIM102 - decided when compiling, the next when running
        if (first_m < first_c + diagonal + BLOCK_C) & (first_c + diagonal < first_m + BLOCK_M):
            g = tl.where(offs_m[:, None] == (offs_c + diagonal)[None, :], 0.0, g)
    place_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place_m < rows)[:, None] & (place_c < cols)[None, :]
    tl.store(g_ptr + place_m.to(tl.int64)[:, None] * cols + place_c[None, :], g.to(g_ptr.dtype.element_ty), mask=inside)


class Operands:
    """x and y as the kernels read them: 16-bit, D padded to TMA's 16 bytes, and the factors that undo float16's power-of-two scaling."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor):
        self.x, self.x_unit = _sixteen_bit(x)
        self.y, self.y_unit = _sixteen_bit(y)
        self.scale = scale
        slope = scale * self.x_unit * self.y_unit * LOG2E
        # The offset bounds scale * x . y for unit vectors; others are caught by the flag.
        self.slope_and_offset = torch.stack([slope, scale.abs() * LOG2E - HEADROOM])


def _sixteen_bit(v: Tensor) -> tuple[Tensor, Tensor]:
    """(16-bit v / unit with D a multiple of 8 and contiguous, unit): unit is a power of two on the device, 1 for 16-bit inputs."""
    unit = v.new_ones((), dtype=torch.float32)
    if v.dtype == torch.float32:
        largest = v.abs().amax() if v.numel() else unit
        unit = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)
        v = (v / unit).half()
    d = v.shape[-1]
    aligned = v.stride(-1) == 1 and v.data_ptr() % 16 == 0 and all(s % 8 == 0 and s > 0 for s in v.stride()[:-1]) and d % 8 == 0
    if not aligned:
        padded = v.new_zeros(*v.shape[:-1], -(-d // 8) * 8)
        padded[..., :d] = v
        v = padded
    return v, unit


def forward(x: Tensor, y: Tensor, scale: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """row [K, M] and col [K, C], float32."""
    m, (k, c, _) = x.shape[0], y.shape
    if m == 0 or c == 0 or k == 0:
        return x.new_full((k, m), -torch.inf, dtype=torch.float32), x.new_full((k, c), -torch.inf, dtype=torch.float32)
    y_mask = None if y_mask is None else y_mask.contiguous()
    operands = Operands(x, y, scale)
    row_sum, col_sum = _sums(operands, x_mask, y_mask)
    flag = _out_of_range(row_sum, x_mask) | _out_of_range(col_sum, y_mask)
    offset = operands.slope_and_offset[1]
    row, col = ((s.log2() + offset) / LOG2E for s in (row_sum, col_sum))
    flag = flag.to(torch.int32)
    _online(operands, flag, row, col, x_mask, y_mask)
    return row, col


def _out_of_range(sums: Tensor, mask: Tensor | None) -> Tensor:
    bad = ~((sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM))  # NaN is out of range too
    return (bad if mask is None else bad & mask).any()


def _sums(operands: Operands, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    x, y = operands.x, operands.y
    (m, d), (k, c, _) = x.shape, y.shape
    block_m, block_c, block_d, warps, stages = forward_config(x)
    tiles = triton.cdiv(c, block_c)
    # Enough programs for every processor four times over, without splitting a band below one row tile.
    bands = max(1, min(triton.cdiv(m, block_m), triton.cdiv(4 * 132, tiles * k)))
    band_rows = triton.cdiv(triton.cdiv(m, bands), block_m) * block_m
    bands = triton.cdiv(m, band_rows)
    row_sum = x.new_zeros(k, m, dtype=torch.float32)
    col = x.new_empty(bands, k, c, dtype=torch.float32)
    x_desc = TensorDescriptor(x, x.shape, x.stride(), [block_m, block_d])
    y_desc = TensorDescriptor(y, y.shape, y.stride(), [1, block_c, block_d])
    masks = dict(HAS_X_MASK=x_mask is not None, HAS_Y_MASK=y_mask is not None)
    blocks = dict(BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps, num_stages=stages)
    per_launch = max(1, WORKSPACE_BYTES // (4 * k * m))
    whole = tiles if c % block_c == 0 else tiles - 1
    launches = [(first, min(per_launch, whole - first), False) for first in range(0, whole, per_launch)]
    launches += [(whole, 1, True)] if whole < tiles else []
    for first, count, ragged in launches:
        row = x.new_empty(k, count, m, dtype=torch.float32)
        exp_sums[(count, bands, k)](
            x_desc, y_desc, x_mask, y_mask, operands.slope_and_offset, row, col, m, c, d, first, count, band_rows,
            MASK_COLUMNS=ragged or y_mask is not None, **masks, **blocks,
        )  # fmt: skip
        row_sum += row.sum(1)
    return row_sum, col.sum(0)


def _online(operands: Operands, flag: Tensor, row: Tensor, col: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> None:
    """Recompute row and col exactly, in place, where the flag is set."""
    x, y = operands.x, operands.y
    d, (k, c, _) = x.shape[1], y.shape
    blocks = dict(BLOCK_R=64, BLOCK_S=64, BLOCK_D=min(64, max(16, triton.next_power_of_2(d))), num_warps=4, num_stages=2)
    for out, q, kk, q_mask, k_mask, q_strides, k_strides, mask_strides in (
        (row, x, y, x_mask, y_mask, (0, x.stride(0)), (y.stride(0), y.stride(1)), (0, c)),
        (col, y, x, y_mask, x_mask, (y.stride(0), y.stride(1)), (0, x.stride(0)), (c, 0)),
    ):
        r, s = out.shape[1], kk.shape[-2]
        online_rows[(triton.cdiv(r, 64), k)](
            flag, q, kk, q_mask, k_mask, operands.slope_and_offset, out, r, s, d, *q_strides, *k_strides, *mask_strides,
            HAS_Q_MASK=q_mask is not None, HAS_K_MASK=k_mask is not None, **blocks,
        )  # fmt: skip


def backward(
    x: Tensor, y: Tensor, scale: Tensor, x_mask: Tensor | None, y_mask: Tensor | None,
    row: Tensor, col: Tensor, d_row: Tensor, d_col: Tensor, diagonal: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy in the inputs' dtype and dscale. ``diagonal`` >= 0 keeps the pairs (diagonal + j, j) out of the rounded G and adds them in float32."""
    (m, d), (k, c, _) = x.shape, y.shape
    if m == 0 or c == 0 or k == 0:
        return torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(scale)
    y_mask = None if y_mask is None else y_mask.contiguous()
    operands = Operands(x, y, scale)
    offset = operands.slope_and_offset[1]
    a = torch.where(torch.isneginf(row), 0, d_row)
    b = torch.where(torch.isneginf(col), 0, d_col)
    row, col = (v.masked_fill(torch.isneginf(v), torch.inf) for v in (row, col))
    # One power of two for the whole G: its largest coefficient comes to 2^14.
    largest = torch.maximum(a.abs().amax(), b.abs().amax())
    g_unit = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest)) - GRADIENT_EXPONENT), 1.0)
    flag = (_log_out_of_range(row, offset, x_mask) | _log_out_of_range(col, offset, y_mask)).to(torch.int32)
    rows = torch.stack([a / g_unit * torch.exp2(offset - row * LOG2E), row * LOG2E, a / g_unit])  # [3, K, M]
    cols = torch.stack([b / g_unit * torch.exp2(offset - col * LOG2E), col * LOG2E, b / g_unit])
    dx = x.new_zeros(m, operands.x.shape[1], dtype=torch.float32)
    dx_own, dscale = x.new_zeros(c, d, dtype=torch.float32), torch.zeros((), dtype=torch.float64, device=x.device)
    dy = torch.empty_like(y)
    chunk_rows, chunk_cols = _chunks(m, c, k)
    workspace = operands.x.new_empty(chunk_rows * chunk_cols)
    for slot in range(k):
        slot_rows, slot_cols = rows[:, slot].contiguous(), cols[:, slot].contiguous()
        dy_slot = x.new_zeros(c, operands.y.shape[2], dtype=torch.float32)
        for i in range(0, m, chunk_rows):
            for j in range(0, c, chunk_cols):
                g = _gradient(operands, flag, x_mask, y_mask, slot_rows, slot_cols, workspace, slot, i, j, chunk_rows, chunk_cols, diagonal)
                _accumulate(dx[i : i + chunk_rows], g, operands.y[slot, j : j + chunk_cols])
                _accumulate(dy_slot[j : j + chunk_cols], g.T, operands.x[i : i + chunk_rows])
        dy_slot = dy_slot[:, :d] * (g_unit * operands.x_unit)
        if diagonal >= 0:
            own = slice(diagonal, diagonal + c)
            dot = (operands.x[own].float() * operands.y[slot].float()).sum(1)
            z = operands.slope_and_offset[0] * dot
            g_own = torch.exp2(z - slot_rows[1, own]) * slot_rows[2, own] + torch.exp2(z - slot_cols[1]) * slot_cols[2]
            g_own = g_own if y_mask is None else g_own.masked_fill(~y_mask[slot], 0)
            g_own = g_own if x_mask is None else g_own.masked_fill(~x_mask[own], 0)
            dy_slot.addcmul_(g_own[:, None] * g_unit, x[own])
            dx_own.addcmul_(g_own[:, None] * g_unit, y[slot])
            dscale += (g_own * dot).sum(dtype=torch.float64) * (g_unit * operands.x_unit * operands.y_unit)
        dy[slot] = dy_slot.mul_(scale)
    dx = dx[:, :d] * (g_unit * operands.y_unit)
    # The scale's gradient is what is left where large terms cancel: with the x that the terms were computed from.
    dscale += (operands.x[:, :d].float() * operands.x_unit * dx).sum(dtype=torch.float64)
    if diagonal >= 0:
        dx[diagonal : diagonal + c] += dx_own
    return dx.mul_(scale).to(x.dtype), dy, dscale.to(scale.dtype)


def _log_out_of_range(lse: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """The flag again, from log-sum-exps: what forward found is not among what autograd saves."""
    exponent = lse * LOG2E - offset
    bad = ~((exponent >= -82.0) & (exponent <= 126.0)) & (lse != torch.inf)
    return (bad if mask is None else bad & mask).any()


def _chunks(m: int, c: int, k: int) -> tuple[int, int]:
    """Rows and columns of G held at once: whole along the shorter side, balanced along the longer."""
    room = max(2**14, WORKSPACE_BYTES // 2)  # 16-bit elements
    short, long = (m, c) if m <= c * k else (c, m)
    step = max(128, room // max(1, short))
    if step >= long:
        return m, c
    step = triton.cdiv(triton.cdiv(long, triton.cdiv(long, step)), 128) * 128
    short = min(short, max(128, room // step))
    return (short, step) if m <= c * k else (step, short)


def _gradient(operands, flag, x_mask, y_mask, row, col, workspace, slot, i, j, chunk_rows, chunk_cols, diagonal) -> Tensor:
    x, y = operands.x, operands.y
    (m, d), c = x.shape, y.shape[1]
    rows, cols = min(chunk_rows, m - i), min(chunk_cols, c - j)
    block_m, block_c, block_d, warps, stages = gradient_config(x)
    g = workspace[: rows * cols].view(rows, cols)
    x_desc = TensorDescriptor(x, x.shape, x.stride(), [block_m, block_d])
    y_desc = TensorDescriptor(y, y.shape, y.stride(), [1, block_c, block_d])
    slot_mask = None if y_mask is None else y_mask[slot]
    for exact in (False, True):
        gradient_tile[(triton.cdiv(cols, block_c), triton.cdiv(rows, block_m))](
            flag, x_desc, y_desc, x_mask, slot_mask, operands.slope_and_offset, row, col, g, m, c, d, slot, i, j, rows, cols, diagonal,
            EXACT=exact, HAS_X_MASK=x_mask is not None, HAS_Y_MASK=y_mask is not None, HAS_DIAGONAL=diagonal >= 0,
            BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return g


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` of 16-bit matrices into float32."""
    if out.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def forward_config(x: Tensor) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_C, BLOCK_D, warps, stages of exp_sums on the device of x; small ones for the interpreter."""
    return forward_blocks(_arch(x)) if x.is_cuda else (32, 32, 16, 4, 1)


def gradient_config(x: Tensor) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_C, BLOCK_D, warps, stages of gradient_tile."""
    return gradient_blocks(_arch(x)) if x.is_cuda else (32, 32, 16, 4, 1)


def forward_blocks(arch: int) -> tuple[int, int, int, int, int]:
    """exp_sums' configuration on compute capability arch / 10: on sm_90, 119 registers and 98 KB, so that two programs share a processor."""
    return {8: (64, 128, 32, 8, 3), 9: (128, 128, 64, 8, 3)}.get(arch // 10, (64, 128, 64, 8, 3))


def gradient_blocks(arch: int) -> tuple[int, int, int, int, int]:
    """gradient_tile's configuration: on sm_90, at most 128 registers and 66 KB without masks."""
    return {8: (128, 128, 32, 8, 3), 9: (128, 128, 64, 8, 2)}.get(arch // 10, (64, 128, 64, 8, 2))


def _arch(x: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
