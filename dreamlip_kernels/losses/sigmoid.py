"""The multi-positive sigmoid loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..backends import dispatch
from ..distributed.collectives import Group
from ..sigmoid import multi_positive_sigmoid_loss
from ..targets.options import SameImage, check_targets
from .arguments import check_world


class MultiPositiveSigmoidLoss(nn.Module):
    """``multi_positive_sigmoid_loss`` as a drop-in for open_clip's SigLipLoss.

    Takes SigLipLoss's positional arguments (the collectives are the same whatever dist_impl says) and, by keyword,
    label_smoothing, same_image, group and backend of the function. With text_features [N, D] it equals SigLipLoss.
    """

    def __init__(
        self,
        cache_labels=False,
        rank=0,
        world_size=1,
        dist_impl=None,
        *,
        label_smoothing: float = 0.0,
        same_image: SameImage = "ignore",
        group: Group = None,
        backend: str = "auto",
    ):
        super().__init__()
        name = type(self).__name__
        check_world(name, rank, world_size, False, group)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"{name}: dist_impl must be None, 'bidir', 'shift', 'reduce' or 'gather', got {dist_impl!r}"
            )
        check_targets(name, label_smoothing, same_image)
        self.label_smoothing, self.same_image = label_smoothing, same_image
        self.group, self.backend = group, dispatch.requested(name, "sigmoid_pairs", backend, backend)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, same_image={self.same_image!r}, backend={self.backend!r}"

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
            group=self.group,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
