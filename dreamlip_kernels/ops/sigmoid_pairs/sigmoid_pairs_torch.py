"""Torch backend of sigmoid_pairs: one tile of logits at a time, visited once.

    u = -sign * z of a tile -> its softplus, summed -> g = sigmoid(u) with the sign of each pair -> dx += g y,
    dy += g.T x

On CUDA 16-bit features are multiplied as they are, with float32 sums: g is then rounded to their type, apart from each
image's own pairs, which are added in float32.

M rows, C columns, K captions per image, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operands import without_dropped
from ..products import accumulate, matmul, multiplies_sixteen_bit
from ..tiles import tiles

G_DIVISOR = 2.0**-15  # |g| is at most 1: over this divisor float16 holds it normally down to 2^-29


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
    def own(self) -> tuple[slice, slice]:
        """The images whose captions are among the columns, and these columns."""
        start = max(0, -self.first)
        stop = max(start, min(len(self.y) // self.k, len(self.x) - self.first))
        return slice(start + self.first, stop + self.first), slice(start * self.k, stop * self.k)

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


def _with_positives_negated(tile: Tensor, own: tuple[Tensor, Tensor], same: Tensor | None) -> Tensor:
    """The tile, which may be overwritten, with its positives negated: the pairs ``own``, or all of ``same``."""
    if same is not None:
        return torch.where(same, -tile, tile)
    tile[own] = -tile[own]
    return tile


class _Operands:
    """x and y as the products take them: 16-bit on CUDA, else in the accumulation dtype. What a mask drops is 0."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.sixteen_bit = pairs, multiplies_sixteen_bit(pairs.x)
        self.x = without_dropped(pairs.x if self.sixteen_bit else pairs.x.to(pairs.scale.dtype), pairs.x_mask)
        self.y = without_dropped(pairs.y, pairs.y_mask)
        self.x_scaled = self.x if self.sixteen_bit else self.x * pairs.scale

    def columns(self, cols: slice) -> Tensor:
        """y[cols]."""
        return self.y[cols] if self.sixteen_bit else self.y[cols].to(self.x.dtype)

    def logits(self, rows: slice, y_tile: Tensor) -> Tensor:
        """z of a tile."""
        z = matmul(self.x_scaled[rows], y_tile.T)
        if self.sixteen_bit:  # a scaled x would be rounded once more
            z.mul_(self.pairs.scale)
        return z.add_(self.pairs.bias)


class _Gradients:
    """dx += g y and dy += g.T x, of the sides that need them: the sums, before they are scaled."""

    def __init__(self, operands: _Operands, needs_x: bool, needs_y: bool):
        new_zeros = operands.pairs.scale.new_zeros
        self.operands = operands
        self.x = new_zeros(operands.x.shape) if needs_x else None
        self.y = new_zeros(operands.y.shape) if needs_y else None
        self.own = new_zeros(len(operands.y)) if operands.sixteen_bit else None

    def add(self, g: Tensor, rows: slice, cols: slice, y_tile: Tensor, own: tuple[Tensor, Tensor]) -> None:
        """The products of a tile's g, of which ``own`` are the places of images' own pairs."""
        if self.own is not None:
            self.own[cols].index_put_((own[1],), g[own])
            g = g.index_put_(own, g.new_zeros(())).div_(G_DIVISOR).to(y_tile.dtype)
        if self.x is not None:
            accumulate(self.x[rows], g, y_tile)
        if self.y is not None:
            accumulate(self.y[cols], g.T, self.operands.x[rows])

    def finish(self) -> None:
        """Multiply 16-bit products by what g was divided by, and add the pairs that they leave out."""
        if self.own is None:
            return
        images, captions = self.operands.pairs.own
        x, k = self.operands.x[images], self.operands.pairs.k
        y = self.operands.y[captions].unflatten(0, (images.stop - images.start, k))
        own = self.own[captions].view(y.shape[:2])
        if self.x is not None:
            self.x.mul_(G_DIVISOR)
            for slot in range(y.shape[1]):
                self.x[images].addcmul_(own[:, slot, None], y[:, slot])
        if self.y is not None:
            self.y.mul_(G_DIVISOR)
            self.y[captions].view(y.shape).addcmul_(own[..., None], x[:, None])


def _logits_by_sign(
    operands: _Operands, rows: slice, cols: slice, y_tile: Tensor, own: tuple[Tensor, Tensor], same: Tensor | None
) -> Tensor:
    """u of a tile, -sign * z: -inf where a mask leaves a pair out."""
    pairs = operands.pairs
    u = operands.logits(rows, y_tile)
    if same is not None and pairs.same_image == "ignore":
        u.masked_fill_(same.index_put_(own, same.new_zeros(())), -torch.inf)
        same = None
    u = _with_positives_negated(u, own, same)
    if pairs.y_mask is not None:
        u.masked_fill_(~pairs.y_mask[None, cols], -torch.inf)
    if pairs.x_mask is not None:
        u.masked_fill_(~pairs.x_mask[rows, None], -torch.inf)
    return u


def forward(pairs: Pairs, needs_x: bool, needs_y: bool, needs_scale: bool) -> tuple[Tensor, ...]:
    """The sum of the pairs' losses, dx [M, D] or [0], dy [C, D] or [0], dscale and dbias."""
    scale, dtype = pairs.scale, pairs.scale.dtype
    operands = _Operands(pairs)
    gradients = _Gradients(operands, needs_x, needs_y)
    total, dbias, g_dot = (scale.new_zeros((), dtype=torch.float64) for _ in range(3))
    through_features = needs_x or needs_y
    y_images = None if pairs.x_images is None else pairs.y_images
    for rows, cols in tiles(len(operands.x), len(operands.y), scale.device):
        y_tile, own = operands.columns(cols), pairs.positives(rows, cols)
        same = None
        if y_images is not None and pairs.x_images is not None:
            same = pairs.x_images[rows, None] == y_images[None, cols]
        u = _logits_by_sign(operands, rows, cols, y_tile, own, same)
        if not (through_features or needs_scale):
            total -= F.logsigmoid(u.neg_()).sum()
            continue
        total -= F.logsigmoid(-u).sum()
        g = _with_positives_negated(u.sigmoid_(), own, same if pairs.same_image == "positive" else None)
        dbias += g.sum()
        if needs_scale and not through_features:
            g_dot += (g * matmul(operands.x[rows], y_tile.T)).sum()
        gradients.add(g, rows, cols, y_tile, own)
    gradients.finish()
    dx, dy = gradients.x, gradients.y
    if dx is not None:
        g_dot = (operands.x * dx).sum(dtype=torch.float64)
    elif dy is not None:
        g_dot = (operands.y * dy).sum(dtype=torch.float64)
    dx, dy = (scale.new_zeros(0) if v is None else v.mul_(scale) for v in (dx, dy))
    return total.to(dtype), dx, dy, g_dot.to(dtype), dbias.to(dtype)
