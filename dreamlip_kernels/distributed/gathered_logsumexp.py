"""The bidirectional log-sum-exp over ranks: images travel, captions stay, and neither way is waited for where there is
work (docs/math.md section 2).

    forward   gather the images || this rank's images x its captions; then the others' images x its captions;
              row sums over ranks
    backward  a stretch of every rank's rows at a time: its gradient, whose sum over ranks travels || the next stretch's

With one process it is ``bidirectional_logsumexp`` and issues no collective. Each direction is one registered op, so
torch.compile keeps both whole and their collectives asynchronous. n images a rank, N = n * ranks, K slots, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.settings import float32_products
from ..numerics import accumulate_dtype
from ..ops.logsumexp.logsumexp import logsumexp, logsumexp_backward_op, logsumexp_op
from .collectives import Group, all_gather_rows, group_name, group_of_name, rank_and_size, reduce_scatter_logsumexp

# Backward goes in so many stretches where each still has rows enough to fill a device.
STRETCHES, ROWS_A_STRETCH = 4, 4096


class GatheredLogsumexp(NamedTuple):
    """row [K, n] of this rank's x [n, D] over the world's columns, col [K, n] of its y [K, n, D] over the world's rows,
    the logits pos [K, n] of (j, j), and what travelled for them: x [N, D] and x_mask [N] of all ranks.
    """

    row: Tensor
    col: Tensor
    pos: Tensor
    x: Tensor
    x_mask: Tensor | None


def gathered_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    backend: str,
    group: Group = None,
    x_images: Tensor | None = None,
) -> GatheredLogsumexp:
    """The log-sum-exps of this rank's features, differentiable, as every rank's x is too.

    With x_images [N] int32, every rank's, pairs whose images are equal are left out; (j, j) stay.
    """
    if rank_and_size(group)[1] == 1:
        each = logsumexp(x, y, scale, x_mask, y_mask, paired=True, backend=backend, x_images=x_images)
        return GatheredLogsumexp(*each, x, x_mask)
    x_mask = None if x_mask is None else all_gather_rows(x_mask, group)
    options = float32_products(x), backend, group_name(group), x_images
    row, col, pos, everyone = gathered_logsumexp_op(x, y, scale, x_mask, y_mask, *options)
    return GatheredLogsumexp(reduce_scatter_logsumexp(row, group), col, pos, everyone, x_mask)


@torch.library.custom_op("dreamlip_kernels::gathered_logsumexp", mutates_args=())
def gathered_logsumexp_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    float32: str,
    backend: str,
    group: str,
    x_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row [K, N] over this rank's columns alone, col [K, n] over all rows, pos [K, n], and every rank's x [N, D].

    x_mask [N] and x_images [N] are every rank's already; ``group`` is the name of a process group. All four are
    differentiable.
    """
    process_group = group_of_name(group)
    rank, world = rank_and_size(process_group)
    n = x.shape[0]
    own = slice(rank * n, (rank + 1) * n)
    everyone = x.new_empty(world * n, *x.shape[1:])
    travelling = dist.all_gather_into_tensor(everyone, x.contiguous(), group=process_group, async_op=True)
    y_images = _part(x_images, own)
    settings = dict(keep=False, float32=float32, backend=backend, y_images=y_images)
    row_own, col, pos, _ = logsumexp_op(
        x, y, scale, _part(x_mask, own), y_mask, paired=True, x_images=y_images, **settings
    )
    assert travelling is not None
    travelling.wait()
    rows = [row_own]
    for before, others in ((True, slice(0, own.start)), (False, slice(own.stop, world * n))):
        if others.stop > others.start:
            images = _part(x_images, others)
            row_part, col_part, *_ = logsumexp_op(
                everyone[others], y, scale, _part(x_mask, others), y_mask, paired=False, x_images=images, **settings
            )
            rows.insert(0, row_part) if before else rows.append(row_part)
            col = torch.logaddexp(col, col_part)
    return torch.cat(rows, dim=1), col, pos, everyone


@gathered_logsumexp_op.register_fake
def _(x, y, scale, x_mask, y_mask, float32, backend, group, x_images=None):
    k, c, d = y.shape
    rows, dtype = x.shape[0] * rank_and_size(group_of_name(group))[1], accumulate_dtype(x)
    return (
        x.new_empty(k, rows, dtype=dtype),
        x.new_empty(k, c, dtype=dtype),
        x.new_empty(k, c, dtype=dtype),
        x.new_empty(rows, d),
    )


