"""The pairs of a rectangle of logits that are positives: one column each, at a fixed distance from the diagonal.

C columns, M rows, K slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


def paired_slices(m: int, c: int, diagonal: int) -> tuple[slice, slice]:
    """The rows and the columns of the pairs (diagonal + j, j) that an m x c rectangle has."""
    first, stop = min(c, max(0, -diagonal)), max(0, min(c, m - diagonal))
    stop = max(first, stop)
    return slice(first + diagonal, stop + diagonal), slice(first, stop)


def paired_dot(x: Tensor, y: Tensor) -> Tensor:
    """``torch.einsum("cd,kcd->kc", x.float(), y.float())`` with one slot in float32 at a time: x [C, D], y [K, C, D] -> [K, C]."""
    x = x.to(accumulate_dtype(x))
    out = x.new_empty(y.shape[:2])
    for slot, dots in zip(y, out, strict=True):
        torch.sum(x * slot, dim=-1, out=dots)
    return out
