"""Triton backend of bidirectional_logsumexp: one pass over the pairs forward, one recompute and two GEMMs backward.

    forward   exp_sums (a band of rows x one column tile, both sums of exp2(z - offset) in one pass) -> logs -> online_rows where sums left fp32's range
    backward  for each chunk of pairs: gradient_tile (z again, one exp2 a pair, 16-bit G) -> dx += G y, dy += G.T x (cuBLAS, fp32 accumulation)

A fixed exponent offset in place of running maxima makes row and column sums plain adds. z is at most scale for unit vectors, so the
offset ``scale - 106`` (in powers of two) puts the largest term at 2^106 and keeps sums of up to 2^20 of them in range; sums below
2^-82 or beyond 2^126 raise a flag on the device, and kernels that are always launched and otherwise exit at once recompute exactly. So does a scale
of 0: the infinity that drops a column is NaN then.

M rows, C columns, K slots, D width. Kernels compute in 16 bits: bfloat16 inputs as they are, float32 inputs as float16 after a
power-of-two scaling (unit vectors cannot overflow, and float16's rounding is 8 times finer).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends.settings import settings
from .dense import dense
from .logsumexp_kernels import exp_sums, gradient_tile, online_rows
from .logsumexp_tiles import INTERPRETED, ONLINE, Blocks, blocks_for
from .rectangle import Rectangle, Upstream, paired_slices

LOG2E = 1.4426950408889634
HEADROOM = 106.0  # binary exponent of the largest possible term of a sum
SMALLEST_SUM, LARGEST_SUM = 2.0**-82, 2.0**126
EXACT_PROGRAMS = 264  # of gradient_tile when it is only there in case: two for each processor of an H200
GRADIENT_EXPONENT = 14  # |G| is scaled up to 2^14: float16 then holds it normally down to 2^-28 of the largest


class Operands:
    """x and y as the kernels read them, D padded to TMA's 16 bytes: 16-bit, with the factors that undo float16's power-of-two scaling, or float32."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, exact_float32: bool
    ):
        wide = exact_float32
        self.x, self.x_unit = (_aligned(x), x.new_ones(())) if wide else _sixteen_bit(x, x_mask)
        self.y, self.y_unit = (_aligned(y), y.new_ones(())) if wide else _sixteen_bit(y, y_mask)
        self.precision = "tf32x3" if wide else "tf32"  # the latter has no meaning for 16-bit operands
        slope = scale * self.x_unit * self.y_unit * LOG2E
        # The offset bounds scale * x . y for unit vectors; others are caught by the flag.
        self.slope_and_offset = torch.stack([slope, scale.abs() * LOG2E - HEADROOM])

    def blocks(self, kernel: str) -> Blocks:
        """The tile shape of ``kernel`` for these operands on their device; a small one for the interpreter."""
        if not self.x.is_cuda:
            return INTERPRETED
        return blocks_for(kernel, self.x.element_size(), _arch(self.x), self.x.shape[1])

    def arguments(self, blocks: Blocks) -> dict:
        """What the kernels take of x and y: descriptors where the device has TMA, else pointers; and their strides."""
        x, y = self.x, self.y
        descriptor = not x.is_cuda or _arch(x) >= 90
        given = dict(x=x, y=y)
        if descriptor:
            given["x"] = TensorDescriptor(x, x.shape, x.stride(), [blocks.m, blocks.d])
            given["y"] = TensorDescriptor(y, y.shape, y.stride(), [1, blocks.c, blocks.d])
        tile = dict(
            BLOCK_M=blocks.m, BLOCK_C=blocks.c, BLOCK_D=blocks.d, num_warps=blocks.warps, num_stages=blocks.stages
        )
        strides = dict(stride_x=x.stride(0), stride_yk=y.stride(0), stride_y=y.stride(1))
        return given | strides | tile | dict(PRECISION=self.precision, DESCRIPTOR=descriptor)


