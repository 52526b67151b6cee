"""What a trained model can do on held-out samples: retrieval both ways, and where each sub-caption looks in the picture.

``retrieval`` and ``localization`` are pure functions of features and masks; ``evaluate`` feeds them from shards.
Every number comes with the level that chance reaches. Definitions and protocol: docs/evaluation.md.

Shapes: N images, M texts, D embedding width, P patches, Q sub-captions that have a region, K sub-captions of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dreamlip_kernels import patch_weights
from dreamlip_train.config.schema import DataConfig, EvalConfig, Normalization
from dreamlip_train.data.validation import no_sentences, val_samples

KS = (1, 5, 10)


class StoppedError(Exception):
    """An evaluation that was asked to stop."""


_TILE_ELEMENTS = 2**24  # similarities held at once: 64 MB in float32


def retrieval(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """Recall at each k, text to image and image to text, in percent; an image may have any number of texts.

    A text scores when its image is among its k nearest images, an image when any of its texts is among its k nearest texts.
    Ties share by expectation: candidates of equal similarity count as if drawn in random order, so a model that maps everything to one
    point scores exactly chance. The [N, M] similarities are never whole in memory.

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
    _require_finite("retrieval: image_features", image_features)
    _require_finite("retrieval: text_features", text_features)
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
    rows = max(1, _TILE_ELEMENTS // len(candidates))
    for chunk, ids in zip(queries.split(rows), query_ids.split(rows), strict=True):
        similarity = chunk @ candidates.T  # [rows, candidates]
        right = ids[:, None] == candidate_ids[None, :]
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ahead = (similarity > best).sum(dim=1)
        tied = similarity == best
        tied_right = (tied & right).sum(dim=1)
        tied_wrong = tied.sum(dim=1) - tied_right
        for k in ks:
            hits[k].append(_hit_probability(ahead, tied_wrong, tied_right, k))
    return {f"r_at_{k}": _percent(torch.cat(hits[k])) for k in ks}


def _hit_probability(ahead: Tensor, tied_wrong: Tensor, tied_right: Tensor, k: int) -> Tensor:
    """Probability, over random orders of the tied, that one of tied_right is among the first k after `ahead` others. float64, same shape."""
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


def mask_to_regions(mask: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """The patches that each sub-caption's region covers: [count, P] bool, row j - 1 for label j.

    A patch belongs to a region that covers at least half of it; a region too small for that gets the one patch it covers most.
    A label that is nowhere in the mask gives a row of False.

    Args:
        mask: [H, W] label map, 0 for background, j >= 1 for what sentence j describes.
        count: number of sub-captions.
        grid: (rows, columns) of patches. Pixels beyond a whole number of patches are dropped, as the patch embedding drops them.
    """
    if mask.ndim != 2 or mask.shape[0] < grid[0] or mask.shape[1] < grid[1]:
        raise ValueError(
            f"mask_to_regions: mask must be [H, W] with at least one pixel a patch of the {grid} grid, got {tuple(mask.shape)}"
        )
    patch_size = (mask.shape[0] // grid[0], mask.shape[1] // grid[1])
    labels = torch.arange(1, count + 1, device=mask.device)
    share = nn.functional.avg_pool2d((mask[None] == labels[:, None, None]).float(), patch_size).flatten(1)  # [count, P]
    inside = share >= 0.5
    small = ~inside.any(dim=1) & (share > 0).any(dim=1)
    inside[small, share[small].argmax(dim=1)] = True
    return inside


def localization(weights: Tensor, regions: Tensor) -> dict[str, Any]:
    """How well the patches that sub-captions select agree with the regions they describe, in percent, with chance levels.

    mass_inside: share of the weight that lies inside the region; chance, uniform weights, is the region's share of the patches.
    pointing: how often the patch of the largest weight is inside (ties by expectation); the same chance.
    miou: intersection over union of the selected patches (weight > 0) and the region; chance is the exact expectation when as many
    patches are selected at random.

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
            f"localization: weights [Q, P] and regions [Q, P] bool must agree, got {tuple(weights.shape)} and {tuple(regions.shape)} of {regions.dtype}"
        )
    if not len(weights) or not bool(regions.any(dim=1).all()):
        raise ValueError(
            "localization: needs at least one sub-caption, each with a region of at least one patch; leave out the others"
        )
    _require_finite("localization: weights", weights)
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
    """Expected IoU of each region with a random set of as many patches as were selected: [Q] float64 (hypergeometric overlap)."""
    patches = selected.shape[1]
    sizes, row_of = torch.unique(torch.stack([selected.sum(dim=1), regions.sum(dim=1)]), dim=1, return_inverse=True)
    chosen, region = sizes[:, :, None].double()  # [unique, 1] each
    overlap = torch.arange(patches + 1, device=selected.device, dtype=torch.float64)[None]
    possible = (overlap <= region) & (overlap <= chosen) & (chosen - overlap <= patches - region)

    def log_choose(n: Tensor | float, r: Tensor) -> Tensor:
        n = torch.as_tensor(n, dtype=torch.float64, device=r.device)
        return torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)

    log_p = log_choose(region, overlap) + log_choose(patches - region, chosen - overlap) - log_choose(patches, chosen)
    iou = overlap / (chosen + region - overlap)
    return torch.where(possible, log_p.exp() * iou, 0.0).sum(dim=1)[row_of]


def evaluate(
    model: nn.Module,
    data: DataConfig,
    eval: EvalConfig,
    device: torch.device | str,
    *,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Retrieval and patch localisation over data.val_shards.

    Every rank that calls this reads all held-out samples and gets the same numbers; it communicates nothing itself. Call it on every rank
    under ZeRO-3, whose forward gathers parameters, and on any rank otherwise. Training and eval modes are as before afterwards.

    Args:
        model: DreamLIP (model/dreamlip.py), already on `device`.
        threshold, normalization: of the patch selection; pass the run's loss.threshold and loss.normalization.
        should_stop: asked before each batch; True ends it.
    Returns:
        {"retrieval": {"long_caption": R, "sentence": R}, "localization": localization(...) or None without masks or patch features,
        "samples": int, "sentences": int, "skipped": {reason: count}} where R is retrieval(...) and "chance": retrieval_chance(...).
        A long caption is the normalised mean of its sentences' embeddings; a sentence is a query of its own.
    Raises:
        StoppedError: ``should_stop`` said so.
        ValueError: no held-out sample has a sentence, or the model gives features that are not finite (the samples are named).
    """
    images, captions, sentences, owner, weights, regions = [], [], [], [], [], []
    skipped = {"no sentence in a long caption": 0, "sub-caption without a region in view": 0}
    samples = val_samples(data, image_size=model.image_size, max_samples=eval.max_samples)
    with eval_mode(model), torch.no_grad():
        usable = _with_sentences(samples, skipped)
        while batch := list(islice(usable, eval.batch_size)):
            if should_stop():
                raise StoppedError
            image_nD, patch_nPD, text_KD = encode_batch(model, batch, device, eval.batch_size)
            owner += [len(images) + row for row, text in enumerate(text_KD) for _ in range(len(text))]
            images += list(image_nD)
            captions += [nn.functional.normalize(text.mean(dim=0), dim=0) for text in text_KD]
            sentences += text_KD
            if patch_nPD is None or all(sample["mask"] is None for sample in batch):
                continue
            for sample, weight_KP in zip(
                batch, sub_caption_weights(patch_nPD, text_KD, threshold, normalization), strict=True
            ):
                if sample["mask"] is not None:
                    region_KP = mask_to_regions(sample["mask"], len(weight_KP), model.grid)
                    in_view = region_KP.any(dim=1)
                    skipped["sub-caption without a region in view"] += int((~in_view).sum())
                    weights.append(weight_KP.cpu()[in_view])
                    regions.append(region_KP[in_view])
    if not images:
        raise no_sentences(data, skipped["no sentence in a long caption"])
    image_ND = torch.stack(images)
    owner_M = torch.tensor(owner)
    one_each = torch.arange(len(images))
    located = bool(weights) and sum(map(len, weights)) > 0
    return {
        "retrieval": {
            "long_caption": retrieval(image_ND, torch.stack(captions), one_each)
            | {"chance": retrieval_chance(one_each, len(images))},
            "sentence": retrieval(image_ND, torch.cat(sentences), owner_M)
            | {"chance": retrieval_chance(owner_M, len(images))},
        },
        "localization": localization(torch.cat(weights), torch.cat(regions)) if located else None,
        "samples": len(images),
        "sentences": len(owner),
        "skipped": {reason: count for reason, count in skipped.items() if count},
    }


def encode_batch(
    model: nn.Module, batch: Sequence[dict[str, Any]], device: torch.device | str, text_batch_size: int = 64
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Image features [n, D], patch features [n, P, D] or None, and each sample's sentence features [K, D], in float32.

    Raises:
        ValueError: features that are not finite, naming the samples they belong to.
    """
    image_nD, patch_nPD = model.encode_images(torch.stack([sample["image"] for sample in batch]).to(device))
    tokens = model.tokenize([sentence for sample in batch for sentence in sample["sentences"]])
    text_MD = torch.cat([model.encode_texts(part.to(device)) for part in tokens.split(text_batch_size)]).float()
    counts = [len(sample["sentences"]) for sample in batch]
    keys = [sample["key"] for sample in batch]
    _require_finite("evaluate: image features", image_nD, keys)
    _require_finite(
        "evaluate: sentence features",
        text_MD,
        [key for key, count in zip(keys, counts, strict=True) for _ in range(count)],
    )
    if patch_nPD is not None:
        _require_finite("evaluate: patch features", patch_nPD, keys)
        patch_nPD = patch_nPD.float()
    return image_nD.float(), patch_nPD, list(text_MD.split(counts))


def sub_caption_weights(
    patch_features: Tensor, text_features: Sequence[Tensor], threshold: float | None, normalization: Normalization
) -> list[Tensor]:
    """The grouping's patch weights (docs/math.md section 3) of each sample's own sub-captions: patches [n, P, D], texts n x [K, D] -> n x [K, P]."""
    padded_nKD = nn.utils.rnn.pad_sequence(list(text_features), batch_first=True)
    weights_nKP = patch_weights(patch_features, padded_nKD, threshold=threshold, normalization=normalization)
    return [weights[: len(text)] for weights, text in zip(weights_nKP, text_features, strict=True)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def format_report(report: dict[str, Any]) -> str:
    """evaluate()'s result as a table of plain text, percent, chance beside each number."""
    lines = [f"{report['samples']} held-out images, {report['sentences']} sentences"]
    lines.append(f"{'retrieval, % (chance)':<34}" + "".join(f"{name:>16}" for name in ("R@1", "R@5", "R@10")))
    for kind, label in (("long_caption", "long caption"), ("sentence", "single sentence")):
        scores = report["retrieval"][kind]
        for way, arrow in (("t2i", "text to image"), ("i2t", "image to text")):
            cells = [
                f"{scores[way][name]:.1f} ({scores['chance'][way][name]:.1f})"
                for name in ("r_at_1", "r_at_5", "r_at_10")
            ]
            lines.append(f"  {label + ', ' + arrow:<32}" + "".join(f"{cell:>16}" for cell in cells))
    located = report["localization"]
    if located is not None:
        lines.append(f"patch localisation of {located['sub_captions']} sub-captions, % (chance)")
        for name, label in (
            ("mass_inside", "weight inside the region"),
            ("pointing", "top patch inside the region"),
            ("miou", "IoU of the selected patches"),
        ):
            lines.append(f"  {label:<32}" + f"{located[name]['value']:.1f} ({located[name]['chance']:.1f})".rjust(16))
    lines += [f"left out: {count} x {reason}" for reason, count in report["skipped"].items()]
    return "\n".join(lines)


def _with_sentences(samples: Iterable[dict[str, Any]], skipped: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The samples that have a sentence to ask with; the others are counted."""
    for sample in samples:
        if sample["sentences"]:
            yield sample
        else:
            skipped["no sentence in a long caption"] += 1


def _require_finite(name: str, features: Tensor, keys: Sequence[str] | None = None) -> None:
    bad = (~torch.isfinite(features)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        of = f"samples {sorted({keys[row] for row in bad})[:5]}" if keys else f"rows {bad[:5]}"
        raise ValueError(
            f"{name}: NaN or infinite values in {len(bad)} of {len(features)} rows, first in {of}; check the weights and those inputs"
        )


def _percent(values: Tensor) -> float:
    return 100.0 * float(values.double().mean())
