"""Recall at k of image and text features, both ways, and what chance reaches. Definitions: docs/evaluation.md.

Shapes: N images, M texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamlip_train.evaluation.features import require_finite

KS = (1, 5, 10)
_TILE_ELEMENTS = 2**24  # similarities held at once: 64 MB in float32


def retrieval(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """Recall at each k, text to image and image to text, in percent; an image may have any number of texts.

    A text scores when its image is among its k nearest images, an image when any of its texts is among its k nearest
    texts. Ties share by expectation: candidates of equal similarity count as if drawn in random order, so a model that
    maps everything to one point scores exactly chance. The [N, M] similarities are never whole in memory.

    Args:
        image_features: [N, D] of unit rows. An image without texts is a candidate but never a query.
        text_features: [M, D] of unit rows, on the same device.
        text_to_image: [M] integers, the row of image_features that each text describes.
        ks: the list lengths.
    Returns:
        {"t2i": {"r_at_1": ..., ...}, "i2t": {...}}.
    Raises:
        ValueError: shapes disagree, an index is out of range, or features are not finite.
    """
    owner_M = _checked_pairs(image_features, text_features, text_to_image)
    require_finite("retrieval: image_features", image_features)
    require_finite("retrieval: text_features", text_features)
    images_ND, texts_MD = image_features.float(), text_features.float()
    image_ids_N = torch.arange(len(images_ND), device=images_ND.device)
    has_text_N = torch.isin(image_ids_N, owner_M)
    return {
        "t2i": _recall(texts_MD, images_ND, owner_M, image_ids_N, ks),
        "i2t": _recall(images_ND[has_text_N], texts_MD, image_ids_N[has_text_N], owner_M, ks),
    }


def retrieval_chance(text_to_image: Tensor, num_images: int, ks: Sequence[int] = KS) -> dict[str, dict[str, float]]:
    """What ``retrieval`` gives on average when candidates are ranked at random, in its own form and percent."""
    texts_N = torch.bincount(text_to_image.long().cpu(), minlength=num_images)
    right_i2t = texts_N[texts_N > 0]
    right_t2i = torch.ones(1, dtype=torch.long)
    return {
        "t2i": {
            f"r_at_{k}": _percent(_hit_probability(right_t2i * 0, num_images - right_t2i, right_t2i, k)) for k in ks
        },
        "i2t": {
            f"r_at_{k}": _percent(_hit_probability(right_i2t * 0, len(text_to_image) - right_i2t, right_i2t, k))
            for k in ks
        },
    }


def _recall(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, ks: Sequence[int]
) -> dict[str, float]:
    """Percent of queries with a candidate of their own id among the k nearest; every query has at least one."""
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    tile = max(1, _TILE_ELEMENTS // len(candidates))
    own_query, own_candidate, begins = _own_pairs(query_ids, candidate_ids)
    for start in range(0, len(queries), tile):
        similarity = queries[start : start + tile] @ candidates.T  # [tile, candidates]
        rows = len(similarity)
        pairs = slice(int(begins[start]), int(begins[start + rows]))
        row = own_query[pairs] - start
        own = similarity[row, own_candidate[pairs]]
        best = own.new_full((rows,), -torch.inf).scatter_reduce(0, row, own, "amax")
        ahead = (similarity > best[:, None]).sum(dim=1)
        tied_right = torch.zeros_like(ahead).index_add(0, row, (own == best[row]).long())
        tied_wrong = (similarity == best[:, None]).sum(dim=1) - tied_right
        for k in ks:
            hits[k].append(_hit_probability(ahead, tied_wrong, tied_right, k))
    return {f"r_at_{k}": _percent(torch.cat(hits[k])) for k in ks}


def _own_pairs(query_ids: Tensor, candidate_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (query, candidate) of one id, by ascending query, and where each query's begin, with the end of all."""
    sorted_ids, order = candidate_ids.sort(stable=True)
    first = torch.searchsorted(sorted_ids, query_ids)
    counts = torch.searchsorted(sorted_ids, query_ids, right=True) - first
    begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    query = torch.repeat_interleave(counts)
    within = torch.arange(len(query), device=query.device) - begins[query]
    return query, order[first[query] + within], begins.cpu()


def _hit_probability(ahead: Tensor, tied_wrong: Tensor, tied_right: Tensor, k: int) -> Tensor:
    """Probability, over random orders of the tied, that one of tied_right is among the first k after `ahead` others.
    float64, same shape.
    """
    miss = torch.ones_like(ahead, dtype=torch.float64)
    for drawn in range(k):  # drawing without replacement from the tied, as far as the k - ahead places go
        still_wrong = (tied_wrong - drawn).clamp(min=0).double() / (tied_wrong + tied_right - drawn).clamp(min=1)
        miss = torch.where(drawn < k - ahead, miss * still_wrong, miss)
    return 1 - miss


def _checked_pairs(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> Tensor:
    """text_to_image as int64 on the features' device, after checking that the three arguments belong together."""
    shapes = f"got {tuple(image_features.shape)}, {tuple(text_features.shape)} and {tuple(text_to_image.shape)}"
    if image_features.ndim != 2 or text_features.ndim != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"retrieval: image_features must be [N, D] and text_features [M, D] with one D, {shapes}")
    if text_to_image.shape != text_features.shape[:1] or text_to_image.is_floating_point():
        raise ValueError(f"retrieval: text_to_image must be integers [M], {shapes} of {text_to_image.dtype}")
    if not len(image_features) or not len(text_features):
        raise ValueError(f"retrieval: needs at least one image and one text, {shapes}")
    owner_M = text_to_image.to(image_features.device, torch.long)
    low, high = int(owner_M.min()), int(owner_M.max())
    if low < 0 or high >= len(image_features):
        raise ValueError(f"retrieval: text_to_image must be in [0, {len(image_features)}), got {low} to {high}")
    return owner_M


def _percent(values: Tensor) -> float:
    return 100.0 * float(values.double().mean())
