"""Exact, memory-linear losses for language-image pre-training with many captions an image. Needs torch alone."""

from .contrastive import bidirectional_logsumexp, multi_positive_contrastive_loss
from .dispatch import explain
from .grouping import group_patches, patch_weights, subcaption_grouping_loss
from .losses import DreamLIPLoss, MultiPositiveContrastiveLoss, SubcaptionGroupingLoss
from .version import __version__

__all__ = [
    "DreamLIPLoss",
    "MultiPositiveContrastiveLoss",
    "SubcaptionGroupingLoss",
    "__version__",
    "bidirectional_logsumexp",
    "explain",
    "group_patches",
    "multi_positive_contrastive_loss",
    "patch_weights",
    "subcaption_grouping_loss",
]
