"""Long-caption retrieval: recall where a caption is longer than the text encoder's context, read in both usual ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreamlip_train.captions.columns import split_sub_captions
from dreamlip_train.evaluation import defaults
from dreamlip_train.evaluation.features import eval_mode
from dreamlip_train.evaluation.retrieval.long_caption_sets import LongCaptionSet, rejoin
from dreamlip_train.evaluation.retrieval.recall import retrieval, retrieval_chance
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.model.dreamlip import DreamLIP

_LABELS = {
    "whole": "one text, cut at the context",
    "sentence_mean": "mean of its sentences",
    "sentence": "each sentence a text",
}


def evaluate_long_captions(
    model: DreamLIP, caption_set: LongCaptionSet, device: torch.device | str, *, batch_size: int = defaults.BATCH_SIZE
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, for each reading of the captions.

    A long caption is read as "whole", one text cut at model.context_length, and as "sentence_mean", the normalized mean
    of its sentences' embeddings. A fine-grained set has the reading "sentence": an image has many texts, each of which
    must find it, and it scores when any of them is among its k nearest, as FLAIR defines it.

    Returns:
        {"readings": {reading: {"t2i", "i2t", "chance", "texts": how many were encoded, "cut": how many of them were
        longer than the context}}, "images", "captions", "context_length"}.
    Raises:
        UserError: an image is damaged (it is named), or features are not finite.
    """
    readings = {"sentence": _Texts()} if caption_set.fine_grained else {"whole": _Texts(), "sentence_mean": _Texts()}
    images: list[Tensor] = []
    owner: list[int] = []
    items = caption_set.items
    with eval_mode(model), torch.no_grad(), Progress("long captions", len(items), "images") as progress:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            pictures = torch.stack([item.picture(model.image_size) for item in batch])
            images.append(model.encode_images(pictures.to(device))[0].float())
            captions = [caption for item in batch for caption in item.captions]
            owner += [start + row for row, item in enumerate(batch) for _ in item.captions]
            for reading, texts in readings.items():
                if reading == "sentence_mean":
                    texts.add(model, [split_sub_captions(caption) or [caption] for caption in captions], batch_size)
                else:
                    whole = [rejoin(caption) or caption for caption in captions] if caption_set.rejoined else captions
                    texts.add(model, [[text] for text in whole], batch_size)
            progress.advance(len(batch), f"{len(owner):,} captions")
    image_ND, owner_M = torch.cat(images), torch.tensor(owner)
    chance = retrieval_chance(owner_M, len(image_ND))
    return {
        "readings": {
            reading: retrieval(image_ND, torch.cat(texts.features), owner_M)
            | {"chance": chance, "texts": texts.count, "cut": texts.cut}
            for reading, texts in readings.items()
        },
        "images": len(image_ND),
        "captions": len(owner),
        "context_length": model.context_length,
    }


class _Texts:
    """Features of captions under one reading, and how many of their texts were cut."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.count = self.cut = 0

    def add(self, model: DreamLIP, pieces: list[list[str]], batch_size: int) -> None:
        """One feature a caption: of its only piece, or the normalized mean of its pieces'."""
        if not pieces:
            return
        device = next(model.parameters()).device
        tokens, cut = model.tokenize.with_cut([piece for own in pieces for piece in own])
        self.count, self.cut = self.count + len(tokens), self.cut + cut
        features_TD = torch.cat([model.encode_texts(part.to(device)).float() for part in tokens.split(4 * batch_size)])
        counts = [len(own) for own in pieces]
        if max(counts) > 1:
            means = [part.mean(dim=0) for part in features_TD.split(counts)]
            features_TD = nn.functional.normalize(torch.stack(means), dim=1)
        self.features.append(features_TD)


def format_long_captions(result: dict[str, Any]) -> str:
    """Each reading's six numbers with chance, and how many texts were cut, as text to read."""
    lines = [
        f"{result['images']} images, {result['captions']} captions",
        f"{'retrieval, % (chance)':<46}" + "".join(f"{name:>16}" for name in ("R@1", "R@5", "R@10")),
    ]
    for reading, scores in result["readings"].items():
        for way, arrow in (("i2t", "image to text"), ("t2i", "text to image")):
            cells = [f"{scores[way][f'r_at_{k}']:.1f} ({scores['chance'][way][f'r_at_{k}']:.1f})" for k in (1, 5, 10)]
            lines.append(f"{_LABELS[reading] + ', ' + arrow:<46}" + "".join(f"{cell:>16}" for cell in cells))
    for reading, scores in result["readings"].items():
        lines.append(
            f"{_LABELS[reading]}: {scores['cut']} of {scores['texts']} texts were longer than "
            f"{result['context_length']} tokens and were cut"
        )
    return "\n".join(lines)
