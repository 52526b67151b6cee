"""The two open_clip towers, giving what DreamLIP's losses need: image, patch and sub-caption features and the logit
scales.

Shapes: n images, K sub-caption slots, L tokens, P patches, D embedding width. The towers are open_clip's own ``CLIP``
with its own parameter names, so that ``open_clip_state_dict`` is a file any open_clip program loads.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model import image_tower, text_tower
from dreamlip_train.model.packing import PackedCaptions
from dreamlip_train.model.tokenizer import CaptionTokenizer, HubTokenizer

MAX_LOGIT_SCALE = math.log(100.0)
LOGIT_SCALARS = ("logit_scale", "logit_scale_local", "logit_bias")
TRAIN_ONLY = {"local_proj", "logit_scale_local", "logit_bias"}
"""Parameters beside open_clip's, which no export has."""


class BoundedBelowLog100(torch.autograd.Function):
    """``x.clamp(0, ln 100)`` whose gradient is stopped only where it would push x further out.

    A plain clamp has no gradient outside, so a scale that overshoots stays there; writing the clamped value into the
    parameter, as open_clip does, is lost under ZeRO, whose optimizer owns an fp32 copy.
    With the inward gradient kept the parameter comes back by itself, at every ZeRO stage.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, MAX_LOGIT_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # Descent moves x by -grad: a negative gradient above the bound, or a positive one below it, points outward.
        outward = ((x >= MAX_LOGIT_SCALE) & (grad < 0)) | ((x <= 0.0) & (grad > 0))
        return grad.masked_fill(outward, 0.0)


def logit_multiplier(log_scale: Tensor) -> Tensor:
    """The scalar, fp32 multiplier ``exp(log_scale)`` in [1, 100] of a one-element log-scale parameter."""
    return BoundedBelowLog100.apply(log_scale.float()).exp().squeeze()


class DreamLIP(nn.Module):
    """open_clip's towers with patch features and K sub-captions per image.

    ``forward(images [n,3,H,W], text [n,K,L], or the same captions packed)`` returns a dict:
    image_features [n,D] and text_features [n,K,D], unit length; patch_features [n,P,D], projected,
    not normalized (None with ``patches=False``); logit_scale, logit_scale_local and logit_bias, scalars (None where the
    model has none). All fp32, the patches in the towers' dtype: they are the bulk.
    """

    def __init__(
        self,
        clip: open_clip.CLIP | open_clip.CustomTextCLIP,
        tokenizer: CaptionTokenizer | HubTokenizer,
        *,
        local_projection: bool,
        local_logit_scale: bool,
        logit_bias: float | None = None,
        mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN,
        std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        self.clip = clip
        image_tower.use_tokens(clip.visual)
        if self.packs_captions:
            text_tower.allow_masks_by_row(self._text)
        self.tokenize = tokenizer
        self.local_proj = image_tower.new_projection(clip.visual) if local_projection else None
        # One element, not zero-dimensional: DeepSpeed cannot broadcast 0-dim parameters.
        self.logit_scale_local = nn.Parameter(clip.logit_scale.detach().clone()) if local_logit_scale else None
        # Here and not in open_clip's CLIP, which has one too: a bias changes no ranking, and weights without it load
        # everywhere.
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.full((1,), logit_bias))
        self.channels_last = False
        # Not buffers: a bf16 engine would round buffers to bf16, and training would see other pixels than evaluation.
        self.image_mean = torch.tensor(mean).view(3, 1, 1)
        self.image_std = torch.tensor(std).view(3, 1, 1)

    @property
    def image_size(self) -> int:
        """Side of the square input picture in pixels."""
        return image_tower.size_of(self.clip.visual)[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; P = rows * columns, row by row."""
        return image_tower.grid_of(self.clip.visual)

    @property
    def embed_dim(self) -> int:
        """D, the width of every feature."""
        return image_tower.width_of(self.clip.visual)

    @property
    def has_patches(self) -> bool:
        """Whether the image tower gives patch features, which the grouping loss needs."""
        return image_tower.has_patches(self.clip.visual)

    @property
    def packs_captions(self) -> bool:
        """Whether captions may share rows, or be cropped to the longest: not in a bidirectional text tower."""
        return text_tower.is_packable(self._text)

    @property
    def _text(self) -> nn.Module:
        return text_tower.text_tower(self.clip)

    @property
    def context_length(self) -> int:
        """Tokens a caption."""
        return self.clip.context_length

    def drop_patches(self, part: float) -> None:
        """From now on training leaves this part of the patches out; of a model that was built to drop some."""
        image_tower.drop_patches(self.clip.visual, part)

    def compile_towers(self, backend: str = "inductor") -> None:
        """torch.compile both towers: one graph each, for one picture size and for any number of packed rows."""
        self._image_features = torch.compile(self._image_features, backend=backend)
        packed_text_features = torch.compile(self._packed_text_features, backend=backend)

        def for_any_number_of_rows(tokens: Tensor, positions: Tensor, captions: Tensor, ends: Tensor) -> Tensor:
            for by_row in (tokens, positions, captions):
                torch._dynamo.maybe_mark_dynamic(
                    by_row, 0
                )  # another number each step; the rows' length and the number of captions stay
            return packed_text_features(tokens, positions, captions, ends)

        self._packed_text_features = for_any_number_of_rows

    def forward(self, images: Tensor, text: Tensor | PackedCaptions, patches: bool = True) -> dict[str, Tensor | None]:
        image_features, patch_features = self._image_features(images, patches)
        if isinstance(text, PackedCaptions):
            text_features = self._packed_text_features(text.tokens, text.positions, text.captions, text.ends)
        else:
            text_features = self._text_features(text.flatten(0, 1))
        return {
            "image_features": image_features,
            "patch_features": patch_features,
            "text_features": text_features.unflatten(0, (len(images), -1)),
            "logit_scale": logit_multiplier(self.clip.logit_scale),
            "logit_scale_local": None if self.logit_scale_local is None else logit_multiplier(self.logit_scale_local),
            "logit_bias": None if self.logit_bias is None else self.logit_bias.float().sum(),
        }

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit image features [n,D] and projected patch features [n,P,D], None where the tower has none, of images
        [n,3,H,W] (uint8, or float in [0,1]).
        """
        image_features, patch_features = self._image_features(images, patches=True)
        return image_features, None if patch_features is None else patch_features.float()

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Unit features [B,D] of token rows [B,L]."""
        return self._text_features(crop_to_longest(tokens) if self.packs_captions else tokens)

    def _image_features(self, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or images.shape[-1] != self.image_size
            or images.shape[-2] != self.image_size
        ):
            raise UserError(
                f"DreamLIP: images must be [n, 3, {self.image_size}, {self.image_size}], got {tuple(images.shape)}"
            )
        visual = self.clip.visual
        pixels = images.float() / 255.0 if images.dtype == torch.uint8 else images.float()
        pixels = (pixels - self.image_mean.to(pixels.device)) / self.image_std.to(pixels.device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        weight = next(visual.parameters())
        pooled, tokens = image_tower.embed(visual, pixels.to(weight.dtype, memory_format=layout))
        image_features = F.normalize(pooled.float(), dim=-1)
        if not patches or tokens is None:
            return image_features, None
        if self.local_proj is not None:
            return image_features, tokens @ self.local_proj
        return image_features, image_tower.project(visual, tokens)

    def _text_features(self, tokens: Tensor) -> Tensor:
        """open_clip's encode_text, of a packable tower for any length up to the context."""
        if tokens.shape[1] > self.context_length:
            raise UserError(
                f"DreamLIP: text has {tokens.shape[1]} tokens per row, model.context_length is {self.context_length}"
            )
        if not self.packs_captions:
            return text_tower.whole_text_features(self.clip, tokens)
        return text_tower.text_features(self._text, tokens)

    def _packed_text_features(self, tokens: Tensor, positions: Tensor, captions: Tensor, ends: Tensor) -> Tensor:
        """``_text_features`` of the captions in a PackedCaptions' tensors."""
        return text_tower.packed_text_features(self._text, tokens, positions, captions, ends)


def crop_to_longest(tokens: Tensor) -> Tensor:
    """``tokens`` [..., L] without the columns after every row's end token.

    Exact for a causal tower that pools at the end token: no later position reaches it. Reads the tokens on the host:
    call it before they go to a GPU.
    """
    longest = int(tokens.argmax(dim=-1).max()) + 1 if tokens.numel() else 1
    return tokens[..., :longest]
