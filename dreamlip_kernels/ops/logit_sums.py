"""Sums of logits over many columns or rows at once: linear in the features, so that no tile of pairs is visited.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


def logit_sums(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    images: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``p = torch.einsum("md,kcd->kmc", x, y); return p.sum(2), p.sum(1)`` without the [K, M, C] products.

    Args:
        x: [M, D].  y: [K, C, D].  x_mask: [M] and y_mask: [K, C] bool; False leaves a row or column out.
        images: numbers of images, [M] and [C] int32 in 0 .. M - 1; sums are then over the pairs of equal ones alone.

    Returns:
        row [K, M] and col [K, C] of at least float32, differentiable once in x and y; 0 where a mask is False.
    """
    return _LogitSums.apply(x, y, x_mask, y_mask, *(images or (None, None)))


class _LogitSums(torch.autograd.Function):
    """One slot at a time: what a slot needs in float32 is as large as x, and nothing of it is kept."""

    @staticmethod
    def forward(ctx, x, y, x_mask, y_mask, x_images, y_images):
        ctx.save_for_backward(x, y, x_mask, y_mask, x_images, y_images)
        (k, c, _), m = y.shape, len(x)
        rows = _read(x, x_mask)
        row, col = rows.new_empty(k, m), rows.new_empty(k, c)
        row_sums = _sums(rows, x_images, m)
        for slot in range(k):
            columns = _read(y[slot], None if y_mask is None else y_mask[slot])
            row[slot] = (rows * _of_each(_sums(columns, y_images, m), x_images)).sum(1)
            col[slot] = (columns * _of_each(row_sums, y_images)).sum(1)
        return row, col

    @staticmethod
    def backward(ctx, d_row, d_col):
        x, y, x_mask, y_mask, x_images, y_images = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad[:2]
        m, rows = len(x), _read(x, x_mask)
        row_sums = _sums(rows, x_images, m)
        d_row_sums, dx = torch.zeros_like(row_sums), torch.zeros_like(rows)
        dy = torch.empty_like(y) if needs_y else y.new_empty(0)
        for slot in range(len(y)):
            mask = None if y_mask is None else y_mask[slot]
            of_row, of_col = d_row[slot, :, None], d_col[slot, :, None]
            if needs_x:
                columns = _read(y[slot], mask)
                dx += of_row * _of_each(_sums(columns, y_images, m), x_images)
                d_row_sums += _sums(of_col * columns, y_images, m)
            if needs_y:
                each = of_col * _of_each(row_sums, y_images) + _of_each(_sums(of_row * rows, x_images, m), y_images)
                dy[slot] = each if mask is None else each.masked_fill(~mask[:, None], 0)
        dx += _of_each(d_row_sums, x_images)
        dx = dx if x_mask is None else dx.masked_fill(~x_mask[:, None], 0)
        return dx.to(x.dtype) if needs_x else None, dy if needs_y else None, None, None, None, None


def _read(v: Tensor, mask: Tensor | None) -> Tensor:
    v = v.to(accumulate_dtype(v))
    return v if mask is None else v.masked_fill(~mask[:, None], 0)


def _sums(v: Tensor, images: Tensor | None, count: int) -> Tensor:
    """The sum of v [R, D] over all, [1, D], or over each image, [count, D]."""
    return v.sum(0, keepdim=True) if images is None else sums_by_image(v, images, count)


def sums_by_image(v: Tensor, images: Tensor, count: int) -> Tensor:
    """v [R, ...] summed over the rows of each image -> [count, ...]; the same inputs give the same bits."""
    total = v.new_zeros(count, *v.shape[1:])
    if v.is_cuda:  # index_add_ would add by atomics there, in any order; this sorts
        return total.index_put_((images.long(),), v, accumulate=True)
    return total.index_add_(0, images, v)


def _of_each(sums: Tensor, images: Tensor | None) -> Tensor:
    """The sum that belongs to each row: sums [1, D] itself, or [R, D]."""
    return sums if images is None else sums[images.long()]
