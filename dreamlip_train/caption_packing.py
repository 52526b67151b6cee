"""Captions of a step in groups of like length, each run through the text tower at its own length: its work follows the real tokens.

The tower is causal and pools at the end token, so what stands after it changes nothing: any length that holds the end token gives the same feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

STEP = 8  # lengths are multiples of it: as many as matter, few enough for kernels chosen by shape
SMALLEST = 16  # captions a group: below that the tower's calls cost more than the padding


@dataclass(frozen=True)
class Buckets:
    """``groups``: (rows, length) of each, rows into the step's B captions; ``inverse`` [B]: where each caption is in the groups' concatenation."""

    groups: tuple[tuple[Tensor, int], ...]
    inverse: Tensor

    def to(self, device: torch.device) -> Buckets:
        """The same with its indices on ``device``."""
        return Buckets(
            tuple((rows.to(device, non_blocking=True), length) for rows, length in self.groups), self.inverse.to(device, non_blocking=True)
        )


def length_buckets(tokens: Tensor, most: int) -> Buckets | None:
    """The at most ``most`` groups that leave the fewest padded tokens; None where one group is best.

    Args:
        tokens: [..., L] on the CPU, the end token the largest of its row (CLIP's has the highest id).
    """
    flat = tokens.flatten(0, -2)
    lengths = flat.argmax(dim=-1) + 1
    longest = int(lengths.max()) if len(lengths) else 0
    if most <= 1 or len(lengths) < 2 * SMALLEST:
        return None
    rounded = ((lengths + STEP - 1) // STEP * STEP).clamp(max=flat.shape[1])
    counts = {length: int((rounded == length).sum()) for length in rounded.unique().tolist()}
    bounds = _best_bounds(counts, most)
    if len(bounds) == 1:
        return None
    group_of = torch.bucketize(rounded, torch.tensor(bounds))
    order = group_of.argsort(stable=True)
    rows = order.split(torch.bincount(group_of, minlength=len(bounds)).tolist())
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return Buckets(tuple((row, min(bound, longest)) for row, bound in zip(rows, bounds, strict=True)), inverse)


def _best_bounds(counts: dict[int, int], most: int) -> list[int]:
    """The upper lengths of at most ``most`` groups, each of at least SMALLEST captions, with the least ``sum(captions * length)``."""
    lengths = sorted(counts)
    best, least = [lengths[-1]], lengths[-1] * sum(counts.values())
    for size in range(1, most):
        for inner in combinations(lengths[:-1], size):
            bounds = [*inner, lengths[-1]]
            filled = [sum(counts[x] for x in lengths if low < x <= high) for low, high in zip([0, *bounds], bounds, strict=False)]
            cost = sum(count * bound for count, bound in zip(filled, bounds, strict=True))
            if min(filled) >= SMALLEST and cost < least:
                best, least = bounds, cost
    return best
