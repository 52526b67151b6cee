"""Images that are known to be the same, over all ranks.

N images in the world, n on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.collectives import Group, all_gather_rows, rank_and_size


class Images(NamedTuple):
    """Numbers of the images, int32 in 0 .. N - 1, equal where their ids are: of the world's [N], of this rank's [n]."""

    world: Tensor
    own: Tensor


def gathered_images(image_ids: Tensor | None, group: Group) -> Images | None:
    """The numbers of the images of all ranks, from this rank's image_ids [n] int64."""
    if image_ids is None:
        return None
    rank, n = rank_and_size(group)[0], len(image_ids)
    world = image_numbers(all_gather_rows(image_ids, group))
    return Images(world, world[rank * n : (rank + 1) * n])


def image_numbers(ids: Tensor) -> Tensor:
    """ids [N] of any integers -> [N] int32 in 0 .. N - 1, equal where ids are; nothing is read on the host."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    differs = torch.zeros_like(ids, dtype=torch.int32)
    differs[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(differs).scatter_(0, order, differs.cumsum(0, dtype=torch.int32))
