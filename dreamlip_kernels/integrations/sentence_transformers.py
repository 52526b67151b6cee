"""K positives per anchor for sentence-transformers: the columns of a data set are an anchor and its K positives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..contrastive import multi_positive_contrastive_loss


class MultiPositiveRankingLoss(nn.Module):
    """Multi-positive contrast of column 0 with columns 1 to K: each anchor picks its K positives,
    each positive its anchor.

    With ``a`` [N, D] and ``p`` [N, K, D] the unit embeddings of anchor and positives:
    ``dk.multi_positive_contrastive_loss(a, p, scale)``. With K = 1 it is the symmetric in-batch negatives loss.
    The [N, N K] similarities are never stored.

    Args:
        model: the SentenceTransformer that is trained.
        scale: the multiplier of cosine similarities, 1 / temperature.
        options: as of ``multi_positive_contrastive_loss`` (negatives, positives, group, backend).
    """

    def __init__(self, model: nn.Module, scale: float = 20.0, **options):
        super().__init__()
        self.model, self.scale, self.options = model, scale, options

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """One dict of model inputs per column -> scalar; labels have no meaning here."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"MultiPositiveRankingLoss: needs an anchor column and at least one positive, got {len(columns)}"
            )
        anchor, *positives = (
            nn.functional.normalize(self.model(column)["sentence_embedding"], dim=-1) for column in columns
        )
        return multi_positive_contrastive_loss(anchor, torch.stack(positives, dim=1), self.scale, **self.options)

    def get_config_dict(self) -> dict[str, float]:
        """What a model card says of this loss."""
        return {"scale": self.scale}
