"""Torch backend of sigmoid_pairs: one tile of logits at a time, visited once.

    u = -sign * z of a tile -> its softplus, summed -> g = sigmoid(u) with the sign of each pair -> dx += g y,
    dy += g.T x

M rows, C columns, K captions per image, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tiles import tiles


class Pairs(NamedTuple):
    """A rectangle of pairs, of which (first + c // k, c) are positives."""

    x: Tensor  # [M, D]
    y: Tensor  # [C, D]
    scale: Tensor  # []
    bias: Tensor  # []
    x_mask: Tensor | None  # [M] bool
    y_mask: Tensor | None  # [C] bool
    first: int
    k: int
    float32: str = "torch"  # how 16-bit kernels multiply float32 features, see backends/settings.py
    x_images: Tensor | None = None  # [M] int32, equal where images are the same
    same_image: str = "ignore"  # other captions of the same image: "ignore" them, or "positive"

    @property
    def y_images(self) -> Tensor:
        """[C]: the images that captions are of."""
        assert self.x_images is not None
        return self.x_images[self.first : self.first + len(self.y) // self.k].repeat_interleave(self.k)

    def positives(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns of a tile's positives, counted from its corner: one stretch of columns,
        for images and captions are in the same order.
        """
        start = max(cols.start, (rows.start - self.first) * self.k)
        stop = max(start, min(cols.stop, (rows.stop - self.first) * self.k))
        column = torch.arange(start, stop, device=self.x.device)
        return column // self.k + (self.first - rows.start), column - cols.start


def kept(v: Tensor, mask: Tensor | None) -> Tensor:
    """``v`` with zeros in the rows that the mask drops, whatever they hold."""
    return v if mask is None else v.masked_fill(~mask[:, None], 0)


def _with_positives_negated(tile: Tensor, own: tuple[Tensor, Tensor], same: Tensor | None) -> Tensor:
    """The tile, which may be overwritten, with its positives negated: the pairs ``own``, or all of ``same``."""
    if same is not None:
        return torch.where(same, -tile, tile)
    tile[own] = -tile[own]
    return tile


def forward(pairs: Pairs, needs_x: bool, needs_y: bool, needs_scale: bool) -> tuple[Tensor, ...]:
    """The sum of the pairs' losses, dx [M, D] or [0], dy [C, D] or [0], dscale and dbias."""
    scale, bias = pairs.scale, pairs.bias
    dtype = scale.dtype
    x, y = kept(pairs.x.to(dtype), pairs.x_mask), kept(pairs.y, pairs.y_mask)
    x_scaled = x * scale
    dx = x.new_zeros(x.shape if needs_x else 0)
    dy = x.new_zeros(y.shape if needs_y else 0)
    total, dbias, g_dot = (x.new_zeros((), dtype=torch.float64) for _ in range(3))
    through_features = needs_x or needs_y
    y_images = None if pairs.x_images is None else pairs.y_images
    for rows, cols in tiles(x.shape[0], y.shape[0], x.device):
        y_tile = y[cols].to(dtype)
        u = (x_scaled[rows] @ y_tile.T).add_(bias)
        own = pairs.positives(rows, cols)
        same = (
            None if y_images is None or pairs.x_images is None else pairs.x_images[rows, None] == y_images[None, cols]
        )
        if same is not None and pairs.same_image == "ignore":
            u.masked_fill_(same.index_put_(own, same.new_zeros(())), -torch.inf)
            same = None
        u = _with_positives_negated(u, own, same)
        if pairs.y_mask is not None:
            u.masked_fill_(~pairs.y_mask[None, cols], -torch.inf)
        if pairs.x_mask is not None:
            u.masked_fill_(~pairs.x_mask[rows, None], -torch.inf)
        if not (through_features or needs_scale):
            total -= F.logsigmoid(u.neg_()).sum()
            continue
        total -= F.logsigmoid(-u).sum()
        g = u.sigmoid_()
        g = _with_positives_negated(g, own, same)
        dbias += g.sum()
        if needs_x:
            dx[rows].addmm_(g, y_tile)
        if needs_y:
            dy[cols].addmm_(g.T, x[rows])
        if needs_scale and not through_features:
            g_dot += (g * (x[rows] @ y_tile.T)).sum()
    if needs_x:
        g_dot = (x * dx).sum(dtype=torch.float64)
        dx.mul_(scale)
    elif needs_y:
        g_dot = (y * dy).sum(dtype=torch.float64)
    if needs_y:
        dy.mul_(scale)
    return total.to(dtype), dx, dy, g_dot.to(dtype), dbias.to(dtype)
