"""Retrieval and patch localization of a model on held-out shards. Every number comes with the level that chance
reaches.

Definitions and protocol: docs/evaluation.md. Shapes: P patches, D embedding width, K sub-captions of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dreamlip_train.config.schema import DataConfig, EvalConfig, Normalization
from dreamlip_train.data.shards.manifest import indexed_samples
from dreamlip_train.data.shards.shard_names import list_shards
from dreamlip_train.data.validation import no_sentences, val_samples
from dreamlip_train.evaluation.features import encode_batch, eval_mode, sub_caption_weights
from dreamlip_train.evaluation.retrieval.recall import retrieval, retrieval_chance
from dreamlip_train.evaluation.segmentation.localization import localization, mask_to_regions
from dreamlip_train.evaluation.sharing import Share
from dreamlip_train.model.dreamlip import DreamLIP

HeldOutLoss = Callable[[Tensor, Tensor | None, Tensor, Tensor], dict[str, Tensor]]
"""Image features [n, D], patch features [n, P, D] or None, texts [n, K, D], their mask [n, K] -> losses by name."""


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
    loss: HeldOutLoss | None = None,
    distributed: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Retrieval and patch localization over data.val_shards.

    A batch is eval.batch_size samples in file order, whoever encodes it: every rank gets the same numbers, and one
    process the same. Training and eval modes are as before afterwards.

    Args:
        model: DreamLIP (model/dreamlip.py), already on `device`, with whole parameters.
        threshold, normalization: of the patch selection; pass the run's loss.threshold and loss.normalization.
        localize: whether masks are looked at.
        should_stop: asked before each batch; True ends it.
        loss: of a batch's features, with each image's sentences as its captions; must not communicate.
        distributed: the ranks share the batches. Collective then.
        on_batch: called after each of this process's batches with its number of images.
    Returns:
        {"retrieval": {"long_caption": R, "sentence": R}, "localization": localization(...) or None without
        masks or patch features, "samples": int, "sentences": int, "skipped": {reason: count}} where R is
        retrieval(...) and "chance": retrieval_chance(...), and with ``loss`` "held_out_loss": means by name over the
        sentences, and their sum "loss".
        A long caption is the normalized mean of its sentences' embeddings; a sentence is a query of its own.
    Raises:
        StoppedError: ``should_stop`` said so.
        UserError: no held-out sample has a sentence, or the model gives features that are not finite (the samples
            are named).
    """
    share, size = Share(distributed), eval.batch_size

    def work(batch: list[dict[str, Any]]) -> _BatchResult:
        selection = (threshold, normalization) if localize else None
        result = _evaluate_batch(model, batch, device, size, selection, loss)
        on_batch(len(batch))
        return result

    with eval_mode(model), torch.no_grad():
        samples = val_samples(
            data,
            image_size=model.image_size,
            max_samples=eval.max_samples,
            is_ours=lambda position: share.owns(position // size),
        )
        batches = (list(batch) for _, batch in groupby(samples, key=lambda sample: sample["position"] // size))
        own = share.map(work, batches, should_stop)
        if share.ranks > 1:
            own = [result.to("cpu") for result in own]
        results = sorted((result for of in share.gather(own) for result in of), key=lambda result: result.position)
        return _report([result.to(device) for result in results] if share.ranks > 1 else results, data)


def count_held_out(data: DataConfig, max_samples: int = 0) -> int | None:
    """How many images ``evaluate`` will look at, where an index beside the shards says it."""
    count = sum(
        indexed_samples(list_shards(data.val_shards, field="data.val_shards", allow_pipe=data.allow_pipe)).values()
    )
    return (min(count, max_samples) if max_samples else count) or None


@dataclass(frozen=True)
class _BatchResult:
    """What an evaluation keeps of a batch: features of images [n, D] and of each one's sentences [K, D], patch weights
    and regions [K, P] of those with a mask.
    """

    position: int
    images: Tensor
    texts: list[Tensor]
    weights: list[Tensor]
    regions: list[Tensor]
    out_of_view: int
    without_sentence: int
    losses: dict[str, float]

    def to(self, device: torch.device | str) -> _BatchResult:
        return replace(self, images=self.images.to(device), texts=[text.to(device) for text in self.texts])


def _evaluate_batch(
    model: DreamLIP,
    batch: list[dict[str, Any]],
    device: torch.device | str,
    text_batch_size: int,
    selection: tuple[float | None, Normalization] | None,
    loss: HeldOutLoss | None,
) -> _BatchResult:
    usable = [sample for sample in batch if sample["sentences"]]
    result = _BatchResult(batch[0]["position"], torch.empty(0), [], [], [], 0, len(batch) - len(usable), {})
    if not usable:
        return result
    image_nD, patch_nPD, text_KD = encode_batch(model, usable, device, text_batch_size)
    result = replace(result, images=image_nD, texts=text_KD)
    if loss is not None:
        text_nKD = nn.utils.rnn.pad_sequence(text_KD, batch_first=True)
        present = [torch.ones(len(text), dtype=torch.bool) for text in text_KD]
        mask_nK = nn.utils.rnn.pad_sequence(present, batch_first=True)
        losses = loss(image_nD, patch_nPD, text_nKD, mask_nK.to(text_nKD.device))
        result = replace(result, losses={name: float(value) for name, value in losses.items()})
    if selection is None or patch_nPD is None or all(sample["mask"] is None for sample in usable):
        return result
    weights, regions, out_of_view = [], [], 0
    for sample, weight_KP in zip(usable, sub_caption_weights(patch_nPD, text_KD, *selection), strict=True):
        if sample["mask"] is not None:
            region_KP = mask_to_regions(sample["mask"], len(weight_KP), model.grid)
            in_view = region_KP.any(dim=1)
            out_of_view += int((~in_view).sum())
            weights.append(weight_KP.cpu()[in_view])
            regions.append(region_KP[in_view])
    return replace(result, weights=weights, regions=regions, out_of_view=out_of_view)


def _report(results: list[_BatchResult], data: DataConfig) -> dict[str, Any]:
    skipped = {
        "no sentence in a long caption": sum(result.without_sentence for result in results),
        "sub-caption without a region in view": sum(result.out_of_view for result in results),
    }
    results = [result for result in results if result.texts]
    if not results:
        raise no_sentences(data, skipped["no sentence in a long caption"])
    sentences = [text for result in results for text in result.texts]
    weights, regions = ([of for result in results for of in getattr(result, n)] for n in ("weights", "regions"))
    image_ND = torch.cat([result.images for result in results])
    captions = torch.stack([nn.functional.normalize(text.mean(dim=0), dim=0) for text in sentences])
    one_each = torch.arange(len(image_ND))
    owner_M = torch.repeat_interleave(one_each, torch.tensor([len(text) for text in sentences]))
    has_regions = sum(map(len, weights)) > 0
    report = {
        "retrieval": {
            "long_caption": retrieval(image_ND, captions, one_each)
            | {"chance": retrieval_chance(one_each, len(image_ND))},
            "sentence": retrieval(image_ND, torch.cat(sentences), owner_M)
            | {"chance": retrieval_chance(owner_M, len(image_ND))},
        },
        "localization": localization(torch.cat(weights), torch.cat(regions)) if has_regions else None,
        "samples": len(image_ND),
        "sentences": len(owner_M),
        "skipped": {reason: count for reason, count in skipped.items() if count},
    }
    return report | ({"held_out_loss": _mean_losses(results)} if results[0].losses else {})


def _mean_losses(results: list[_BatchResult]) -> dict[str, float]:
    counts = [sum(map(len, result.texts)) for result in results]
    means = {
        name: sum(count * result.losses[name] for count, result in zip(counts, results, strict=True)) / sum(counts)
        for name in results[0].losses
    }
    return means | {"loss": sum(means.values())}


def format_held_out(report: dict[str, Any]) -> str:
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
    if "held_out_loss" in report:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in report["held_out_loss"].items())
        lines.append(f"held-out loss: {parts}")
    regions = report["localization"]
    if regions is not None:
        lines.append(f"patch localization of {regions['sub_captions']} sub-captions, % (chance)")
        for name, label in (
            ("mass_inside", "weight inside the region"),
            ("pointing", "top patch inside the region"),
            ("miou", "IoU of the selected patches"),
        ):
            lines.append(f"  {label:<32}" + f"{regions[name]['value']:.1f} ({regions[name]['chance']:.1f})".rjust(16))
    lines += [f"left out: {count} x {reason}" for reason, count in report["skipped"].items()]
    return "\n".join(lines)
