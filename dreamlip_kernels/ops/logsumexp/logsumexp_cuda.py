"""The CUDA C++ backend of bidirectional_logsumexp: csrc/logsumexp.cu, and torch code around it. It needs no Triton.

    forward   sums (a band of rows x one column tile, both sums of exp2(z - offset) in one pass) -> finish (their
              logarithms; running maxima where a sum left float32's range) -> pairs (the positives' logits)
    backward  for each chunk of pairs: gradient (z again, one exp2 a pair, 16-bit G) -> dx += G y, dy += G.T x (cuBLAS)

The arithmetic is the Triton backend's (docs/math.md, section 5).

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends.settings import settings
from ..chunks import Chunk, chunks, joined, up
from ..dense import dense
from ..operands import Operands
from ..products import accumulate, matmul
from ..rectangle import Rectangle, Upstream, add_own_pairs, paired_slices

TILE = 128  # rows and columns of a block's tile, LogitTiles::kTile
# Blocks that run together have as many bands of rows as tiles of columns: what they share then fits the smallest L2.
BANDS = 16
BLOCKS = 4 * 132  # of sums at least, where there are rows enough: four for each processor of an H100
LOG2E = 1.4426950408889634
LARGEST_TERM, SMALLEST_SUM, LARGEST_SUM = 106.0, -82.0, 126.0  # kLargestTerm, .. of csrc/logsumexp.cuh
GRADIENT_EXPONENT = 13  # the largest coefficient is below 2^14: a row's and a column's together stay within float16

_ops = torch.ops.dreamlip_csrc


class _Call(NamedTuple):
    """What every launch is given of a rectangle, in the order of the ops' arguments."""

    x: Tensor
    y: Tensor
    x_mask: Tensor | None
    y_mask: Tensor | None
    x_images: Tensor | None
    y_images: Tensor | None
    scale: Tensor
    multiplier: Tensor


def _call(operands: Operands, rectangle: Rectangle) -> _Call:
    r = rectangle
    masks, images = (dense(r.x_mask), dense(r.y_mask)), (dense(r.x_images), dense(r.y_images))
    return _Call(operands.x, operands.y, *masks, *images, operands.scale, operands.slope)


