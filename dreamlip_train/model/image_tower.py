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
    """nn.MultiheadAttention of ``query`` [n, Q, C] with ``key`` [n, S, C], whose values it takes, followed by the own
    values of ``value`` [n, P, C], as MaskCLIP's patches take them (Zhou et al., 2022): [n, Q + P, C].

    The parameters are nn.MultiheadAttention's.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        width = self.embed_dim
        weights, biases = self.in_proj_weight.split(width), self.in_proj_bias.split(width)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, key), weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out_proj(torch.cat([attended, F.linear(value, weights[2], biases[2])], dim=1)), None


class OwnValueBlock(ResidualAttentionBlock):
    """open_clip's block, which it leaves as it is, and a copy of the patches beside it that attends to nothing.

    Takes the class token, the patches and their copies, [n, 1 + P + P, C], and gives them. The first of several takes
    no copies, but makes them; the last gives the class token and the copies alone.
    """

    first = last = False

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        x = torch.cat([q_x, q_x[:, 1:]], dim=1) if self.first else q_x
        usual = 1 + x.shape[1] // 2
        asking = 1 if self.last else usual
        y = self.ln_1(x)
        attended, _ = self.attn(y[:, :asking], y[:, :usual], y[:, usual:])
        x = torch.cat([x[:, :asking], x[:, usual:]], dim=1) + self.ls_1(attended)
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def has_class_token_attention(visual: Tower) -> bool:
    """Whether ``keep_patches_apart`` can be asked of the tower: its embedding is that of a class token, its blocks
    open_clip's plain ones.
    """
    if not has_patches(visual) or not isinstance(visual, VisionTransformer) or visual.pool_type != "tok":
        return False
    return all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)


def keep_patches_apart(visual: Tower, count: int) -> None:
    """From now on the patches that the tower gives have taken their own values in the last ``count`` blocks. The class
    token, and so the image's embedding, is as before: it attends to patches that go on attending.
    """
    blocks = visual.transformer.resblocks[-count:]
    for block in blocks:
        block.__class__, block.attn.__class__ = OwnValueBlock, OwnValueAttention
    blocks[0].first = blocks[-1].last = True


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
