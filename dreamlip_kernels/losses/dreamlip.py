"""DreamLIP's whole objective as a module: the weighted sum of contrast and grouping."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..backends import dispatch
from ..checks import check_choice
from ..distributed.collectives import Group
from ..options import (
    PAIRS,
    Backend,
    Contrast,
    ContrastiveBackend,
    Direction,
    GroupingBackend,
    Negatives,
    Normalization,
    Pairs,
    Positives,
    Reduction,
)
from ..targets.options import SameImage
from .arguments import ClipLossArguments
from .contrastive import MultiPositiveContrastiveLoss
from .grouping import SubcaptionGroupingLoss
from .sigmoid import MultiPositiveSigmoidLoss


class DreamLIPLoss(ClipLossArguments):
    """``mpcl_weight * multi-positive contrast + grouping_weight * sub-caption grouping``, docs/math.md eq. 18.

    Takes ClipLoss's positional arguments and, by keyword, the options of both functions; threshold, normalization,
    normalize_patches, contrast, candidates and direction belong to the grouping term. pairs="sigmoid" takes the sigmoid
    loss as the contrast, where negatives and positives have no meaning. label_smoothing and same_image (for image_ids)
    belong to the contrast of either kind; the grouping term has hard targets. ``contrastive_backend`` and
    ``grouping_backend`` name the backend of each op; ``backend`` is the shorthand for both, which applies where an op
    has it ("cuda" and "cpp" choose the pooling and leave the contrast at "auto").
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
        mpcl_weight: float = 1.0,
        grouping_weight: float = 1.0,
        negatives: Negatives = "slot",
        positives: Positives = "mean",
        pairs: Pairs = "softmax",
        label_smoothing: float = 0.0,
        same_image: SameImage = "ignore",
        threshold: float | None = None,
        normalization: Normalization = "minmax",
        normalize_patches: bool = True,
        contrast: Contrast = "image",
        candidates: int = 4,
        direction: Direction = "both",
        reduction: Reduction = "mean",
        group: Group = None,
        backend: Backend = "auto",
        contrastive_backend: ContrastiveBackend | None = None,
        grouping_backend: GroupingBackend | None = None,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        _check_weights(mpcl_weight, grouping_weight)
        self.mpcl_weight, self.grouping_weight = mpcl_weight, grouping_weight
        check_choice("DreamLIPLoss", "pairs", pairs, PAIRS)
        if pairs == "sigmoid" and (negatives, positives) != ("slot", "mean"):
            raise ValueError(
                f"DreamLIPLoss: negatives={negatives!r} and positives={positives!r} have no meaning with "
                "pairs='sigmoid'; leave them out"
            )
        op = "sigmoid_pairs" if pairs == "sigmoid" else "bidirectional_logsumexp"
        of_pairs = dispatch.requested("DreamLIPLoss", op, contrastive_backend, backend)
        shared: dict[str, Any] = dict(reduction=reduction, group=group)
        options: dict[str, Any] = dict(label_smoothing=label_smoothing, same_image=same_image, backend=of_pairs)
        options |= shared
        self.contrastive = (
            MultiPositiveSigmoidLoss(**options)
            if pairs == "sigmoid"
            else MultiPositiveContrastiveLoss(negatives=negatives, positives=positives, **options)
        )
        self.grouping = SubcaptionGroupingLoss(
            threshold=threshold,
            normalization=normalization,
            normalize_patches=normalize_patches,
            contrast=contrast,
            candidates=candidates,
            direction=direction,
            backend=backend,
            grouping_backend=grouping_backend,
            contrastive_backend=contrastive_backend,
            **shared,
        )

    def extra_repr(self) -> str:
        return f"mpcl_weight={self.mpcl_weight}, grouping_weight={self.grouping_weight}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        patch_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        logit_scale_local: Tensor | float | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted total, or its weighted terms {"contrastive_loss", "grouping_loss"}, which open_clip's loop sums.

        Args:
            image_features: [N, D].  text_features: [N, K, D] or [N, D].  image_mask: [N] and text_mask: [N, K] bool.
            patch_features: [N, P, D], projected to D; without them there is no grouping term (said once as a warning).
            patch_mask: [N, P] bool.  logit_scale_local: the grouping term's multiplier; None takes logit_scale.
            image_ids: [N] int64, equal where images are known to be the same: see same_image of the constructor.
            logit_bias: added to the logits of pairs="sigmoid"; without effect in a softmax, where it cancels.
        """
        if text_features.ndim == 2:
            text_features = text_features[:, None]
        terms: dict[str, Tensor] = {}
        if self.mpcl_weight > 0:
            terms["contrastive_loss"] = self.mpcl_weight * self.contrastive(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                image_mask=image_mask,
                text_mask=text_mask,
                image_ids=image_ids,
            )
        if self.grouping_weight > 0 and patch_features is not None:
            scale = logit_scale if logit_scale_local is None else logit_scale_local
            terms["grouping_loss"] = self.grouping_weight * self.grouping(
                patch_features, text_features, scale, image_mask=image_mask, text_mask=text_mask, patch_mask=patch_mask
            )
        elif self.grouping_weight > 0:
            if not terms:
                raise ValueError(
                    "DreamLIPLoss: patch_features is None and mpcl_weight is 0, so there is no loss; "
                    "pass patch_features [N, P, D]"
                )
            _say_that_grouping_is_off()
        return terms if output_dict else functools.reduce(operator.add, terms.values())

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
            patch_features: Tensor | None = ...,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            patch_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
            logit_scale_local: Tensor | float | None = ...,
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
            patch_features: Tensor | None = ...,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            patch_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
            logit_scale_local: Tensor | float | None = ...,
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
            patch_features: Tensor | None = ...,
            image_mask: Tensor | None = ...,
            text_mask: Tensor | None = ...,
            patch_mask: Tensor | None = ...,
            image_ids: Tensor | None = ...,
            logit_scale_local: Tensor | float | None = ...,
        ) -> Tensor | dict[str, Tensor]: ...

        def __call__(self, *args: Any, **options: Any) -> Any: ...


def _check_weights(mpcl_weight: float, grouping_weight: float) -> None:
    weights = mpcl_weight, grouping_weight
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise ValueError(
            "DreamLIPLoss: mpcl_weight and grouping_weight must be finite, >= 0 and not both 0, "
            f"got {mpcl_weight} and {grouping_weight}"
        )


def _say_that_grouping_is_off() -> None:
    warnings.warn(
        "DreamLIPLoss: no patch_features were passed, so the grouping term is off; pass patch_features=[N, P, D], "
        "or grouping_weight=0 if that is meant",
        stacklevel=3,
    )


# torch.compile, which cannot trace a warning, then gives it while it traces.
_say_that_grouping_is_off._dynamo_marked_constant = True
