"""Triton backend of sigmoid_pairs: for each chunk of pairs one kernel (loss, G) and two matrix products,
dx += G y and dy += G.T x.

Operands are 16-bit: bfloat16 and float16 as they are, float32 as float16 after a power-of-two scaling,
or as three TF32 products where ``torch.get_float32_matmul_precision()`` and ``configure`` say so. Sums are float32.
M rows, C columns, K captions per image, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends.settings import settings
from ..dense import aligned_rows, dense
from ..logsumexp.logsumexp_tiles import INTERPRETED, Blocks
from ..operands import without_dropped
from ..products import accumulate
from .sigmoid_pairs_kernels import sigmoid_tile
from .sigmoid_pairs_torch import G_DIVISOR, Pairs

# By bytes of an operand's element and compute capability's major: without spills, two or three programs on a processor,
# so that one's exponentials run beside another's products (tests/kernels/sigmoid/test_sigmoid_compiled.py). None timed.
BLOCKS = {
    (2, 8): Blocks(64, 128, 32, 4, 3),
    (2, 9): Blocks(128, 64, 64, 4, 3),
    (2, 10): Blocks(64, 128, 64, 8, 2),
    (4, 8): Blocks(64, 64, 32, 4, 3),
    (4, 9): Blocks(128, 64, 32, 8, 2),
    (4, 10): Blocks(64, 64, 32, 4, 3),
}
SMALLEST_DIVISOR = 2.0**-126


class _Operand(NamedTuple):
    """Features as the kernel and the products read them, with the power of two they were divided by."""

    v: Tensor
    divisor: Tensor


def _operand(v: Tensor, mask: Tensor | None, exact_float32: bool) -> _Operand:
    v = without_dropped(v, mask)
    divisor = v.new_ones((), dtype=torch.float32)
    if v.dtype == torch.float32 and not exact_float32:
        divisor = torch.linalg.vector_norm(v, torch.inf).clamp_(min=SMALLEST_DIVISOR).log2_().floor_().exp2_()
        v = torch.div(v, divisor, out=v.new_empty(v.shape, dtype=torch.float16))
    return _Operand(aligned_rows(v), divisor)


def _chunks(m: int, c: int, element_bytes: int) -> tuple[int, int]:
    """Rows and columns of G held at once: all rows, and as many columns as the workspace has room for;
    all of both where they fit.
    """
    room = max(2**14, settings.workspace_bytes // element_bytes)
    rows = min(m, max(128, room // 128))
    cols = min(c, max(128, room // rows // 128 * 128))
    return rows, cols


def blocks_for(element_bytes: int, major: int) -> Blocks:
    """The tile shape; an architecture without an entry takes sm_80's, which fits everywhere."""
    return BLOCKS[element_bytes, major if major in (8, 9, 10) else 8]


