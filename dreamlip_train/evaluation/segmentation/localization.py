"""Where sub-captions look: the patches that they select beside the regions that they describe, with chance levels.

Shapes: P patches, Q sub-captions that have a region.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreamlip_train.evaluation.features import require_finite


def mask_to_regions(mask: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """The patches that each sub-caption's region covers: [count, P] bool, row j - 1 for label j.

    A patch belongs to a region that covers at least half of it; a region too small for that gets the one patch it
    covers most. A label that is nowhere in the mask gives a row of False.

    Args:
        mask: [H, W] label map, 0 for background, j >= 1 for what sentence j describes.
        count: number of sub-captions.
        grid: (rows, columns) of patches. Pixels beyond a whole number of patches are dropped, as the patch embedding
            drops them.
    """
    if mask.ndim != 2 or mask.shape[0] < grid[0] or mask.shape[1] < grid[1]:
        raise ValueError(
            f"mask_to_regions: mask must be [H, W] with at least one pixel a patch of the {grid} grid, "
            f"got {tuple(mask.shape)}"
        )
    patch_size = (mask.shape[0] // grid[0], mask.shape[1] // grid[1])
    labels = torch.arange(1, count + 1, device=mask.device)
    share = nn.functional.avg_pool2d((mask[None] == labels[:, None, None]).float(), patch_size).flatten(1)  # [count, P]
    inside = share >= 0.5
    small = ~inside.any(dim=1) & (share > 0).any(dim=1)
    inside[small, share[small].argmax(dim=1)] = True
    return inside


def localization(weights: Tensor, regions: Tensor) -> dict[str, Any]:
    """How well the patches that sub-captions select agree with the regions they describe, in percent,
    with chance levels.

    mass_inside: share of the weight that lies inside the region; chance, uniform weights, is the region's share of the
    patches.
    pointing: how often the patch of the largest weight is inside (ties by expectation); the same chance.
    miou: intersection over union of the selected patches (weight > 0) and the region; chance is the exact expectation
    when as many patches are selected at random.

    Args:
        weights: [Q, P], each row non-negative and summing to one, as dreamlip_kernels.patch_weights gives.
        regions: [Q, P] bool, at least one patch in each row.
    Returns:
        {name: {"value": ..., "chance": ...}} of the three, and "sub_captions": Q.
    Raises:
        ValueError: shapes disagree, Q is 0, a region is empty, or weights are not finite.
    """
    if weights.shape != regions.shape or weights.ndim != 2 or regions.dtype != torch.bool:
        raise ValueError(
            f"localization: weights [Q, P] and regions [Q, P] bool must agree, got {tuple(weights.shape)} and "
            f"{tuple(regions.shape)} of {regions.dtype}"
        )
    if not len(weights) or not bool(regions.any(dim=1).all()):
        raise ValueError(
            "localization: needs at least one sub-caption, each with a region of at least one patch; "
            "leave out the others"
        )
    require_finite("localization: weights", weights)
    weights = weights.double()
    selected = weights > 0
    top = weights == weights.amax(dim=1, keepdim=True)
    overlap = (selected & regions).sum(dim=1)
    area = regions.double().mean(dim=1)
    return {
        "mass_inside": {"value": _percent((weights * regions).sum(dim=1)), "chance": _percent(area)},
        "pointing": {"value": _percent((top & regions).sum(dim=1).double() / top.sum(dim=1)), "chance": _percent(area)},
        "miou": {
            "value": _percent(overlap.double() / (selected | regions).sum(dim=1)),
            "chance": _percent(_random_iou(selected, regions)),
        },
        "sub_captions": len(weights),
    }


def _random_iou(selected: Tensor, regions: Tensor) -> Tensor:
    """Expected IoU of each region with a random set of as many patches as were selected:
    [Q] float64 (hypergeometric overlap).
    """
    patches = selected.shape[1]
    sizes, row_of = torch.unique(torch.stack([selected.sum(dim=1), regions.sum(dim=1)]), dim=1, return_inverse=True)
    size, region = sizes[:, :, None].double()  # [unique, 1] each
    overlap = torch.arange(patches + 1, device=selected.device, dtype=torch.float64)[None]
    possible = (overlap <= region) & (overlap <= size) & (size - overlap <= patches - region)

    def log_choose(n: Tensor | float, r: Tensor) -> Tensor:
        n = torch.as_tensor(n, dtype=torch.float64, device=r.device)
        return torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)

    log_p = log_choose(region, overlap) + log_choose(patches - region, size - overlap) - log_choose(patches, size)
    iou = overlap / (size + region - overlap)
    return torch.where(possible, log_p.exp() * iou, 0.0).sum(dim=1)[row_of]


def _percent(values: Tensor) -> float:
    return 100.0 * float(values.double().mean())
