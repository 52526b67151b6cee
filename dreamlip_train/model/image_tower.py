"""What is asked of an open_clip image tower, whichever it is: an image's embedding, its patch tokens in the same space,
their grid.

open_clip's own ViT gives tokens after ``ln_post``; ``visual.proj`` projects them like the class token. A timm ViT
(EVA02, SigLIP, MobileCLIP2's) gives them after its norm; its own head or the one behind it projects them. A ResNet, a
ConvNeXt or an attentional pooler has none that are comparable: ``has_patches`` is False.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

Tower = Any  # an image tower of open_clip, which has no types


def has_patches(visual: Tower) -> bool:
    """Whether the tower gives projected patch tokens."""
    if isinstance(visual, VisionTransformer):
        plain = visual.attn_pool is None and not visual.final_ln_after_pool
        return plain and visual.proj is not None and visual.pool_type in ("tok", "avg")
    trunk = getattr(visual, "trunk", None)
    return isinstance(visual, TimmModel) and hasattr(trunk, "num_prefix_tokens") and hasattr(trunk, "fc_norm")


def why_no_patches(visual: Tower) -> str:
    """What a tower is that gives none, in a few words."""
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None:
            return "attentional pooling"
        return "final_ln_after_pool" if visual.final_ln_after_pool else f"pool_type {visual.pool_type!r}"
    return f"it is a {type(getattr(visual, 'trunk', visual)).__name__}"


def use_tokens(visual: Tower) -> None:
    """Make the tower give its tokens: an attribute, not state, so that checkpoints do not change. (open_clip's own
    encode_image(normalize=True), which then breaks, is never called here.)
    """
    if isinstance(visual, VisionTransformer):
        visual.output_tokens = True


class OwnValueAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention of x with itself in which the first token attends to all, and every other takes its own
    value, as MaskCLIP's patches do (Zhou et al., 2022).

    The parameters, and what the first token gets, are nn.MultiheadAttention's.
    """

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        q, k, v = (
            F.linear(x, self.in_proj_weight, self.in_proj_bias)
            .unflatten(-1, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.out_proj(torch.cat([first, v[:, :, 1:]], dim=2).transpose(1, 2).flatten(2)), None


def has_class_token_attention(visual: Tower) -> bool:
    """Whether ``keep_patches_apart`` can be asked of the tower: its embedding is that of a class token, its last block
    open_clip's plain one.
    """
    if not has_patches(visual) or not isinstance(visual, VisionTransformer) or visual.pool_type != "tok":
        return False
    block = visual.transformer.resblocks[-1]
    return isinstance(block, ResidualAttentionBlock) and isinstance(block.attn, nn.MultiheadAttention)


def keep_patches_apart(visual: Tower) -> None:
    """From now on patches take their own values in the last block. The class token, and so the image's embedding, is as
    before: no later block could tell it.
    """
    visual.transformer.resblocks[-1].attn.__class__ = OwnValueAttention


def size_of(visual: Tower) -> tuple[int, int]:
    """Height and width of the input picture in pixels."""
    size = visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def width_of(visual: Tower) -> int:
    """D, the width of an embedding."""
    if not isinstance(visual, TimmModel):
        return visual.output_dim
    mlp = getattr(visual.head, "mlp", None)
    for layer in (getattr(visual.head, "proj", None), getattr(mlp, "fc2", None), getattr(visual.trunk, "head", None)):
        if isinstance(layer, nn.Linear):
            return layer.out_features
    return visual.trunk.num_features


def grid_of(visual: Tower) -> tuple[int, int]:
    """Rows and columns of patches; (0, 0) without patches."""
    if not has_patches(visual):
        return 0, 0
    return tuple(visual.grid_size if isinstance(visual, VisionTransformer) else visual.trunk.patch_embed.grid_size)


def embed(visual: Tower, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The embedding [n, D] and the patch tokens [n, P, C], not projected, of normalized pixels [n, 3, S, S]."""
    if isinstance(visual, VisionTransformer):
        return visual(pixels)
    if not has_patches(visual):
        return visual(pixels), None
    tokens = visual.trunk.forward_features(pixels)
    return visual.head(visual.trunk.forward_head(tokens)), tokens[:, visual.trunk.num_prefix_tokens :]


def project(visual: Tower, tokens: Tensor) -> Tensor:
    """Patch tokens [n, P, C] -> [n, P, D], as the tower projects the token that it pools."""
    if isinstance(visual, VisionTransformer):
        return tokens @ visual.proj
    return visual.head(visual.trunk.head(visual.trunk.fc_norm(tokens)))


def new_projection(visual: Tower) -> nn.Parameter:
    """A projection [C, D] for the patches alone that starts as the tower's own, where that is one matrix."""
    if isinstance(visual, VisionTransformer):
        return nn.Parameter(visual.proj.detach().clone())
    for layer in (getattr(visual.head, "proj", None), visual.trunk.head):
        if isinstance(layer, nn.Linear):
            return nn.Parameter(layer.weight.detach().T.clone())
    return nn.Parameter(torch.eye(visual.trunk.num_features))


def drop_patches(visual: Tower, part: float) -> None:
    """From now on training leaves this part of the patches out, in a tower that was built to drop some."""
    for module in visual.modules():
        if type(module).__name__.startswith("PatchDropout"):  # open_clip's, and timm's two
            module.prob = part
