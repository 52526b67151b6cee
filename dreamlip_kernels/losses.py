"""Loss modules shaped like open_clip's ClipLoss: change one line of a training loop.

``ClipLoss(...)`` -> ``MultiPositiveContrastiveLoss(...)`` with text_features [N, K, D] (or [N, D]:
then it equals ClipLoss), or ``DreamLIPLoss(...)``, which adds the sub-caption grouping term when the model also returns
patch_features.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .backends import dispatch
from .checks import check_choice
from .contrastive import check_options, multi_positive_contrastive_loss
from .distributed.collectives import Group, rank_and_size
from .grouping import check_contrast, check_pooling, subcaption_grouping_loss
from .sigmoid import multi_positive_sigmoid_loss


def _check_world(name: str, rank: int, world_size: int, use_horovod: bool, group: Group) -> None:
    if use_horovod:
        raise ValueError(f"{name}: use_horovod=True is not supported; use torch.distributed")
    actual_rank, actual_size = rank_and_size(group)
    if (world_size, rank) != (1, 0) and (world_size, rank) != (actual_size, actual_rank):
        raise ValueError(
            f"{name}: rank={rank}, world_size={world_size} were given, but torch.distributed says rank {actual_rank} "
            f"of {actual_size}; "
            "initialize the process group first"
        )


class _ClipLossArguments(nn.Module):
    """Takes ClipLoss's constructor arguments: the collectives here need none of them, but a wrong world is an error."""

    def __init__(self, local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group):
        super().__init__()
        _check_world(type(self).__name__, rank, world_size, use_horovod, group)
        self.group = group


