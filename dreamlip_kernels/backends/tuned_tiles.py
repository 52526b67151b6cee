"""The tiles that ``qualify(tune=True)`` found fastest on a device, which the kernels take before those of their
tables.
"""

from __future__ import annotations

import torch

from . import verdicts

# "kernel bytes-of-an-element" -> {width: (rows, columns, depth, warps, stages)}, as a verdict's file holds them.
Tiles = dict[str, dict[str, list[int]]]
_instead: Tiles | None = None


def tuned_tile(kernel: str, element_bytes: int, arch: int, width: int) -> tuple[int, ...] | None:
    """The tuned tile of ``kernel`` at the nearest width on the current CUDA device, if that is of this architecture
    (10 * major + minor), or None.
    """
    tiles = _instead if _instead is not None else _of_current_device(arch)
    by_width = tiles.get(f"{kernel} {element_bytes}")
    return tuple(by_width[min(by_width, key=lambda w: abs(int(w) - width))]) if by_width else None


def take_tiles(tiles: Tiles | None) -> None:
    """From now on these, whatever a verdict says; None goes back to the verdict's."""
    global _instead
    _instead = tiles


def _of_current_device(arch: int) -> Tiles:
    if not torch.cuda.is_initialized():
        return {}
    record = verdicts.record(torch.device("cuda", torch.cuda.current_device()))
    if record is None or record.identity["capability"] != f"{arch // 10}.{arch % 10}":
        return {}
    return record.tiles
