"""What the backends of bidirectional_logsumexp are handed: the rectangle of pairs, and what comes back down to it.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rectangle:
    """The pairs (m, c) of every slot: x [M, D], y [K, C, D], a 0-dim scale, masks [M] and [K, C]."""

    x: Tensor
    y: Tensor
    scale: Tensor
    x_mask: Tensor | None = None
    y_mask: Tensor | None = None
    float32: str = "fp16"
    """How 16-bit kernels multiply float32 features: "fp16", or "torch" as its matmul precision says."""
    x_images: Tensor | None = None
    """[M] int32: the pairs whose image is one in ``y_images`` too are left out, apart from a row's own."""
    y_images: Tensor | None = None
    """[C] int32, of all slots."""

    @property
    def exact_float32(self) -> bool:
        """Whether features are float32 and each of their products three TF32 ones, nearly float32's own."""
        follows = self.x.dtype == torch.float32 and self.float32 == "torch"
        return follows and torch.get_float32_matmul_precision() == "highest"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(M, C, K, D)."""
        return self.x.shape[0], self.y.shape[1], self.y.shape[0], self.x.shape[1]


@dataclass(frozen=True)
class Upstream:
    """Forward's results with their upstream gradients: row and d_row [K, M], col and d_col [K, C].

    With d_pos [K, C] the pairs (diagonal + j, j) of the columns first_pair <= j < stop_pair, as far as there are such
    rows, are positives with that upstream, and pos [K, C] holds their logits. ``saved_pairs`` [K, M, C] is what
    forward saved: exp(z), at a large scale z, or None."""

    row: Tensor
    col: Tensor
    d_row: Tensor
    d_col: Tensor
    pos: Tensor | None = None
    d_pos: Tensor | None = None
    diagonal: int = 0
    first_pair: int = 0
    stop_pair: int = 2**30
    saved_pairs: Tensor | None = None


def paired_slices(m: int, c: int, upstream: Upstream) -> tuple[slice, slice]:
    """The rows and the columns of an m x c rectangle's pairs that are positives."""
    diagonal = upstream.diagonal
    first = min(c, max(0, -diagonal, upstream.first_pair))
    stop = max(first, min(c, m - diagonal, upstream.stop_pair))
    return slice(first + diagonal, stop + diagonal), slice(first, stop)


def add_own_pairs(rectangle: Rectangle, row: Tensor, col: Tensor, pos: Tensor) -> None:
    """Add the pairs (j, j), whose logits are pos [K, C], to log-sum-exps over all pairs but those of equal images."""
    n = min(rectangle.sizes[:2])
    own = pos[:, :n]
    for mask in (rectangle.x_mask, rectangle.y_mask):
        own = own if mask is None else torch.where(mask[..., :n], own, -torch.inf)
    for sums in (row, col):
        torch.logaddexp(sums[:, :n], own, out=sums[:, :n])
