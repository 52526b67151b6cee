"""The multi-positive contrast as a module."""

from __future__ import annotations

from torch import Tensor

from ..backends import dispatch
from ..contrastive import check_options, multi_positive_contrastive_loss
from ..distributed.collectives import Group
from ..targets.options import SameImage, check_targets
from .arguments import ClipLossArguments


class MultiPositiveContrastiveLoss(ClipLossArguments):
    """``multi_positive_contrastive_loss`` as a drop-in for open_clip's ClipLoss.

    Takes ClipLoss's positional arguments (exact over ranks whatever local_loss and gather_with_grad say) and, by
    keyword, negatives, positives, label_smoothing, same_image, group and backend of the function. With text_features
    [N, D] it equals ClipLoss.
    """

    def __init__(
        self,
        local_loss=False,
        gather_with_grad=False,
        cache_labels=False,
        rank=0,
        world_size=1,
        use_horovod=False,
        *,
        negatives: str = "slot",
        positives: str = "mean",
        label_smoothing: float = 0.0,
        same_image: SameImage = "ignore",
        group: Group = None,
        backend: str = "auto",
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        name = type(self).__name__
        check_options(name, negatives, positives)
        check_targets(name, label_smoothing, same_image, positives)
        self.negatives, self.positives = negatives, positives
        self.label_smoothing, self.same_image = label_smoothing, same_image
        self.backend = dispatch.requested(name, "bidirectional_logsumexp", backend, backend)

    def extra_repr(self) -> str:
        return (
            f"negatives={self.negatives!r}, positives={self.positives!r}, label_smoothing={self.label_smoothing}, "
            f"same_image={self.same_image!r}, backend={self.backend!r}"
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """image_features [N,D], text_features [N,K,D] or [N,D], image_mask [N] and text_mask [N,K] bool, image_ids [N]
        int64 -> scalar, or {"contrastive_loss": scalar}.

        logit_bias is accepted and has no effect: a constant added to every logit cancels in a softmax.
        """
        if text_features.ndim == 2:
            text_features = text_features[:, None]
        loss = multi_positive_contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            image_mask=image_mask,
            text_mask=text_mask,
            image_ids=image_ids,
            same_image=self.same_image,
            label_smoothing=self.label_smoothing,
            negatives=self.negatives,
            positives=self.positives,
            group=self.group,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
