"""A step's captions packed one after another into rows of one length: the text tower's work follows the real tokens,
and its shapes stay.

The tower is causal and pools at the end token: with attention kept within each caption and positions counted from its
start, a caption's feature is the one it has alone in a padded row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNMENT = 16  # row lengths are multiples of it: tensor cores and attention kernels want no less


@dataclass(frozen=True)
class PackedCaptions:
    """B captions in R rows of L positions; what is left of a row is caption -1, which only sees itself.

    tokens [R,L]; positions [R,L], within the caption; captions [R,L], whose token it is;
    ends [B], index of each caption's end token into R*L. All int64.
    """

    tokens: Tensor
    positions: Tensor
    captions: Tensor
    ends: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedCaptions:
        """The same on ``device``."""
        return PackedCaptions(
            *(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        )


def pack_captions(tokens: Tensor) -> PackedCaptions:
    """The captions of token rows [..., C], longest first into rows of C rounded up to 16;
    on sub-captions 97 to 99 % of the positions hold a token.

    Args:
        tokens: on the CPU, the end token the largest of its row (CLIP's has the highest id);
            what stands after it is dropped.
    """
    flat = tokens.flatten(0, -2).numpy()
    count, context = flat.shape
    length = -(-context // ALIGNMENT) * ALIGNMENT
    sizes = flat.argmax(axis=-1) + 1 if count else np.zeros(0, dtype=np.int64)
    waiting = np.split(np.argsort(sizes, kind="stable"), np.cumsum(np.bincount(sizes, minlength=context + 1))[:-1])
    starts, rows, taken = np.zeros(count, dtype=np.int64), 0, [0] * (context + 1)
    for layout, times in _layouts(np.bincount(sizes, minlength=context + 1).tolist(), length):
        begin = 0
        for size in layout:
            which = waiting[size][taken[size] : taken[size] + times]
            starts[which] = np.arange(rows, rows + times) * length + begin
            taken[size] += times
            begin += size
        rows += times
    column = np.arange(context)
    kept = column < sizes[:, None]
    target = (starts[:, None] + column)[kept]
    packed = np.zeros((3, rows * length), dtype=np.int64)
    packed[2] = -1
    packed[:, target] = flat[kept], np.broadcast_to(column, kept.shape)[kept], np.repeat(np.arange(count), sizes)
    tokens, positions, captions = torch.from_numpy(packed).view(3, rows, length)
    return PackedCaptions(tokens, positions, captions, torch.from_numpy(starts + sizes - 1))


def _layouts(counts: list[int], length: int) -> Iterator[tuple[list[int], int]]:
    """(sizes of a row's captions in order, how many such rows), for ``counts[size]`` captions of each size:
    always the longest that still fit.
    """
    while any(counts):
        layout, left = [], length
        for size in range(len(counts) - 1, 0, -1):
            fit = min(counts[size], left // size)
            layout += [size] * fit
            left -= fit * size
        times = min(counts[size] // layout.count(size) for size in set(layout))
        for size in layout:
            counts[size] -= times
        yield layout, times


class RowAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention of x with itself, whose additive mask may differ by row, [R,1,L,L], without a copy of it
    for each head.

    Called as open_clip's blocks do. That key and value are x is taken for granted: under ZeRO-3 they arrive as three
    views of it.
    """

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        q, k, v = (
            F.linear(x, self.in_proj_weight, self.in_proj_bias)
            .unflatten(-1, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def row_mask(captions: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [R,1,L,L] of ``PackedCaptions.captions``: 0 where a token sees another of its caption at
    or before it, else -inf.
    """
    seen = (captions[:, :, None] == captions[:, None, :]).tril()
    return torch.zeros((), dtype=dtype, device=captions.device).where(seen, -torch.inf)[:, None]
