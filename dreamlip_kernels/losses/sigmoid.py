"""The multi-positive sigmoid loss as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from ..backends import dispatch
from ..checks import check_choice
from ..distributed.collectives import Group
from ..options import DIST_IMPLS, DistImpl, Reduction, SigmoidBackend
from ..sigmoid import check_reduction, multi_positive_sigmoid_loss
from ..targets.options import SameImage, check_targets
from .arguments import check_world


class MultiPositiveSigmoidLoss(nn.Module):
    """``multi_positive_sigmoid_loss`` as a drop-in for open_clip's SigLipLoss.

    Takes SigLipLoss's positional arguments (collectives and memory are the same whatever dist_impl and chunk_size say)
    and, by keyword, label_smoothing, same_image, reduction, group and backend of the function. With text_features
    [N, D] it equals SigLipLoss.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: DistImpl | None = None,
        chunk_size: int = 0,
        *,
        label_smoothing: float = 0.0,
        same_image: SameImage = "ignore",
        reduction: Reduction = "mean",
        group: Group = None,
        backend: SigmoidBackend = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_world(name, rank, world_size, use_horovod=False, group=group)
        if dist_impl is not None:
            check_choice(name, "dist_impl", dist_impl, DIST_IMPLS)
        check_targets(name, label_smoothing, same_image)
        check_reduction(name, reduction, backend)
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.same_image: SameImage = same_image
        self.group, self.backend = group, dispatch.requested(name, "sigmoid_pairs", backend, backend)

    def extra_repr(self) -> str:
        return (
            f"label_smoothing={self.label_smoothing}, same_image={self.same_image!r}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """image_features [N,D], text_features [N,K,D] or [N,D], image_mask [N] and text_mask [N,K] bool, image_ids [N]
        int64 -> scalar, or {"contrastive_loss": scalar}.

        No bias is a bias of 0.
        """
        if text_features.ndim == 2:
            text_features = text_features[:, None]
        bias = 0.0 if logit_bias is None else logit_bias
        loss = multi_positive_sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            bias,
            image_mask=image_mask,
            text_mask=text_mask,
            image_ids=image_ids,
            same_image=self.same_image,
            label_smoothing=self.label_smoothing,
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
            logit_bias: Tensor | float | None = ...,
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
            logit_bias: Tensor | float | None = ...,
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
            logit_bias: Tensor | float | None = ...,
            output_dict: bool = ...,
            *,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
        ) -> Tensor | dict[str, Tensor]: ...

        def __call__(self, *args: Any, **options: Any) -> Any: ...
