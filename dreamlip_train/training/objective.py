"""The loss of a run's settings."""

from __future__ import annotations

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.config.schema import LossConfig


def dreamlip_loss(loss: LossConfig) -> DreamLIPLoss:
    """The objective that ``loss`` describes."""
    return DreamLIPLoss(
        mpcl_weight=loss.mpcl_weight,
        grouping_weight=loss.grouping_weight,
        pairs=loss.pairs,
        negatives=loss.negatives,
        positives=loss.positives,
        threshold=loss.threshold,
        normalization=loss.normalization,
        contrast=loss.contrast,
        direction=loss.direction,
        backend=loss.backend,
    )
