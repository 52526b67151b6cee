"""Torch code of sigmoid_captions: one tile of logits at a time, in forward and once more in backward.

    u = -sign * z of a tile -> its softplus, summed over rows; g = sigmoid(u) with the sign of each pair and the weight
    of its caption -> dx += g y, dy += g.T x

M rows, C columns, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operands import without_dropped
from ..tiles import tiles
from .sigmoid_pairs_torch import Pairs


def forward(pairs: Pairs) -> Tensor:
    """The sum of each caption's losses over all rows, [C]."""
    x, y = _operands(pairs)
    x_scaled, total_C = x * pairs.scale, x.new_zeros(len(y), dtype=torch.float64)
    for rows, cols in tiles(len(x), len(y), x.device):
        u, _ = _negated_logits(pairs, x_scaled, y[cols].to(x.dtype), rows, cols)
        total_C[cols] -= F.logsigmoid(u.neg_()).sum(0)
    return total_C.to(x.dtype)


def backward(pairs: Pairs, d_loss: Tensor, needs_x: bool, needs_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [M, D], dy [C, D], dscale and dbias of d_loss [C]; [0] in place of a side that needs none."""
    x, y = _operands(pairs)
    x_scaled = x * pairs.scale
    dx, dy = x.new_zeros(x.shape if needs_x else 0), x.new_zeros(y.shape if needs_y else 0)
    dscale, dbias = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    for rows, cols in tiles(len(x), len(y), x.device):
        y_tile = y[cols].to(x.dtype)
        u, positive = _negated_logits(pairs, x_scaled, y_tile, rows, cols)
        g = u.sigmoid_()
        g = torch.where(positive, -g, g).mul_(d_loss[cols])
        dbias += g.sum()
        gx = g.T @ x[rows]
        dscale += (gx * y_tile).sum()
        if needs_x:
            dx[rows].addmm_(g, y_tile)
        if needs_y:
            dy[cols] += gx
    return dx.mul_(pairs.scale), dy.mul_(pairs.scale), dscale.to(x.dtype), dbias.to(x.dtype)


def _operands(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """x in the accumulation dtype and y, of which a tile is converted at a time; what a mask drops is 0."""
    return without_dropped(pairs.x.to(pairs.scale.dtype), pairs.x_mask), without_dropped(pairs.y, pairs.y_mask)


def _negated_logits(pairs: Pairs, x_scaled: Tensor, y_tile: Tensor, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
    """u = -sign * z of a tile, -inf where a pair is no question; and which pairs are positives."""
    z = (x_scaled[rows] @ y_tile.T).add_(pairs.bias)
    own = pairs.positives(rows, cols)
    positive = torch.zeros_like(z, dtype=torch.bool)
    positive.index_put_(own, positive.new_ones(()))
    if pairs.x_images is not None:
        same = pairs.x_images[rows, None] == pairs.y_images[None, cols]
        if pairs.same_image == "ignore":
            z.masked_fill_(same & ~positive, -torch.inf)
        else:
            positive = same
    u = torch.where(positive, -z, z)
    if pairs.y_mask is not None:
        u.masked_fill_(~pairs.y_mask[None, cols], -torch.inf)
    if pairs.x_mask is not None:
        u.masked_fill_(~pairs.x_mask[rows, None], -torch.inf)
    return u, positive