class MultiPositiveContrastiveLoss(_ClipLossArguments):
    """``multi_positive_contrastive_loss`` as a drop-in for open_clip's ClipLoss.

    Takes ClipLoss's positional arguments (exact over ranks whatever local_loss and gather_with_grad say) and,
    by keyword, negatives, positives, group and backend of the function. With text_features [N, D] it equals ClipLoss.
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
        group: Group = None,
        backend: str = "auto",
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        name = type(self).__name__
        check_options(name, negatives, positives)
        self.negatives, self.positives = negatives, positives
        self.backend = dispatch.requested(name, "bidirectional_logsumexp", backend, backend)

    def extra_repr(self) -> str:
        return f"negatives={self.negatives!r}, positives={self.positives!r}, backend={self.backend!r}"

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
    ) -> Tensor | dict[str, Tensor]:
        """image_features [N,D], text_features [N,K,D] or [N,D], image_mask [N] and text_mask [N,K] bool -> scalar,
        or {"contrastive_loss": scalar}.

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
            negatives=self.negatives,
            positives=self.positives,
            group=self.group,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class MultiPositiveSigmoidLoss(nn.Module):
    """``multi_positive_sigmoid_loss`` as a drop-in for open_clip's SigLipLoss.

    Takes SigLipLoss's positional arguments (the collectives are the same whatever dist_impl says) and, by keyword,
    group and backend of the function. With text_features [N, D] it equals SigLipLoss.
    """

    def __init__(
        self, cache_labels=False, rank=0, world_size=1, dist_impl=None, *, group: Group = None, backend: str = "auto"
    ):
        super().__init__()
        name = type(self).__name__
        _check_world(name, rank, world_size, False, group)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"{name}: dist_impl must be None, 'bidir', 'shift', 'reduce' or 'gather', got {dist_impl!r}"
            )
        self.group, self.backend = group, dispatch.requested(name, "sigmoid_pairs", backend, backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

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
    ) -> Tensor | dict[str, Tensor]:
        """image_features [N,D], text_features [N,K,D] or [N,D], image_mask [N] and text_mask [N,K] bool -> scalar,
        or {"contrastive_loss": scalar}.

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
            group=self.group,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SubcaptionGroupingLoss(_ClipLossArguments):
    """``subcaption_grouping_loss`` as a module; takes ClipLoss's positional arguments and the function's options by
    keyword.
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
        threshold: float | None = None,
        normalization: str = "minmax",
        contrast: str = "image",
        direction: str = "both",
        group: Group = None,
        backend: str = "auto",
        grouping_backend: str | None = None,
        contrastive_backend: str | None = None,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        name = type(self).__name__
        check_pooling(name, threshold, normalization)
        check_contrast(name, contrast, direction)
        self.options = dict(
            threshold=threshold,
            normalization=normalization,
            contrast=contrast,
            direction=direction,
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


class DreamLIPLoss(_ClipLossArguments):
    """``mpcl_weight * multi-positive contrast + grouping_weight * sub-caption grouping``, docs/math.md eq. 18.

    Takes ClipLoss's positional arguments and, by keyword, the options of both functions;
    threshold, normalization, contrast and direction belong to the grouping term. pairs="sigmoid" takes the sigmoid loss
    as the contrast, where negatives and positives have no meaning. ``contrastive_backend`` and ``grouping_backend``
    name the backend of each op; ``backend`` is the shorthand for both, which applies where an op has it ("cuda" and
    "cpp" choose the pooling and leave the contrast at "auto").
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
        mpcl_weight: float = 1.0,
        grouping_weight: float = 1.0,
        negatives: str = "slot",
        positives: str = "mean",
        pairs: str = "softmax",
        threshold: float | None = None,
        normalization: str = "minmax",
        contrast: str = "image",
        direction: str = "both",
        group: Group = None,
        backend: str = "auto",
        contrastive_backend: str | None = None,
        grouping_backend: str | None = None,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        if mpcl_weight < 0 or grouping_weight < 0 or mpcl_weight + grouping_weight == 0:
            raise ValueError(
                "DreamLIPLoss: mpcl_weight and grouping_weight must be >= 0 and not both 0, "
                f"got {mpcl_weight} and {grouping_weight}"
            )
        self.mpcl_weight, self.grouping_weight = mpcl_weight, grouping_weight
        check_choice("DreamLIPLoss", "pairs", pairs, ("softmax", "sigmoid"))
        if pairs == "sigmoid" and (negatives, positives) != ("slot", "mean"):
            raise ValueError(
                f"DreamLIPLoss: negatives={negatives!r} and positives={positives!r} have no meaning with "
                "pairs='sigmoid'; leave them out"
            )
        op = "sigmoid_pairs" if pairs == "sigmoid" else "bidirectional_logsumexp"
        of_pairs = dispatch.requested("DreamLIPLoss", op, contrastive_backend, backend)
        self.contrastive = (
            MultiPositiveSigmoidLoss(group=group, backend=of_pairs)
            if pairs == "sigmoid"
            else MultiPositiveContrastiveLoss(negatives=negatives, positives=positives, group=group, backend=of_pairs)
        )
        self.grouping = SubcaptionGroupingLoss(
            threshold=threshold,
            normalization=normalization,
            contrast=contrast,
            direction=direction,
            group=group,
            backend=backend,
            grouping_backend=grouping_backend,
            contrastive_backend=contrastive_backend,
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
        logit_scale_local: Tensor | float | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted total, or its weighted terms {"contrastive_loss", "grouping_loss"}, which open_clip's loop sums.

        Args:
            image_features: [N, D].  text_features: [N, K, D] or [N, D].  image_mask: [N] and text_mask: [N, K] bool.
            patch_features: [N, P, D], projected to D; without them there is no grouping term (said once as a warning).
            patch_mask: [N, P] bool.  logit_scale_local: the grouping term's multiplier; None takes logit_scale.
            logit_bias: added to the logits of pairs="sigmoid"; without effect in a softmax, where it cancels.
        """
        if text_features.ndim == 2:
            text_features = text_features[:, None]
        terms = {}
        if self.mpcl_weight > 0:
            terms["contrastive_loss"] = self.mpcl_weight * self.contrastive(
                image_features, text_features, logit_scale, logit_bias, image_mask=image_mask, text_mask=text_mask
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
            warnings.warn(
                "DreamLIPLoss: no patch_features were passed, so the grouping term is off; pass patch_features=[N, P, "
                "D], "
                "or grouping_weight=0 if that is meant",
                stacklevel=2,
            )
        return terms if output_dict else sum(terms.values())
