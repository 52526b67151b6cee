"""Loss modules shaped like open_clip's ClipLoss: change one line of a training loop.

``ClipLoss(...)`` -> ``MultiPositiveContrastiveLoss(...)`` with text_features [N, K, D] (or [N, D]:
then it equals ClipLoss), or ``DreamLIPLoss(...)``, which adds the sub-caption grouping term when the model also returns
patch_features.
"""

from .contrastive import MultiPositiveContrastiveLoss
from .dreamlip import DreamLIPLoss
from .grouping import SubcaptionGroupingLoss
from .sigmoid import MultiPositiveSigmoidLoss

__all__ = ["DreamLIPLoss", "MultiPositiveContrastiveLoss", "MultiPositiveSigmoidLoss", "SubcaptionGroupingLoss"]
