"""The multi-positive contrast as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..backends import dispatch
from ..contrastive import check_options, multi_positive_contrastive_loss
from ..distributed.collectives import Group
from ..options import ContrastiveBackend, Negatives, Positives, Reduction
from ..targets.options import SameImage, check_targets
from .arguments import ClipLossArguments


class MultiPositiveContrastiveLoss(ClipLossArguments):
    """``multi_positive_contrastive_loss`` as a drop-in for open_clip's ClipLoss.

    Takes ClipLoss's positional arguments (exact over ranks whatever local_loss and gather_with_grad say) and, by
    keyword, negatives, positives, label_smoothing, same_image, reduction, group and backend of the function. With
    text_features [N, D] it equals ClipLoss.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        negatives: Negatives = "slot",
        positives: Positives = "mean",
        label_smoothing: float = 0.0,
        same_image: SameImage = "ignore",
        reduction: Reduction = "mean",
        group: Group = None,
        backend: ContrastiveBackend = "auto",
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        name = type(self).__name__
        check_options(name, negatives, positives, reduction)
        self.reduction: Reduction = reduction
        check_targets(name, label_smoothing, same_image, positives)
        self.negatives: Negatives = negatives
        self.positives: Positives = positives
        self.label_smoothing = label_smoothing
        self.same_image: SameImage = same_image
        self.backend = dispatch.requested(name, "bidirectional_logsumexp", backend, backend)

    def extra_repr(self) -> str:
        return (
            f"negatives={self.negatives!r}, positives={self.positives!r}, label_smoothing={self.label_smoothing}, "
            f"same_image={self.same_image!r}, reduction={self.reduction!r}, backend={self.backend!r}"
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
            reduction=self.reduction,
            group=self.group,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    if TYPE_CHECKING:  # nn.Module's own says Any

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            logit_bias: Tensor | None = ...,
            output_dict: Literal[False] = ...,
            *,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            logit_bias: Tensor | None = ...,
            *,
            output_dict: Literal[True],
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
        ) -> dict[str, Tensor]: ...

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            logit_bias: Tensor | None = ...,
            output_dict: bool = ...,
            *,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
        ) -> Tensor | dict[str, Tensor]: ...

        def __call__(self, *args: Any, **options: Any) -> Any: ...