def forward(rectangle: Rectangle, paired: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row [K, M], col [K, C], with ``paired`` the logits of the pairs (j, j) [K, C];
    nothing saved (``keep`` is the torch backend's).
    """
    m, c, k, _ = rectangle.sizes
    empty = rectangle.scale.new_empty
    row, col, pos, saved_pairs = empty(k, m), empty(k, c), empty((k, c) if paired else (0, 0)), empty(0, 0, 0)
    if m == 0 or c == 0 or k == 0:
        return row.fill_(-torch.inf), col.fill_(-torch.inf), pos, saved_pairs
    operands = Operands(rectangle)
    call = _call(operands, rectangle)
    row_parts, column_parts = _partial_sums(call)
    _ops.logsumexp_finish(*call, row_parts, False, row)
    _ops.logsumexp_finish(*call, column_parts.transpose(0, 1), True, col)
    if paired:
        _ops.logsumexp_pairs(*call, 0, pos)
        if rectangle.x_images is not None:
            add_own_pairs(rectangle, row, col, pos)
    return row, col, pos, saved_pairs


def _partial_sums(call: _Call) -> tuple[Tensor, Tensor]:
    """Sums of exp2(z - offset), [K, tiles, M] over columns and [bands, K, C] over rows;
    tiles is 1 where the workspace is small.
    """
    m, (k, c, _) = len(call.x), call.y.shape
    tiles, row_tiles = _cdiv(c, TILE), _cdiv(m, TILE)
    bands = min(row_tiles, max(BANDS, _cdiv(BLOCKS, tiles * k)))
    band_rows = _cdiv(row_tiles, bands) * TILE
    columns = call.x.new_empty(_cdiv(m, band_rows), k, c, dtype=torch.float32)
    per_launch = min(tiles, max(1, settings.workspace_bytes // (4 * k * m)))
    rows = call.x.new_empty(k * per_launch * m, dtype=torch.float32)
    total = None if per_launch == tiles else rows.new_zeros(k, 1, m)
    for first in range(0, tiles, per_launch):
        count = min(per_launch, tiles - first)
        part = rows[: k * count * m].view(k, count, m)
        _ops.logsumexp_sums(*call, first, band_rows, part, columns)
        if total is not None:
            total += part.sum(1, keepdim=True)
    return part if total is None else total, columns


def backward(
    rectangle: Rectangle, upstream: Upstream, needs_x: bool, needs_y: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, D], dy (strided as y), each in ``dtype`` or without an element where nobody needs it; and dscale."""
    x, y, scale = rectangle.x, rectangle.y, rectangle.scale
    m, c, k, d = rectangle.sizes
    dx = x.new_empty((m, d) if needs_x else 0, dtype=dtype)
    dy = torch.empty_like(y, dtype=dtype) if needs_y else y.new_empty(0, dtype=dtype)
    if m == 0 or c == 0 or k == 0:
        return dx.zero_(), dy.zero_(), torch.zeros_like(scale)
    passes = _Passes(rectangle, upstream, through_x=needs_x or not needs_y)  # one of the two products gives dscale
    dots = passes.run(dx, dy)
    if passes.operands.x_divisor is not None and passes.operands.y_divisor is not None:
        dots = dots * passes.operands.x_divisor * passes.operands.y_divisor
    return dx, dy, dots.to(scale.dtype)


class _Vectors(NamedTuple):
    """rows [3, K, M] and cols [3, K, C] of csrc's Coefficients, the gradients of the positives' logits own [K,
    pairs] or None, the flag that says whether G is made exactly, and the power of two that it was divided by.
    """

    rows: Tensor
    cols: Tensor
    own: Tensor | None
    flag: Tensor
    divisor: Tensor


class _Passes:
    """One call of ``backward``: its operands, its vectors and the passes over its chunks."""

    def __init__(self, rectangle: Rectangle, upstream: Upstream, through_x: bool):
        m, c, k, self.d = rectangle.sizes
        self.through_x, self.diagonal = through_x, upstream.diagonal
        self.operands = Operands(rectangle, without_masked=True)
        self.chunk: Chunk = chunks(m, c, k, self.operands.x.element_size())
        if self.chunk.slots > 1:
            self.operands.y = joined(self.operands.y)
        # Of all pairs on the diagonal, for the kernel leaves them all out of G.
        self.own_rows, self.own_cols = paired_slices(m, c, replace(upstream, first_pair=0, stop_pair=c))
        call = _call(self.operands, rectangle)
        # Without the columns that join the slots: G has none of them, and its own zeros in their place.
        self.call = call._replace(y=call.y[:, :c])
        self.vectors = self._coefficients(upstream)
        self.sizes = m, c, k

    def _coefficients(self, upstream: Upstream) -> _Vectors:
        bound = self.operands.scale.abs() * LOG2E
        offset = torch.maximum(bound - LARGEST_TERM, (-SMALLEST_SUM - bound).clamp(max=0))
        sides = []
        for lse, gradient in ((upstream.row, upstream.d_row), (upstream.col, upstream.d_col)):
            empty = torch.isneginf(lse)  # no logit, no gradient, whatever its upstream
            sides.append(((lse * LOG2E).masked_fill(empty, torch.inf), gradient.masked_fill(empty, 0)))
        largest = torch.stack([gradient.abs().amax() for _, gradient in sides]).amax()
        divisor = torch.where(largest > 0, torch.exp2(largest.log2().floor() - GRADIENT_EXPONENT), 1.0)
        vectors, left = [], self.operands.slope == 0
        for lse, gradient in sides:
            scaled, exponent = gradient / divisor, lse - offset
            vectors.append(torch.stack([scaled * torch.exp2(-exponent), lse, scaled]))
            right = ((exponent >= SMALLEST_SUM) & (exponent <= LARGEST_SUM)) | (lse == torch.inf)
            left = left | ~right.all()
        own = None
        if upstream.d_pos is not None and self.own_cols.stop > self.own_cols.start:
            own = self._own(sides, upstream)
        rows, cols = vectors
        return _Vectors(rows, cols, own, left.to(torch.int32), divisor)

    def _own(self, sides: list[tuple[Tensor, Tensor]], upstream: Upstream) -> Tensor:
        """The whole gradient of each diagonal pair's logit: its share of both softmaxes and, of a positive,
        its own upstream.
        """
        assert upstream.pos is not None and upstream.d_pos is not None
        (row, d_row), (col, d_col) = (
            [v[:, part] for v in side] for side, part in zip(sides, (self.own_rows, self.own_cols), strict=True)
        )
        positives = slice(max(upstream.first_pair, self.own_cols.start), min(upstream.stop_pair, self.own_cols.stop))
        if positives == self.own_cols:
            z = upstream.pos[:, self.own_cols] * LOG2E
        else:  # pos holds the logits of positives alone
            logits = torch.empty_like(upstream.col)
            _ops.logsumexp_pairs(*self.call, self.diagonal, logits)
            z = logits[:, self.own_cols] * LOG2E
        own = torch.exp2(z - row) * d_row + torch.exp2(z - col) * d_col
        ours = slice(positives.start - self.own_cols.start, max(positives.start, positives.stop) - self.own_cols.start)
        if (
            self.call.x_images is not None and self.call.y_images is not None
        ):  # what is left out of both sums, unless it is a positive
            same = self.call.x_images[self.own_rows] == self.call.y_images[self.own_cols]
            same[ours] = False
            own = own.masked_fill(same, 0)
        own[:, ours] += upstream.d_pos[:, positives]
        return own.masked_fill((row == torch.inf) | (col == torch.inf), 0)

    def run(self, dx: Tensor, dy: Tensor) -> Tensor:
        """Write dx and dy, those with elements; returns dscale over the operands' divisors."""
        x, y, width = self.operands.x, self.operands.y, self.operands.x.shape[1]
        (m, c, k), (slots, rows, cols) = self.sizes, self.chunk
        padded = y.shape[1] if slots > 1 else cols
        pitch = up(slots * padded)
        # Zeros where G has columns of padding, which no launch writes.
        workspace = (x.new_zeros if padded > c else x.new_empty)(rows * pitch)
        dx_sum = x.new_empty(m, width, dtype=torch.float32) if self.through_x else None
        dy_sum = x.new_empty(slots * padded, width, dtype=torch.float32) if dy.numel() else None
        dots = x.new_zeros((), dtype=torch.float64)
        row_vectors, col_vectors, own, flag, _ = self.vectors
        diagonal = None if own is None else self.diagonal
        for first, j in ((first, j) for first in range(0, k, slots) for j in range(0, c, cols)):
            n, count = min(slots, k - first), min(cols, c - j)
            y_part = y[first : first + n].flatten(0, 1) if slots > 1 else y[first, j : j + count]
            for i in range(0, m, rows):
                part = slice(i, min(i + rows, m))
                g_rows = workspace[: (part.stop - i) * pitch].view(part.stop - i, pitch)[:, : len(y_part)]
                g = g_rows.unflatten(1, (n, -1))[..., :count].transpose(0, 1)  # [n, rows, count]
                _ops.logsumexp_gradient(*self.call, flag, row_vectors, col_vectors, i, j, first, diagonal, g)
                if dx_sum is not None:
                    (matmul if first == j == 0 else accumulate)(a=g_rows, b=y_part, out=dx_sum[part])
                if dy_sum is not None:
                    (matmul if i == 0 else accumulate)(a=g_rows.T, b=x[part], out=dy_sum[: len(y_part)])
            if dy_sum is not None:
                total = dy_sum[: len(y_part)].view(n, -1, width)[:, :count]
                dots += self._finish_columns(total, dy, slice(first, first + n), slice(j, j + count))
        return self._finish_rows(dx_sum, dx) if dx_sum is not None else dots

    def _finish_columns(self, total: Tensor, dy: Tensor, slots: slice, cols: slice) -> Tensor | float:
        """Write dy of a chunk from its product [slots, cols, D]; its part of dscale."""
        total.mul_(self.vectors.divisor)
        own_cols = slice(max(cols.start, self.own_cols.start), min(cols.stop, self.own_cols.stop))
        if self.vectors.own is not None and own_cols.stop > own_cols.start:
            ours = slice(own_cols.start - self.own_cols.start, own_cols.stop - self.own_cols.start)
            partners = self.operands.x[own_cols.start + self.diagonal : own_cols.stop + self.diagonal]
            within = total[:, own_cols.start - cols.start : own_cols.stop - cols.start]
            for one, own in zip(within, self.vectors.own[slots, ours], strict=True):
                one.addcmul_(own[:, None], partners)
        dots = 0.0 if self.through_x else (self.operands.y[slots, cols] * total).sum(dtype=torch.float64)
        dy[slots, cols] = total[..., : self.d].mul_(self.operands.x_scale)
        return dots

    def _finish_rows(self, total: Tensor, dx: Tensor) -> Tensor:
        """Write dx from its product [M, D]; returns dscale."""
        total.mul_(self.vectors.divisor)
        if self.vectors.own is not None:
            for own, slot in zip(self.vectors.own, self.operands.y, strict=True):
                total[self.own_rows].addcmul_(own[:, None], slot[self.own_cols])
        dots = (self.operands.x * total).sum(dtype=torch.float64)
        if dx.numel():
            dx.copy_(total[:, : self.d].mul_(self.operands.y_scale))
        return dots


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