@torch.library.custom_op("dreamlip_kernels::gathered_logsumexp_backward", mutates_args=())
def gathered_logsumexp_backward_op(
    everyone: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    row: Tensor,
    col: Tensor,
    pos: Tensor,
    d_row: Tensor,
    d_col: Tensor,
    d_pos: Tensor,
    d_everyone: Tensor | None,
    needs_x: bool,
    needs_y: bool,
    float32: str,
    backend: str,
    group: str,
    x_images: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [n, D], summed over the ranks, dy (strided as y) and dscale; a side that needs no gradient comes back without
    an element.
    """
    process_group = group_of_name(group)
    rank, world = rank_and_size(process_group)
    total = len(everyone)
    n = total // world
    count = max(1, min(STRETCHES, total // ROWS_A_STRETCH, n))
    y_images = _part(x_images, slice(rank * n, (rank + 1) * n))
    dx, dy, dscale = [], y.new_empty(0), torch.zeros_like(scale)
    travelling = []
    for start, stop in ((i * n // count, (i + 1) * n // count) for i in range(count)):
        stretch = stop - start
        # The stretch of every rank's rows, of what has rows first, and of what has slots first.
        part, mask_part, d_part, images_part = (
            None if v is None else v.unflatten(0, (world, n))[:, start:stop].flatten(0, 1)
            for v in (everyone, x_mask, d_everyone, x_images)
        )
        row_part, d_row_part = (v.unflatten(1, (world, n))[:, :, start:stop].flatten(1) for v in (row, d_row))
        # The positives of this stretch: its own rows begin at rank * stretch, its columns are start to stop.
        positives = rank * stretch - start, start, stop
        masked, rows, upstream = (mask_part, y_mask), (row_part, col, pos, None), (d_row_part, d_col, d_pos)
        options = needs_x, needs_y, float32, backend, True, images_part, y_images
        dx_part, dy_part, dscale_part = logsumexp_backward_op(
            part, y, scale, *masked, *rows, *upstream, *positives, *options
        )
        if needs_x:
            dx_part = dx_part if d_part is None else dx_part.add_(d_part)
            own = dx_part.new_empty(stretch, dx_part.shape[1])
            # The sums of W partial gradients are float32: 16 bits would lose what each rank's accumulation kept.
            travelling.append((dist.reduce_scatter_tensor(own, dx_part, group=process_group, async_op=True), dx_part))
            dx.append(own)
        dy = dy_part if start == 0 else dy.add_(dy_part)
        dscale += dscale_part
    for work, _ in travelling:
        work.wait()
    dx = torch.cat(dx).to(everyone.dtype) if needs_x else everyone.new_empty(0)
    return dx, dy.to(y.dtype) if needs_y else y.new_empty(0), dscale


@gathered_logsumexp_backward_op.register_fake
def _(everyone, y, scale, x_mask, y_mask, row, col, pos, d_row, d_col, d_pos, d_everyone, needs_x, needs_y, *options):
    (rows, d), group = everyone.shape, options[-2]
    return (
        everyone.new_empty((rows // rank_and_size(group_of_name(group))[1], d) if needs_x else 0),
        torch.empty_like(y) if needs_y else y.new_empty(0),
        torch.empty_like(scale),
    )


def _setup_context(ctx, inputs, output):
    _, y, scale, x_mask, y_mask, ctx.float32, ctx.backend, ctx.group, x_images = inputs
    row, col, pos, everyone = output
    ctx.set_materialize_grads(False)  # of every rank's x, a gradient of zeros would be as large as they are
    if not ctx.needs_input_grad[0]:
        ctx.mark_non_differentiable(everyone)
    ctx.save_for_backward(x_images, everyone, y, scale, x_mask, y_mask, row, col, pos)


def _backward(ctx, d_row, d_col, d_pos, d_everyone):
    x_images, everyone, y, scale, x_mask, y_mask, *outputs = ctx.saved_tensors
    upstream = (torch.zeros_like(v) if d is None else d for v, d in zip(outputs, (d_row, d_col, d_pos), strict=True))
    needs = ctx.needs_input_grad[:2]
    arguments = everyone, y, scale, x_mask, y_mask, *outputs, *upstream, d_everyone
    options = *needs, ctx.float32, ctx.backend, ctx.group, x_images
    dx, dy, dscale = gathered_logsumexp_backward_op(*arguments, *options)
    gradients = zip((dx, dy, dscale), ctx.needs_input_grad, strict=False)
    return *(d if needed else None for d, needed in gradients), *[None] * 6


gathered_logsumexp_op.register_autograd(_backward, setup_context=_setup_context)


def _part(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]
