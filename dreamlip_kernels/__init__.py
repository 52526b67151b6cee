"""Exact, memory-linear losses for language-image pre-training with many captions per image. Needs torch alone."""

from .backends.explain import explain
from .backends.settings import configure
from .contrastive import multi_positive_contrastive_loss
from .grouping import group_patches, patch_weights, subcaption_grouping_loss
from .losses import DreamLIPLoss, MultiPositiveContrastiveLoss, MultiPositiveSigmoidLoss, SubcaptionGroupingLoss
from .ops.logsumexp.logsumexp import bidirectional_logsumexp
from .qualification import qualify
from .sigmoid import multi_positive_sigmoid_loss
from .version import __version__

__all__ = [
    "DreamLIPLoss",
    "MultiPositiveContrastiveLoss",
    "MultiPositiveSigmoidLoss",
    "SubcaptionGroupingLoss",
    "__version__",
    "bidirectional_logsumexp",
    "configure",
    "explain",
    "group_patches",
    "multi_positive_contrastive_loss",
    "multi_positive_sigmoid_loss",
    "patch_weights",
    "qualify",
    "subcaption_grouping_loss",
]
