"""Held-out captions with the pictures a model finds for them: a few it gets right and a few it gets wrong."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.validation import val_samples
from dreamlip_train.evaluation.features import encode_batch, eval_mode


@dataclass(frozen=True)
class Example:
    """A long caption, its picture [3, S, S] uint8, the rank (1 is best) its picture got, and the pictures found first,
    best first.
    """

    caption: str
    picture: Tensor
    rank: int
    nearest: list[tuple[Tensor, float, bool]]
    """(picture, cosine similarity, whether it is the caption's own)."""


def retrieval_examples(
    model: Any,
    data: DataConfig,
    device: torch.device | str,
    *,
    count: int = 6,
    per_caption: int = 5,
    batch_size: int = 64,
    max_samples: int = 2000,
) -> tuple[list[Example], list[Example]]:
    """(right, wrong) captions of the first ``max_samples`` held-out samples: those most surely found,
    and those whose picture ranks lowest.
    """
    samples: list[dict[str, Any]] = []
    image_rows, text_rows = [], []
    with eval_mode(model), torch.no_grad():
        source = (
            sample
            for sample in val_samples(data, image_size=model.image_size, max_samples=max_samples)
            if sample["sentences"]
        )
        while batch := list(islice(source, batch_size)):
            image_nD, _, text_KD = encode_batch(model, batch, device, batch_size)
            samples += batch
            image_rows.append(image_nD.cpu())
            text_rows += [nn.functional.normalize(text.mean(dim=0), dim=0).cpu() for text in text_KD]
    if not samples:
        return [], []
    similarity_NN = torch.stack(text_rows) @ torch.cat(image_rows).T
    own_N = similarity_NN.diagonal()
    rank_N = 1 + (similarity_NN > own_N[:, None]).sum(dim=1)
    runner_up_N = similarity_NN.clone().fill_diagonal_(-torch.inf).amax(dim=1)
    right = [i for i in (own_N - runner_up_N).argsort(descending=True).tolist() if rank_N[i] == 1][:count]
    wrong = [i for i in rank_N.argsort(descending=True).tolist() if rank_N[i] > 1][:count]

    def example(row: int) -> Example:
        best = similarity_NN[row].topk(min(per_caption, len(samples))).indices.tolist()
        nearest = [(samples[i]["image"], float(similarity_NN[row, i]), i == row) for i in best]
        return Example(" ".join(samples[row]["sentences"]), samples[row]["image"], int(rank_N[row]), nearest)

    return [example(row) for row in right], [example(row) for row in wrong]
