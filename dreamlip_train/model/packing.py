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
    flat_BC = tokens.flatten(0, -2).numpy()
    count, context = flat_BC.shape
    length = -(-context // ALIGNMENT) * ALIGNMENT
    size_B = flat_BC.argmax(axis=-1) + 1 if count else np.zeros(0, dtype=np.int64)
    start_B, rows = _place(size_B, context, length)

    column_C = np.arange(context)
    kept_BC = column_C < size_B[:, None]
    target = (start_B[:, None] + column_C)[kept_BC]  # where each kept token goes, of the R*L positions
    packed, positions = np.zeros((2, rows * length), dtype=np.int64)
    captions = np.full(rows * length, -1)
    packed[target] = flat_BC[kept_BC]
    positions[target] = np.broadcast_to(column_C, kept_BC.shape)[kept_BC]
    captions[target] = np.repeat(np.arange(count), size_B)
    by_row = (torch.from_numpy(part).view(rows, length) for part in (packed, positions, captions))
    return PackedCaptions(*by_row, ends=torch.from_numpy(start_B + size_B - 1))


def _place(size_B: np.ndarray, context: int, length: int) -> tuple[np.ndarray, int]:
    """(where each caption starts, of the positions of all rows one after another; the number of rows)."""
    counts = np.bincount(size_B, minlength=context + 1)
    of_size = np.split(np.argsort(size_B, kind="stable"), np.cumsum(counts)[:-1])  # the captions of each size, in order
    placed = [0] * (context + 1)  # how many of each size have their place
    start_B, rows = np.zeros(len(size_B), dtype=np.int64), 0
    for layout, times in _layouts(counts.tolist(), length):
        first_position = np.arange(rows, rows + times) * length
        for size in layout:
            captions = of_size[size][placed[size] : placed[size] + times]  # one for each row of this layout
            start_B[captions] = first_position
            placed[size] += times
            first_position = first_position + size
        rows += times
    return start_B, rows


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
