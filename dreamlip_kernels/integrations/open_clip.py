"""K captions per image in open_clip's training loop: a tokenizer, a model and a loss in the places of its own.

    tokenizer = SubCaptionTokenizer(tokenizer, 8)      # [n, L] -> [n, 8, L]
    model = accept_sub_captions(model)                 # forward(image, text [N, K, L]) -> what DreamLIPLoss takes
    loss = DreamLIPLoss(rank=args.rank, world_size=args.world_size)

In open_clip 3.x the loss goes where ``create_loss(args)`` stood, in later versions into ``CLIPTask(model, loss=loss)``.
Gradient accumulation (``--accum-freq``), compiling and checkpointing stay open_clip's. examples/open_clip_k_captions.py
runs its ``main`` so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from .sub_captions import SubCaptionTokenizer, mean_of_sub_captions, split_sentences, text_mask

__all__ = ["SubCaptionTokenizer", "accept_sub_captions", "split_sentences", "text_mask"]


if TYPE_CHECKING:

    class _OpenClipModel:
        """What is used here of an open_clip model, for type checkers."""

        visual: Any
        logit_scale: Tensor
        logit_bias: Tensor | None
        training: bool

        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor: ...

else:
    _OpenClipModel = object


def accept_sub_captions(model: nn.Module, *, patches: bool = True) -> nn.Module:
    """Let an open_clip model take K captions per image; changes ``model`` in place and returns it.

    Its parameters, their names and its state_dict stay as they are. While training, ``model(image, text)`` with text
    [N, K, L] gives a dict of image_features [N, D], text_features [N, K, D], text_mask [N, K], logit_scale (and
    logit_bias, where the model has one) and patch_features [N, P, D]: the visual tower's patch tokens after its last
    norm, through the projection of its pooled feature. In evaluation mode text_features is [N, D], the unit mean of
    a caption's sub-captions, without masks and patches. Text [N, L] is encoded as before.

    Args:
        model: an ``open_clip.CLIP`` or ``CustomTextCLIP``.
        patches: give patch_features, for DreamLIPLoss; the visual tower must be open_clip's own VisionTransformer.

    Raises:
        ValueError: patches are asked of a tower that has no patch tokens after its last norm.
    """
    if patches:
        visual: Any = model.visual
        if not hasattr(visual, "output_tokens") or not hasattr(visual, "proj"):
            raise ValueError(
                f"accept_sub_captions: the visual tower {type(visual).__name__} has no patch tokens to give; "
                "pass patches=False and train with MultiPositiveContrastiveLoss"
            )
        if getattr(visual, "final_ln_after_pool", False):
            raise ValueError(
                "accept_sub_captions: this visual tower has final_ln_after_pool, so its patch tokens are not "
                "normalized; "
                "pass patches=False"
            )
        visual.output_tokens = True
    model.__class__ = type(f"SubCaption{type(model).__name__}", (_SubCaptions, type(model)), {"gives_patches": patches})
    return model


class _SubCaptions(_OpenClipModel):
    """forward, encode_image and encode_text of an open_clip model that takes K captions per image."""

    gives_patches: bool

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(image)[0] if self.gives_patches else self.visual(image)
        return unit(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text [N, L] -> [N, D]; [N, K, L] -> [N, K, D] while training, else the unit mean [N, D]."""
        if text.ndim == 2:
            return super().encode_text(text, normalize)
        n, k, _ = text.shape
        features = super().encode_text(text.flatten(0, 1), self.training is False or normalize).view(n, k, -1)
        return features if self.training else mean_of_sub_captions(features, text_mask(text))

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor | None]:
        out: dict[str, Tensor | None] = {
            "image_features": None,
            "text_features": None,
            "logit_scale": self.logit_scale.exp(),
        }
        if getattr(self, "logit_bias", None) is not None:
            out["logit_bias"] = self.logit_bias
        if image is not None and self.gives_patches:
            pooled, tokens = self.visual(image)
            out["image_features"] = unit(pooled, dim=-1)
            if self.training:
                out["patch_features"] = tokens if self.visual.proj is None else tokens @ self.visual.proj
        elif image is not None:
            out["image_features"] = self.encode_image(image, normalize=True)
        if text is not None:
            out["text_features"] = self.encode_text(text, normalize=True)
            if self.training and text.ndim == 3:
                out["text_mask"] = text_mask(text)
        return out
