"""A matrix too large to store, one tile at a time: what the torch backends iterate over."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Logits a tile holds: small enough for a CPU's caches, large enough to fill a GPU.
TILE_LOGITS = {"cpu": 2**20, "cuda": 2**24}


def tiles(m: int, c: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices (rows, columns) that cover an m x c rectangle in tiles of a bounded number of logits."""
    budget = TILE_LOGITS.get(device.type, TILE_LOGITS["cpu"])
    block_c = max(1, min(c, 1 << (budget.bit_length() // 2)))
    block_m = max(1, min(m, budget // block_c))
    for i in range(0, m, block_m):
        for j in range(0, c, block_c):
            yield slice(i, min(i + block_m, m)), slice(j, min(j + block_c, c))
