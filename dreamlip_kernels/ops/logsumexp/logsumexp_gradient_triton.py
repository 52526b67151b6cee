"""Backward of the Triton backend of bidirectional_logsumexp: one recompute of the pairs and two matrix products.

    vectors          of row, col and their upstream: what G is made of, and the whole gradient of each positive
    gradient_tile    for each chunk of pairs, of several slots where they fit the workspace: z again, then 16-bit G
    products         dx += G y, dy += G.T x (cuBLAS, float32 sums)
    finish_gradient  their scales and the positives, in float32, rounded once

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..chunks import chunks, joined, up
from ..dense import dense
from ..products import accumulate, matmul
from ..rectangle import Rectangle, Upstream, paired_slices
from .kernels.gradient_kernels import gradient_tile
from .kernels.logits_kernels import NO_DIAGONAL
from .kernels.vector_kernels import COEFFICIENTS, LARGEST_UPSTREAM, finish_gradient
from .logsumexp_tiles import Blocks
from .operands_triton import BLOCK, ROWS, WIDTH, TritonOperands

EXACT_PROGRAMS = 264  # of gradient_tile when it is only there in case: two for each processor of an H200


class Vectors(NamedTuple):
    """What ``vectors`` writes: rows [3, K, M], cols [3, K, C], own [K, C], the flag and the divisor of G."""

    rows: Tensor
    cols: Tensor
    own: Tensor
    flag: Tensor
    divisor: Tensor


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
    passes = Passes(rectangle, upstream, needs_x, needs_y)
    dots = passes.run(dx if needs_x else x.new_empty((m, d), dtype=dtype) if passes.through_x else None, dy)
    return dx if needs_x else x.new_empty(0, dtype=dtype), dy, dots.sum(dtype=torch.float64).to(scale.dtype)


class Passes:
    """One call of ``backward``: its operands, its vectors and the passes over its chunks."""

    def __init__(self, rectangle: Rectangle, upstream: Upstream, needs_x: bool, needs_y: bool):
        self.m, self.c, self.k, self.d = rectangle.sizes
        # One of the two products gives dscale.
        self.through_x, self.needs_y = needs_x or not needs_y, needs_y
        self.operands = TritonOperands(rectangle, without_masked=True)
        self.chunk = chunks(self.m, self.c, self.k, self.operands.x.element_size())
        if self.chunk.slots > 1:
            self.operands.y = joined(self.operands.y)
        _, own = paired_slices(self.m, self.c, upstream)
        paired = upstream.d_pos is not None and own.stop > own.start
        self.diagonal, self.own = (upstream.diagonal, own) if paired else (NO_DIAGONAL, slice(0, 0))
        self.vectors = self._coefficients(upstream)
        self.images = dense(rectangle.x_images), dense(rectangle.y_images)
        self.use(self.operands.blocks("gradient_tile"))

    def use(self, blocks: Blocks) -> None:
        """Make tiles of G of these shapes from now on."""
        self.tile = blocks.m, blocks.c
        self.arguments = self.operands.arguments(blocks) | dict(
            flag_ptr=self.vectors.flag,
            x_mask_ptr=self.operands.x_mask,
            y_mask_ptr=self.operands.y_mask,
            x_images_ptr=self.images[0],
            y_images_ptr=self.images[1],
            row_ptr=self.vectors.rows,
            col_ptr=self.vectors.cols,
            M=self.m,
            C=self.c,
            K=self.k,
            D=self.operands.x.shape[1],
            diagonal=self.diagonal,
            first_pair=self.own.start,
            stop_pair=self.own.stop,
        )

    def _coefficients(self, upstream: Upstream) -> Vectors:
        m, c, k = self.m, self.c, self.k
        new = upstream.row.new_empty
        vectors = Vectors(new(3, k, m), new(3, k, c), new(k, c), new((), dtype=torch.int32), new(()))
        row, col, d_row, d_col = map(dense, (upstream.row, upstream.col, upstream.d_row, upstream.d_col))
        pos, d_pos = (col, d_col) if self.diagonal == NO_DIAGONAL else map(dense, (upstream.pos, upstream.d_pos))
        programs = triton.cdiv(k * m, BLOCK) + triton.cdiv(k * c, BLOCK)
        arguments = dict(
            row_ptr=row,
            col_ptr=col,
            d_row_ptr=d_row,
            d_col_ptr=d_col,
            pos_ptr=pos,
            d_pos_ptr=d_pos,
            largest_ptr=new(programs),
            flag_ptr=vectors.flag,
            divisor_ptr=vectors.divisor,
            rows_ptr=vectors.rows,
            cols_ptr=vectors.cols,
            own_ptr=vectors.own,
            diagonal=self.diagonal,
            first_pair=self.own.start,
            stop_pair=self.own.stop,
        )
        for phase in (LARGEST_UPSTREAM, COEFFICIENTS):
            self.operands.launch_vectors(phase, programs, **arguments)
        return vectors

    def run(self, dx: Tensor | None, dy: Tensor) -> Tensor:
        """Write dx and dy, where the passes go through them.

        Returns terms whose sum is dscale.
        """
        x, y, width = self.operands.x, self.operands.y, self.operands.x.shape[1]
        slots, rows, cols = self.chunk
        padded = y.shape[1] if slots > 1 else cols
        pitch = up(slots * padded)
        workspace = x.new_empty(rows * pitch)
        dx_sum = x.new_empty(self.m, width, dtype=torch.float32) if self.through_x else None
        dy_sum = x.new_empty(slots * padded, width, dtype=torch.float32) if self.needs_y else None
        dy_rows = dy if dy.stride(-1) == 1 else torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        dots = []
        for k, j in ((k, j) for k in range(0, self.k, slots) for j in range(0, self.c, cols)):
            n, count = min(slots, self.k - k), min(cols, self.c - j)
            y_part = y[k : k + n].flatten(0, 1) if slots > 1 else y[k, j : j + count]
            for i in range(0, self.m, rows):
                part = slice(i, min(i + rows, self.m))
                g = self.gradient(workspace, pitch, (k, n), part, (j, len(y_part) // n))
                if self.through_x:
                    (matmul if k == j == 0 else accumulate)(a=g, b=y_part, out=dx_sum[part])
                if self.needs_y:
                    (matmul if i == 0 else accumulate)(a=g.T, b=x[part], out=dy_sum[: len(y_part)])
            if self.needs_y:
                total = dy_sum[: len(y_part)].view(n, -1, width)
                dots += self._finish_columns(total, dy_rows, slice(k, k + n), slice(j, j + count))
        if self.through_x:
            dots = self._finish_rows(dx_sum, dx)
        if dy_rows is not dy:
            dy.copy_(dy_rows)
        return dots[0] if len(dots) == 1 else torch.cat(dots)

    def gradient(
        self, workspace: Tensor, pitch: int, slots: tuple[int, int], rows: slice, cols: tuple[int, int]
    ) -> Tensor:
        """G of a chunk, [rows, slots * cols]: the first and the number of its slots and of its columns, padding among
        them.
        """
        (first_slot, slot_count), (first_col, col_count) = slots, cols
        row_count = rows.stop - rows.start
        tiles = slot_count * triton.cdiv(row_count, self.tile[0]) * triton.cdiv(col_count, self.tile[1])
        for exact in (False, True):
            gradient_tile[(min(tiles, EXACT_PROGRAMS) if exact else tiles,)](
                g_ptr=workspace,
                slots=slot_count,
                first_slot=first_slot,
                first_row=rows.start,
                first_col=first_col,
                rows=row_count,
                col_octets=triton.cdiv(col_count, 8),
                pitch=pitch,
                EXACT=exact,
                **self.arguments,
            )
        return workspace[: row_count * pitch].view(row_count, pitch)[:, : slot_count * col_count]

    def _finish_columns(self, total: Tensor, dy: Tensor, slots: slice, cols: slice) -> list[Tensor]:
        """Write dy of a chunk from its product ``total`` [slots, cols and padding, D]."""
        x, own = self.operands.x, self.vectors.own[slots]
        return self._finish(
            total,
            dy[slots, cols],
            self.operands.x_scale,
            v=(x, 0, x.stride(0), self.m),
            own=(own, self.c, 0),
            terms=1,
            shift=cols.start + self.diagonal,
            own_shift=cols.start,
            dotted=None if self.through_x else self.operands.y[slots, cols],
        )

    def _finish_rows(self, total: Tensor, dx: Tensor) -> list[Tensor]:
        """Write dx from its product ``total`` [M, D]."""
        y = self.operands.y
        return self._finish(
            total[None],
            dx[None],
            self.operands.y_scale,
            v=(y, y.stride(0), y.stride(1), self.c),
            own=(self.vectors.own, 0, self.c),
            terms=self.k,
            shift=-self.diagonal,
            own_shift=-self.diagonal,
            dotted=self.operands.x[None],
        )

    def _finish(self, total, out, scale, *, v, own, terms, shift, own_shift, dotted) -> list[Tensor]:
        """Launch finish_gradient for ``out`` [Q, R, D]; the dots with ``dotted`` [Q, R, D] if there is one."""
        (features, v_t, v_r, v_rows), (own, own_q, own_t) = v, own
        programs = triton.cdiv(out.shape[1], ROWS)
        dots = None if dotted is None else total.new_empty(len(out) * programs)
        beside = total if dotted is None else dotted
        finish_gradient[(programs, len(out))](
            acc_ptr=total,
            v_ptr=features,
            own_ptr=own,
            self_ptr=features if dotted is None else dotted,
            divisor_ptr=self.vectors.divisor,
            scale_ptr=scale,
            numbers_ptr=self.operands.features["numbers_ptr"],
            out_ptr=out,
            dots_ptr=total if dots is None else dots,
            R=out.shape[1],
            V=v_rows,
            D=self.d,
            acc_q=total.stride(0),
            acc_r=total.stride(1),
            v_t=v_t,
            v_r=v_r,
            self_q=beside.stride(0),
            self_r=beside.stride(1),
            out_q=out.stride(0),
            out_r=out.stride(1),
            own_q=own_q,
            own_t=own_t,
            terms=0 if self.diagonal == NO_DIAGONAL else terms,
            shift=shift,
            own_shift=own_shift,
            wants_dots=int(dots is not None),
            BLOCK_R=ROWS,
            BLOCK_D=WIDTH,
        )
        return [] if dots is None else [dots]
