"""Mean logits that a loss is drawn to, from sums over features.

N images in the world (n on this rank), K slots, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.collectives import Group, all_gather_rows, reduce_scatter_sum
from ..ops.logit_sums import logit_sums, sums_by_image
from .options import POSITIVE
from .same_image import Images


class Slots(NamedTuple):
    """The world's images and this rank's captions: x [N, D], y [K, n, D], masks [N] and [K, n], who is the same."""

    x: Tensor
    y: Tensor
    x_mask: Tensor | None
    y_mask: Tensor | None
    images: Images | None


class _Sums(NamedTuple):
    """Sums of logits with the numbers of their terms, [K, n] or broadcast to it: of rows over columns, and of columns
    over rows.
    """

    row: Tensor
    row_count: Tensor
    col: Tensor
    col_count: Tensor

    def means(self, over_slots: bool) -> tuple[Tensor, Tensor]:
        """The mean logit of each row, of all slots together where ``over_slots``, and of each column."""
        row, count = self.row, self.row_count.expand_as(self.row)
        if over_slots:
            row, count = (v.sum(0, keepdim=True).expand_as(v) for v in (row, count))
        return row / count.clamp(min=1), self.col / self.col_count.clamp(min=1)


def soft_targets(
    slots: Slots,
    scale: Tensor,
    pos: Tensor,
    own_target: Tensor,
    *,
    label_smoothing: float,
    same_image: str,
    over_slots: bool,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """What the log-sum-exps of rows and columns are to meet, [K, n] each, docs/math.md eq. 21-22.

    Args:
        pos: [K, n], the logits of this rank's own pairs.
        own_target: that of rows without an option: ``pos``, or [1, n] the logarithm of a sum.
        over_slots: whether a row's softmax is over the captions of all slots.
    """
    row_target, col_target = own_target, pos
    same = None
    if slots.images is not None:
        same = _sums(slots, scale, slots.images, group)
        if same_image == POSITIVE:
            row_target, col_target = same.means(over_slots)
    if label_smoothing:
        candidates = _sums(slots, scale, None, group)
        if same is not None and same_image != POSITIVE:
            candidates = _without_others(candidates, same, pos, slots.y_mask)
        row_mean, col_mean = candidates.means(over_slots)
        row_target = row_target * (1 - label_smoothing) + row_mean * label_smoothing
        col_target = col_target * (1 - label_smoothing) + col_mean * label_smoothing
    return row_target, col_target


def _sums(slots: Slots, scale: Tensor, images: Images | None, group: Group) -> _Sums:
    """Over all pairs of the world, or over those of equal images alone."""
    row, col = logit_sums(slots.x, slots.y, slots.x_mask, slots.y_mask, images)
    valid = slots.x.new_ones(slots.y.shape[1::-1], dtype=torch.bool) if slots.y_mask is None else slots.y_mask.T
    valid = all_gather_rows(valid.contiguous(), group).to(row.dtype)  # [N, K]
    if images is None:
        row_count = valid.sum(0)[:, None]
    else:
        row_count = sums_by_image(valid, images.world, len(valid))[images.own.long()].T
    col_count = _rows_of_each_column(slots, images).to(row.dtype)
    return _Sums(reduce_scatter_sum(row, group) * scale, row_count, col * scale, col_count)


def _rows_of_each_column(slots: Slots, images: Images | None) -> Tensor:
    """How many images are there, [1], or of each column's image, [n]."""
    present = slots.x.new_ones(len(slots.x), dtype=torch.int64) if slots.x_mask is None else slots.x_mask.long()
    if images is None:
        return present.sum(0, keepdim=True)
    return sums_by_image(present, images.world, len(present))[images.own.long()]


def _without_others(candidates: _Sums, same: _Sums, pos: Tensor, y_mask: Tensor | None) -> _Sums:
    """All candidates but those of the same image, whose own pair stays."""
    own_count = torch.ones_like(pos) if y_mask is None else y_mask.to(pos.dtype)
    own = pos if y_mask is None else torch.where(y_mask, pos, 0)
    return _Sums(
        candidates.row - same.row + own,
        candidates.row_count - same.row_count + own_count,
        candidates.col - same.col + own,
        candidates.col_count - same.col_count + own_count,
    )


def smoothing_of_sigmoids(
    slots: Slots, scale: Tensor, bias: Tensor, *, first: int, label_smoothing: float, same_image: str
) -> Tensor:
    """What smoothed labels add to each caption's sum of log-sigmoid losses, [K, n], docs/math.md eq. 23:
    ``label_smoothing`` times the sum of z over its positives less half of that over all its pairs.

    ``first`` is the row of this rank's first image.
    """
    own = slice(first, first + slots.y.shape[1])
    each = torch.arange(slots.y.shape[1], dtype=torch.int32, device=slots.y.device)
    of_own = slots._replace(
        x=slots.x[own], x_mask=None if slots.x_mask is None else slots.x_mask[own], images=Images(each, each)
    )
    everything = _sums_of_captions(slots._replace(images=None), scale, bias)
    positives = _sums_of_captions(of_own, scale, bias)
    if slots.images is not None:
        same = _sums_of_captions(slots, scale, bias)
        if same_image == POSITIVE:
            positives = same
        else:
            everything = everything - same + positives
    return label_smoothing * (positives - everything / 2)


def _sums_of_captions(slots: Slots, scale: Tensor, bias: Tensor) -> Tensor:
    """Of each caption, [K, n], the sum of scale * x . y + bias over all images, or over equal ones alone."""
    _, col = logit_sums(slots.x, slots.y, slots.x_mask, slots.y_mask, slots.images)
    count = _rows_of_each_column(slots, slots.images).expand(col.shape)
    count = count if slots.y_mask is None else torch.where(slots.y_mask, count, 0)
    return scale * col + bias * count.to(bias.dtype)
