"""What a type checker must say of the public names: ``make lint`` runs basedpyright's strict rules on this file."""

# pyright: strict

from typing import assert_type

from torch import Tensor

import dreamlip_kernels as dk


def losses(image: Tensor, text: Tensor, patches: Tensor) -> None:
    contrast, sigmoid = (
        dk.MultiPositiveContrastiveLoss(negatives="all"),
        dk.MultiPositiveSigmoidLoss(dist_impl="gather"),
    )
    grouping, both = dk.SubcaptionGroupingLoss(contrast="batch", backend="cpp"), dk.DreamLIPLoss(pairs="sigmoid")
    assert_type(contrast(image, text, 10.0), Tensor)
    assert_type(contrast(image, text, 10.0, output_dict=True), dict[str, Tensor])
    assert_type(sigmoid(image, text, 10.0, -10.0), Tensor)
    assert_type(sigmoid(image, text, 10.0, -10.0, output_dict=True), dict[str, Tensor])
    assert_type(grouping(patches, text, 10.0), Tensor)
    assert_type(grouping(patches, text, 10.0, output_dict=True), dict[str, Tensor])
    assert_type(both(image, text, 10.0, patch_features=patches), Tensor)
    assert_type(both(image, text, 10.0, output_dict=True, patch_features=patches), dict[str, Tensor])


def functions(image: Tensor, text: Tensor, patches: Tensor, mask: Tensor) -> None:
    assert_type(dk.multi_positive_contrastive_loss(image, text, 10.0, text_mask=mask, reduction="none"), Tensor)
    assert_type(dk.multi_positive_sigmoid_loss(image, text, 10.0, reduction="none"), Tensor)
    assert_type(dk.subcaption_grouping_loss(patches, text, 10.0, threshold=0.5), Tensor)
    assert_type(dk.bidirectional_logsumexp(image, text, 10.0), tuple[Tensor, Tensor])
    assert_type(dk.group_patches(patches, text, normalization="softmax"), Tensor)
    assert_type(dk.patch_weights(patches, text), Tensor)


def refused(image: Tensor, text: Tensor) -> None:
    """Each of these is an error at run time too."""
    dk.MultiPositiveContrastiveLoss(negatives="none")  # pyright: ignore[reportArgumentType]
    dk.DreamLIPLoss(contrast="world")  # pyright: ignore[reportArgumentType]
    dk.multi_positive_sigmoid_loss(image, text, 10.0, backend="cpp")  # pyright: ignore[reportArgumentType]
