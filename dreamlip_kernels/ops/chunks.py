"""Which slots, rows and columns of the gradient's coefficients G are held at once.

M rows, C columns, K slots, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..backends.settings import settings

PITCH = 64  # columns that rows of G are apart in multiples of: 128 bytes, a line of the caches


class Chunk(NamedTuple):
    """Slots, rows and columns whose G is held at once."""

    slots: int
    rows: int
    cols: int


def chunks(m: int, c: int, k: int, element_bytes: int) -> Chunk:
    """All pairs at once where G fits the workspace; else whole along the shorter side and balanced along the longer."""
    room = max(2**14, settings.workspace_bytes // element_bytes)
    width = up(c, 8)
    if m * up(k * width) <= room:
        return Chunk(k, m, c)
    if m > k * c:
        rows = _balanced(m, room // up(k * width))
        if rows >= 128:
            return Chunk(k, rows, c)
        columns = min(c, max(128, _balanced(c, room // min(m, 128))))
        return Chunk(1, min(m, max(128, _balanced(m, room // up(columns)))), columns)
    slots = room // (m * width)
    if slots >= 1:
        return Chunk(-(-k // -(-k // slots)), m, c)
    columns = min(c, max(128, _balanced(c, room // m)))
    return Chunk(1, min(m, max(128, room // up(columns))), columns)


def _balanced(long: int, most: int) -> int:
    """At most ``most`` of ``long`` at a time, in multiples of 128 and parts as equal as can be."""
    most = most // 128 * 128
    return 0 if most == 0 else min(long, up(-(-long // -(-long // most)), 128))


def up(value: int, step: int = PITCH) -> int:
    """``value`` rounded up to a multiple of ``step``."""
    return -(-value // step) * step


def joined(y: Tensor) -> Tensor:
    """y [K, C, D] with slots one after the other and C rounded up to 8 by rows of zeros:
    all slots are then one matrix.
    """
    k, c, d = y.shape
    if c % 8 == 0:
        return y.contiguous()
    rows = y.new_zeros(k, up(c, 8), d)
    rows[:, :c] = y
    return rows
