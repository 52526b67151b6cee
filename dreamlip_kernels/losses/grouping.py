"""The sub-caption grouping loss as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..backends import dispatch
from ..distributed.collectives import Group
from ..grouping import check_contrast, check_pooling, subcaption_grouping_loss
from ..options import Backend, Contrast, ContrastiveBackend, Direction, GroupingBackend, Normalization, Reduction
from .arguments import ClipLossArguments


class SubcaptionGroupingLoss(ClipLossArguments):
    """``subcaption_grouping_loss`` as a module; takes ClipLoss's positional arguments and the function's options by
    keyword.
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
        threshold: float | None = None,
        normalization: Normalization = "minmax",
        normalize_patches: bool = True,
        contrast: Contrast = "image",
        candidates: int = 4,
        direction: Direction = "both",
        reduction: Reduction = "mean",
        group: Group = None,
        backend: Backend = "auto",
        grouping_backend: GroupingBackend | None = None,
        contrastive_backend: ContrastiveBackend | None = None,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        name = type(self).__name__
        check_pooling(name, threshold, normalization)
        check_contrast(name, contrast, direction, candidates, reduction)
        self.options: dict[str, Any] = dict(
            threshold=threshold,
            normalization=normalization,
            normalize_patches=normalize_patches,
            contrast=contrast,
            candidates=candidates,
            direction=direction,
            reduction=reduction,
            grouping_backend=dispatch.requested(name, "group_patches", grouping_backend, backend),
            contrastive_backend=dispatch.requested(name, "bidirectional_logsumexp", contrastive_backend, backend),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(
        self,
        patch_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """patch_features [N,P,D], text_features [N,K,D], masks [N], [N,K] and [N,P] bool -> scalar,
        or {"grouping_loss": scalar}.
        """
        loss = subcaption_grouping_loss(
            patch_features,
            text_features,
            logit_scale,
            image_mask=image_mask,
            text_mask=text_mask,
            patch_mask=patch_mask,
            group=self.group,
            **self.options,
        )
        return {"grouping_loss": loss} if output_dict else loss

    if TYPE_CHECKING:  # nn.Module's own says Any

        @overload
        def __call__(
            self,
            patch_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            output_dict: Literal[False] = ...,
            *,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            patch_mask: Tensor | None = ...,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            patch_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            *,
            output_dict: Literal[True],
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            patch_mask: Tensor | None = ...,
        ) -> dict[str, Tensor]: ...

        @overload
        def __call__(
            self,
            patch_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            output_dict: bool = ...,
            *,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            patch_mask: Tensor | None = ...,
        ) -> Tensor | dict[str, Tensor]: ...

        def __call__(self, *args: Any, **options: Any) -> Any: ...