def _sixteen_bit(v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(16-bit v / unit, aligned; unit): unit is a power of two on the device, 1 for 16-bit inputs. Dropped rows of float32 become 0: whatever they
    hold, it does not decide how the others are rounded."""
    unit = v.new_ones((), dtype=torch.float32)
    if v.dtype == torch.float32:
        largest = torch.linalg.vector_norm(v, torch.inf, dim=-1) if v.numel() else unit
        largest = (largest if mask is None else largest.where(mask, 0)).amax()
        unit = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)
        v = torch.div(v, unit, out=v.new_empty(v.shape, dtype=torch.float16))
        if mask is not None:
            v.masked_fill_(~mask[..., None], 0)
    return _aligned(v), unit


def _aligned(v: Tensor) -> Tensor:
    """``v`` with its last dimension contiguous and every row beginning at a multiple of 16 bytes; a copy padded with zeros where it is not so."""
    step = 16 // v.element_size()
    d = v.shape[-1]
    if (
        v.stride(-1) == 1
        and v.data_ptr() % 16 == 0
        and all(s % step == 0 and s > 0 for s in v.stride()[:-1])
        and d % step == 0
    ):
        return v
    padded = v.new_zeros(*v.shape[:-1], -(-d // step) * step)
    padded[..., :d] = v
    return padded


def forward(rectangle: Rectangle, paired: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row [K, M], col [K, C] and, with ``paired``, the logits of the pairs (j, j) [K, C], of the operands as the sums have them; float32."""
    x, y, scale, float32 = rectangle.x, rectangle.y, rectangle.scale, rectangle.exact_float32
    x_mask, y_mask = dense(rectangle.x_mask), dense(rectangle.y_mask)
    m, (k, c, _) = x.shape[0], y.shape
    kept = x.new_empty((k, m, c) if keep else (0, 0, 0), dtype=torch.float32)
    if m == 0 or c == 0 or k == 0:
        row, col = (x.new_full((k, n), -torch.inf, dtype=torch.float32) for n in (m, c))
        return row, col, x.new_empty((k, c) if paired else (0, 0), dtype=torch.float32), kept
    operands = Operands(x, y, scale, x_mask, y_mask, float32)
    row_sum, col_sum = _sums(operands, x_mask, y_mask)
    flag = _out_of_range(row_sum, x_mask) | _out_of_range(col_sum, y_mask)
    offset = operands.slope_and_offset[1]
    row, col = ((s.log2() + offset) / LOG2E for s in (row_sum, col_sum))
    flag = flag.to(torch.int32)
    _online(operands, flag, row, col, x_mask, y_mask)
    pos = (
        paired_dot(operands.x, operands.y).mul_(scale * operands.x_unit * operands.y_unit)
        if paired
        else row.new_empty(0, 0)
    )
    return row, col, pos, kept


def paired_dot(x: Tensor, y: Tensor) -> Tensor:
    """``torch.einsum("cd,kcd->kc", x.float(), y.float())``, a slot at a time."""
    return torch.stack([torch.sum(x.float() * slot, dim=-1) for slot in y])


def _out_of_range(sums: Tensor, mask: Tensor | None) -> Tensor:
    bad = ~((sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM))  # NaN is out of range too
    return (bad if mask is None else bad & mask).any()


def _sums(operands: Operands, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    x, y = operands.x, operands.y
    (m, d), (k, c, _) = x.shape, y.shape
    blocks = operands.blocks("exp_sums")
    block_m, block_c = blocks.m, blocks.c
    tiles = triton.cdiv(c, block_c)
    # Enough programs for every processor four times over, without splitting a band below one row tile.
    bands = max(1, min(triton.cdiv(m, block_m), triton.cdiv(4 * 132, tiles * k)))
    band_rows = triton.cdiv(triton.cdiv(m, bands), block_m) * block_m
    bands = triton.cdiv(m, band_rows)
    row_sum = x.new_zeros(k, m, dtype=torch.float32)
    col = x.new_empty(bands, k, c, dtype=torch.float32)
    given = operands.arguments(blocks) | dict(HAS_X_MASK=x_mask is not None, HAS_Y_MASK=y_mask is not None)
    per_launch = max(1, settings.workspace_bytes // (4 * k * m))
    whole = tiles if c % block_c == 0 else tiles - 1
    launches = [(first, min(per_launch, whole - first), False) for first in range(0, whole, per_launch)]
    launches += [(whole, 1, True)] if whole < tiles else []
    partials = x.new_empty(k * max(count for _, count, _ in launches) * m, dtype=torch.float32)
    for first, count, ragged in launches:
        row = partials[: k * count * m].view(k, count, m)
        exp_sums[(count, bands, k)](
            x_mask_ptr=x_mask, y_mask_ptr=y_mask, scale_ptr=operands.slope_and_offset, row_ptr=row, col_ptr=col, M=m, C=c, D=d,
            first_tile=first, row_tiles_stride=count, band_rows=band_rows, MASK_COLUMNS=ragged or y_mask is not None, **given,
        )  # fmt: skip
        row_sum += row.sum(1)
    return row_sum, col.sum(0)


def _online(
    operands: Operands, flag: Tensor, row: Tensor, col: Tensor, x_mask: Tensor | None, y_mask: Tensor | None
) -> None:
    """Recompute row and col exactly, in place, where the flag is set."""
    x, y = operands.x, operands.y
    d, (k, c, _) = x.shape[1], y.shape
    rows, columns, depth, warps, stages = ONLINE[x.element_size()]
    depth = min(depth, max(16, triton.next_power_of_2(d)))
    blocks = dict(
        BLOCK_R=rows, BLOCK_S=columns, BLOCK_D=depth, num_warps=warps, num_stages=stages, PRECISION=operands.precision
    )
    for out, q, kk, q_mask, k_mask, q_strides, k_strides, mask_strides in (
        (row, x, y, x_mask, y_mask, (0, x.stride(0)), (y.stride(0), y.stride(1)), (0, c)),
        (col, y, x, y_mask, x_mask, (y.stride(0), y.stride(1)), (0, x.stride(0)), (c, 0)),
    ):
        r, s = out.shape[1], kk.shape[-2]
        online_rows[(triton.cdiv(r, rows), k)](
            flag, q, kk, q_mask, k_mask, operands.slope_and_offset, out, r, s, d, *q_strides, *k_strides, *mask_strides,
            HAS_Q_MASK=q_mask is not None, HAS_K_MASK=k_mask is not None, **blocks,
        )  # fmt: skip


def backward(
    rectangle: Rectangle, upstream: Upstream, needs_x: bool, needs_y: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy in ``dtype`` and dscale. With d_pos [K, C] the pairs (diagonal + j, j) are positives: kept out of the rounded G and added in float32."""
    x, y, scale, float32 = rectangle.x, rectangle.y, rectangle.scale, rectangle.exact_float32
    x_mask, y_mask = dense(rectangle.x_mask), dense(rectangle.y_mask)
    row, col, d_row, d_col = upstream.row, upstream.col, upstream.d_row, upstream.d_col
    d_pos, diagonal = upstream.d_pos, upstream.diagonal
    (m, d), (k, c, _) = x.shape, y.shape
    if m == 0 or c == 0 or k == 0:
        return x.new_zeros(x.shape, dtype=dtype), torch.zeros_like(y, dtype=dtype), torch.zeros_like(scale)
    operands = Operands(x, y, scale, x_mask, y_mask, float32)
    slope, offset = operands.slope_and_offset
    a = torch.where(torch.isneginf(row), 0, d_row)
    b = torch.where(torch.isneginf(col), 0, d_col)
    row, col = (v.masked_fill(torch.isneginf(v), torch.inf) for v in (row, col))
    # One power of two for the whole G: its largest coefficient comes to 2^14.
    largest = torch.maximum(a.abs().amax(), b.abs().amax())
    g_unit = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest)) - GRADIENT_EXPONENT), 1.0)
    flag = (_log_out_of_range(row, offset, x_mask) | _log_out_of_range(col, offset, y_mask) | (slope == 0)).to(
        torch.int32
    )
    rows = torch.stack([a / g_unit * torch.exp2(offset - row * LOG2E), row * LOG2E, a / g_unit])  # [3, K, M]
    cols = torch.stack([b / g_unit * torch.exp2(offset - col * LOG2E), col * LOG2E, b / g_unit])
    own_m, own_c = paired_slices(m, c, diagonal)
    apart = d_pos is not None and own_c.stop > own_c.start
    dscale = scale.new_zeros((), dtype=torch.float64)
    if apart:  # before there is a workspace: this needs memory of its own
        dot = paired_dot(operands.x[own_m], operands.y[:, own_c])
        g_own = (
            torch.exp2(slope * dot - rows[1, :, own_m]) * a[:, own_m]
            + torch.exp2(slope * dot - cols[1, :, own_c]) * b[:, own_c]
        )
        for mask in (None if y_mask is None else y_mask[:, own_c], None if x_mask is None else x_mask[own_m]):
            g_own = g_own if mask is None else g_own.masked_fill(~mask, 0)
        g_own += d_pos[:, own_c]
        dscale += (g_own * dot).sum(dtype=torch.float64) * (operands.x_unit * operands.y_unit)
    dx = x.new_zeros(m, operands.x.shape[1], dtype=torch.float32)
    dy = torch.empty_like(y, dtype=dtype)
    chunk_rows, chunk_cols = _chunks(m, c, k, operands.x.element_size())
    workspace = operands.x.new_empty(chunk_rows * chunk_cols)
    for slot in range(k):
        slot_rows, slot_cols = rows[:, slot].contiguous(), cols[:, slot].contiguous()
        dy_slot = x.new_zeros(c, operands.y.shape[2], dtype=torch.float32)
        for i in range(0, m, chunk_rows):
            for j in range(0, c, chunk_cols):
                g = _gradient(
                    operands, flag, x_mask, y_mask, slot_rows, slot_cols, workspace, slot, i, j, chunk_rows, chunk_cols,
                    diagonal if apart else None,
                )  # fmt: skip
                _accumulate(dx[i : i + chunk_rows], g, operands.y[slot, j : j + chunk_cols])
                _accumulate(dy_slot[j : j + chunk_cols], g.T, operands.x[i : i + chunk_rows])
        dy_slot = dy_slot.mul_(g_unit * operands.x_unit)[:, :d]
        if apart:
            dy_slot[own_c].addcmul_(g_own[slot, :, None], x[own_m])
        dy[slot] = dy_slot.mul_(scale)
    del workspace, g, dy_slot
    dx = dx.mul_(g_unit * operands.y_unit)[:, :d]
    # The scale's gradient is what is left where large terms cancel: with the x that the terms were computed from.
    dscale += (operands.x[:, :d] * dx).sum(dtype=torch.float64) * operands.x_unit
    if apart:
        for slot in range(k):
            dx[own_m].addcmul_(g_own[slot, :, None], y[slot, own_c])
    dx = dx.mul_(scale).to(dtype).contiguous() if needs_x else dx.new_empty(0, dtype=dtype)
    return dx, dy if needs_y else dy.new_empty(0), dscale.to(scale.dtype)


def _log_out_of_range(lse: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """The flag again, from log-sum-exps: what forward found is not among what autograd saves."""
    exponent = lse * LOG2E - offset
    bad = ~((exponent >= -82.0) & (exponent <= 126.0)) & (lse != torch.inf)
    return (bad if mask is None else bad & mask).any()


def _chunks(m: int, c: int, k: int, element_bytes: int) -> tuple[int, int]:
    """Rows and columns of G held at once: whole along the shorter side, balanced along the longer."""
    room = max(2**14, settings.workspace_bytes // element_bytes)
    short, long = (m, c) if m <= c * k else (c, m)
    step = max(128, room // max(1, short))
    if step >= long:
        return m, c
    step = triton.cdiv(triton.cdiv(long, triton.cdiv(long, step)), 128) * 128
    short = min(short, max(128, room // step))
    return (short, step) if m <= c * k else (step, short)


def _gradient(
    operands, flag, x_mask, y_mask, row, col, workspace, slot, i, j, chunk_rows, chunk_cols, diagonal
) -> Tensor:
    x, y = operands.x, operands.y
    (m, d), c = x.shape, y.shape[1]
    rows, cols = min(chunk_rows, m - i), min(chunk_cols, c - j)
    blocks = operands.blocks("gradient_tile")
    g = workspace[: rows * cols].view(rows, cols)
    given = operands.arguments(blocks) | dict(
        HAS_X_MASK=x_mask is not None, HAS_Y_MASK=y_mask is not None, HAS_DIAGONAL=diagonal is not None
    )
    slot_mask = None if y_mask is None else y_mask[slot]
    tiles = triton.cdiv(cols, blocks.c) * triton.cdiv(rows, blocks.m)
    for exact in (False, True):
        gradient_tile[(min(tiles, EXACT_PROGRAMS) if exact else tiles,)](
            flag_ptr=flag, x_mask_ptr=x_mask, y_mask_ptr=slot_mask, scale_ptr=operands.slope_and_offset, row_ptr=row, col_ptr=col, g_ptr=g,
            M=m, C=c, D=d, slot=slot, first_row=i, first_col=j, rows=rows, cols=cols, diagonal=0 if diagonal is None else diagonal, EXACT=exact, **given,
        )  # fmt: skip
    return g


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` into float32; the operands are 16-bit, or float32 and multiplied as torch's own setting says."""
    if out.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def _arch(x: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