def compile_options(blocks: Blocks) -> dict[str, int]:
    """Warps, stages, and registers of a thread such that two programs fit on a processor: where images are compared and
    equal ones are positives, ptxas would take more.
    """
    registers = min(255, 65536 // (2 * 32 * blocks.warps))
    return dict(num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=registers)


def _launch_arguments(x: Tensor, y: Tensor) -> tuple[dict, Blocks]:
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    descriptor = not x.is_cuda or major >= 9
    blocks = blocks_for(x.element_size(), major) if x.is_cuda else INTERPRETED
    tile = dict(BLOCK_M=blocks.m, BLOCK_C=blocks.c, BLOCK_D=blocks.d) | compile_options(blocks)
    operands = dict(x=x, y=y)
    if descriptor:
        operands = dict(
            x=TensorDescriptor(x, x.shape, x.stride(), [blocks.m, blocks.d]),
            y=TensorDescriptor(y, y.shape, y.stride(), [blocks.c, blocks.d]),
        )
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"  # the latter has no meaning for 16-bit operands
    shape = dict(M=x.shape[0], C=y.shape[0], D=x.shape[1], stride_x=x.stride(0), stride_y=y.stride(0))
    return operands | shape | tile | dict(PRECISION=precision, DESCRIPTOR=descriptor), blocks


def forward(pairs: Pairs, needs_x: bool, needs_y: bool, needs_scale: bool) -> tuple[Tensor, ...]:
    """The sum of the pairs' losses, dx [M, D] or [0], dy [C, D] or [0], dscale and dbias; float32."""
    scale, d = pairs.scale, pairs.x.shape[1]
    if 0 in (len(pairs.x), len(pairs.y)):
        dx, dy = (
            v.new_zeros(v.shape if n else 0, dtype=scale.dtype) for v, n in ((pairs.x, needs_x), (pairs.y, needs_y))
        )
        return scale.new_zeros(()), dx, dy, scale.new_zeros(()), scale.new_zeros(())
    exact_float32 = pairs.float32 == "torch" and torch.get_float32_matmul_precision() == "highest"
    x, y = (_operand(v, mask, exact_float32) for v, mask in ((pairs.x, pairs.x_mask), (pairs.y, pairs.y_mask)))
    # The scale's gradient is the sum of x . (G y): one of the two products, whoever else needs it.
    dx = scale.new_zeros(x.v.shape if needs_x or (needs_scale and not needs_y) else 0)
    dy = scale.new_zeros(y.v.shape if needs_y else 0)
    total, dbias = _negatives(pairs, x, y, dx, dy, needs_x or needs_y or needs_scale)
    own_total, own_bias, g_dot = _positives(pairs, x, y, dx, dy)
    dx, dy = (v[:, :d].mul_(scale).contiguous() if n else v.new_zeros(0) for v, n in ((dx, needs_x), (dy, needs_y)))
    sums = (total + own_total, g_dot, dbias + own_bias)
    total, dscale, dbias = (v.to(scale.dtype) for v in sums)
    return total, dx, dy, dscale, dbias


def _negatives(pairs: Pairs, x: _Operand, y: _Operand, dx: Tensor, dy: Tensor, gradient: bool) -> Tensor:
    """dx += G y and dy += G.T x for those that are not empty, multiplied by the divisors in the end -> [2]:
    the losses' sum and G's.
    """
    m, c = len(x.v), len(y.v)
    arguments, blocks = _launch_arguments(x.v, y.v)
    x_mask, y_mask = dense(pairs.x_mask), dense(pairs.y_mask)
    slope_and_bias = torch.stack([pairs.scale * x.divisor * y.divisor, pairs.bias])
    chunk_rows, chunk_cols = _chunks(m, c, x.v.element_size())
    pitch = -(-chunk_cols // 64) * 64  # rows of G at multiples of 128 bytes: whole stores, and aligned operands
    workspace = x.v.new_empty(chunk_rows * pitch if gradient else 1)
    corners = [(i, j) for i in range(0, m, chunk_rows) for j in range(0, c, chunk_cols)]
    most = triton.cdiv(chunk_rows, blocks.m) * triton.cdiv(chunk_cols, blocks.c)  # tiles of a chunk
    sums = pairs.scale.new_zeros(2, len(corners) * most)
    arguments |= dict(
        x_mask_ptr=x_mask,
        y_mask_ptr=y_mask,
        x_images_ptr=dense(pairs.x_images),
        y_images_ptr=None if pairs.x_images is None else pairs.y_images,
        HAS_X_MASK=x_mask is not None,
        HAS_Y_MASK=y_mask is not None,
        SAME_IS_POSITIVE=pairs.x_images is not None and pairs.same_image == "positive",
        scale_ptr=slope_and_bias,
        g_ptr=workspace,
        sums_ptr=sums,
        sums=sums.shape[1],
        first=pairs.first,
        k=pairs.k,
        stride_g=pitch,
        GRADIENT=gradient,
    )
    for number, (i, j) in enumerate(corners):
        rows, cols = min(chunk_rows, m - i), min(chunk_cols, c - j)
        tiles = triton.cdiv(rows, blocks.m) * triton.cdiv(cols, blocks.c)
        corner = dict(first_row=i, first_col=j, rows=rows, cols=cols, first_sum=number * most)
        sigmoid_tile[(tiles,)](**corner, **arguments)
        g = workspace[: rows * pitch].view(rows, pitch)[:, :cols] if gradient else None
        if dx.numel():
            accumulate(dx[i : i + rows], g, y.v[j : j + cols])
        if dy.numel():
            accumulate(dy[j : j + cols], g.T, x.v[i : i + rows])
    if dx.numel():
        dx.mul_(G_DIVISOR * y.divisor)
    if dy.numel():
        dy.mul_(G_DIVISOR * x.divisor)
    return sums.sum(1, dtype=torch.float64)


def _positives(pairs: Pairs, x: _Operand, y: _Operand, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the positives' parts to dx and dy, in float32 -> the sums of their losses, of their gradients,
    and over all pairs of g x . y.
    """
    k, (images, columns) = pairs.k, pairs.own
    x_own = x.v[images]
    y_own = y.v[columns].unflatten(0, (len(x_own), k))
    divisor = x.divisor * y.divisor
    dots = torch.stack([torch.sum(x_own.float() * y_own[:, slot], dim=-1) for slot in range(k)], 1) * divisor  # [n, K]
    z = dots * pairs.scale + pairs.bias
    losses, g = -F.logsigmoid(z), -torch.sigmoid(-z)
    if pairs.x_mask is not None:
        losses, g = (v.where(pairs.x_mask[images, None], 0) for v in (losses, g))
    if pairs.y_mask is not None:
        losses, g = (v.where(pairs.y_mask[columns].view(-1, k), 0) for v in (losses, g))
    for slot in range(k):
        if dx.numel():
            dx[images].addcmul_(g[:, slot, None] * y.divisor, y_own[:, slot])
        if dy.numel():
            dy[columns].unflatten(0, (len(x_own), k))[:, slot].addcmul_(g[:, slot, None] * x.divisor, x_own)
    factor, gradient = (x, dx) if dx.numel() else (y, dy)
    g_dot = (factor.v * gradient).sum(dtype=torch.float64) * factor.divisor if gradient.numel() else g.new_zeros(())
    return losses.sum(dtype=torch.float64), g.sum(dtype=torch.float64), g_dot
