"""The bidirectional log-sum-exp over ranks: images travel, captions stay, and neither way is waited for where there is
work (docs/math.md section 2).

    forward   gather the images || this rank's images x its captions; then the others' images x its captions;
              row sums over ranks
    backward  a stretch of every rank's rows at a time: its gradient, whose sum over ranks travels || the next stretch's

With one process it is ``bidirectional_logsumexp`` and issues no collective. n images a rank, N = n * ranks, K slots,
D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.settings import float32_products
from ..ops.logsumexp.logsumexp import logsumexp, logsumexp_backward_op, logsumexp_op
from .collectives import Group, all_gather_rows, rank_and_size, reduce_scatter_logsumexp

# Backward goes in so many stretches where each still has rows enough to fill a device.
STRETCHES, ROWS_A_STRETCH = 4, 4096


def gathered_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, backend: str, group: Group = None
) -> tuple[Tensor, Tensor, Tensor]:
    """row [K, n] of this rank's x [n, D] over the world's columns, col [K, n] of its y [K, n, D] over the world's rows,
    and the logits pos [K, n] of (j, j).
    """
    if rank_and_size(group)[1] == 1:
        return logsumexp(x, y, scale, x_mask, y_mask, paired=True, backend=backend)
    x_mask = None if x_mask is None else all_gather_rows(x_mask, group)
    row, col, pos = _GatheredLogsumexp.apply(x, y, scale, x_mask, y_mask, backend, group)
    return reduce_scatter_logsumexp(row, group), col, pos


def _part(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]


class _GatheredLogsumexp(torch.autograd.Function):
    """row [K, N] over this rank's columns alone, col [K, n] over all rows, pos [K, n]."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
        backend: str,
        group: Group,
    ):
        rank, world = rank_and_size(group)
        n = x.shape[0]
        own = slice(rank * n, (rank + 1) * n)
        everyone = x.new_empty(world * n, *x.shape[1:])
        travelling = dist.all_gather_into_tensor(everyone, x.contiguous(), group=group, async_op=True)
        keep, float32 = False, float32_products(x)
        row_own, col, pos, _ = logsumexp_op(x, y, scale, _part(x_mask, own), y_mask, True, keep, float32, backend)
        travelling.wait()
        rows = [row_own]
        for before, others in ((True, slice(0, own.start)), (False, slice(own.stop, world * n))):
            if others.stop > others.start:
                part, part_mask = everyone[others], _part(x_mask, others)
                row_part, col_part, *_ = logsumexp_op(part, y, scale, part_mask, y_mask, False, keep, float32, backend)
                rows.insert(0, row_part) if before else rows.append(row_part)
                col = torch.logaddexp(col, col_part)
        row = torch.cat(rows, dim=1)
        ctx.save_for_backward(everyone, y, scale, x_mask, y_mask, row, col, pos)
        ctx.backend, ctx.group, ctx.float32 = backend, group, float32
        return row, col, pos

    @staticmethod
    def backward(ctx, d_row: Tensor, d_col: Tensor, d_pos: Tensor):
        everyone, y, scale, x_mask, y_mask, row, col, pos = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad[:2]
        rank, world = rank_and_size(ctx.group)
        total, k = len(everyone), len(y)
        n = total // world
        count = max(1, min(STRETCHES, total // ROWS_A_STRETCH, n))
        dx, dy, dscale = [], None, torch.zeros_like(scale)
        travelling = []
        for start, stop in ((i * n // count, (i + 1) * n // count) for i in range(count)):
            stretch = stop - start
            part = everyone.view(world, n, everyone.shape[1])[:, start:stop].reshape(world * stretch, everyone.shape[1])
            row_part, d_row_part = (
                v.view(k, world, n)[:, :, start:stop].reshape(k, world * stretch) for v in (row, d_row)
            )
            dx_part, dy_part, dscale_part = logsumexp_backward_op(
                part,
                y,
                scale,
                None if x_mask is None else x_mask.view(world, n)[:, start:stop].reshape(-1),
                y_mask,
                row_part,
                col,
                pos,
                None,
                d_row_part,
                d_col,
                d_pos,
                # The positives of this stretch: its own rows begin at rank * stretch, its columns are start to stop.
                rank * stretch - start,
                start,
                stop,
                needs_x,
                needs_y,
                ctx.float32,
                ctx.backend,
                True,
            )
            if needs_x:
                own = dx_part.new_empty(stretch, dx_part.shape[1])
                # The sums of W partial gradients are float32: 16 bits would lose what each rank's accumulation kept.
                travelling.append((dist.reduce_scatter_tensor(own, dx_part, group=ctx.group, async_op=True), dx_part))
                dx.append(own)
            dy = dy_part if dy is None else dy.add_(dy_part)
            dscale += dscale_part
        for work, _ in travelling:
            work.wait()
        dx = torch.cat(dx).to(everyone.dtype) if needs_x else None
        return dx, dy.to(y.dtype) if needs_y else None, dscale, None, None, None, None
