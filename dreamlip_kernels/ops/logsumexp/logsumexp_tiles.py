"""Tile shapes of the contrastive Triton kernels, by architecture, operand and width.

Each entry was found by `benchmarks/tune_contrastive.py` on a device, or, where it says "compiled", chosen from
ahead-of-time compilation alone: no spills, and as many programs on a processor as registers and shared memory allow.
"""

from __future__ import annotations

from typing import NamedTuple

from ...backends.tuned_tiles import tuned_tile


class Blocks(NamedTuple):
    """Rows, columns and depth of a tile, warps a program, and stages of its load pipeline."""

    m: int
    c: int
    d: int
    warps: int
    stages: int


INTERPRETED = Blocks(32, 32, 16, 4, 1)
# finish_sums: rows and columns of a tile, warps and stages, by bytes of an operand's element, for every device. Its
# depth is that of exp_sums: a logit is then the same sum in both. One stage: copies ahead by cp.async would need a
# fence before wgmma reads them, which Triton 3.6 leaves out.
FINISH = {2: (64, 64, 4, 1), 4: (64, 64, 8, 1)}

# (kernel, bytes of an operand's element, compute capability's major) -> {D the entry was found at: Blocks}. Those of
# Hopper at 16 bits were timed.
TABLE: dict[tuple[str, int, int], dict[int, Blocks]] = {
    ("exp_sums", 2, 8): {512: Blocks(64, 128, 32, 8, 3)},
    # On an H100 at N = C = 8192, K = 4: 535 TFLOP/s, where (128, 128, 64, 8, 3) made 503.
    ("exp_sums", 2, 9): {512: Blocks(256, 128, 64, 8, 3)},
    ("exp_sums", 2, 10): {512: Blocks(64, 128, 64, 8, 3)},
    ("gradient_tile", 2, 8): {512: Blocks(128, 128, 32, 8, 3)},
    # There: 453 TFLOP/s, with 2 stages 397.
    ("gradient_tile", 2, 9): {512: Blocks(128, 128, 64, 8, 3)},
    ("gradient_tile", 2, 10): {512: Blocks(64, 128, 64, 8, 2)},
    # float32 operands, each product as three TF32 ones.
    ("exp_sums", 4, 8): {512: Blocks(64, 64, 16, 8, 3)},  # with 4 warps it spills where images are compared
    ("exp_sums", 4, 9): {512: Blocks(64, 64, 32, 4, 3)},
    ("exp_sums", 4, 10): {512: Blocks(64, 128, 32, 8, 3)},
    ("gradient_tile", 4, 8): {512: Blocks(64, 64, 32, 8, 3)},
    ("gradient_tile", 4, 9): {512: Blocks(128, 64, 32, 8, 2)},  # 122 registers, 41 KB
    ("gradient_tile", 4, 10): {512: Blocks(64, 128, 32, 8, 3)},
}


def blocks_for(kernel: str, element_bytes: int, arch: int, width: int) -> Blocks:
    """What `qualify --tune` found on this device, else the entry of the widest D not above ``width``, else of the
    narrowest.

    An architecture without entries takes sm_80's, whose tiles fit everywhere.
    """
    if tuned := tuned_tile(kernel, element_bytes, arch, width):
        return Blocks(*tuned)
    major = arch // 10 if arch // 10 in (8, 9, 10) else 8
    by_width = TABLE[kernel, element_bytes, major]
    return by_width[max((d for d in by_width if d <= width), default=min(by_width))]
