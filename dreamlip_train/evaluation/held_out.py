"""Retrieval and patch localization of a model on held-out shards. Every number comes with the level that chance
reaches.

Definitions and protocol: docs/evaluation.md. Shapes: P patches, D embedding width, K sub-captions of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from dreamlip_train.config.schema import DataConfig, EvalConfig, Normalization
from dreamlip_train.data.validation import no_sentences, val_samples
from dreamlip_train.evaluation.features import encode_batch, eval_mode, sub_caption_weights
from dreamlip_train.evaluation.retrieval.recall import retrieval, retrieval_chance
from dreamlip_train.evaluation.segmentation.localization import localization, mask_to_regions
from dreamlip_train.model.dreamlip import DreamLIP


class StoppedError(Exception):
    """An evaluation that was asked to stop."""


def evaluate(
    model: DreamLIP,
    data: DataConfig,
    eval: EvalConfig,
    device: torch.device | str,
    *,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
    should_stop: Callable[[], bool] = lambda: False,
    localize: bool = True,
) -> dict[str, Any]:
    """Retrieval and patch localization over data.val_shards.

        Every rank that calls this reads all held-out samples and gets the same numbers; it communicates nothing itself.
        Call it on every rank under ZeRO-3, whose forward gathers parameters, and on any rank otherwise. Training and
        eval modes are as before afterwards.

        Args:
            model: DreamLIP (model/dreamlip.py), already on `device`.
            threshold, normalization: of the patch selection; pass the run's loss.threshold and loss.normalization.
            localize: whether masks are looked at.
            should_stop: asked before each batch; True ends it.
        Returns:
            {"retrieval": {"long_caption": R, "sentence": R}, "localization": localization(...) or None without
            masks or patch features,
    "samples": int, "sentences": int, "skipped": {reason: count}} where R is retrieval(...) and "chance":
    retrieval_chance(...).
            A long caption is the normalized mean of its sentences' embeddings; a sentence is a query of its own.
        Raises:
            StoppedError: ``should_stop`` said so.
            UserError: no held-out sample has a sentence, or the model gives features that are not finite (the samples
                are named).
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
            if not localize or patch_nPD is None or all(sample["mask"] is None for sample in batch):
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
        lines.append(f"patch localization of {located['sub_captions']} sub-captions, % (chance)")
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
