"""What is asked of an open_clip text tower, whichever it is: unit features of captions, and whether they may be packed.

A causal tower that pools at the end token (CLIP's, EVA02's, MobileCLIP2's) sees of a caption only the caption, so
captions share rows (packing.py) or are cropped. Any other (SigLIP's and MobileCLIP-S's are bidirectional) sees the
padding as well and gets whole rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamlip_train.model.packing import RowAttention, row_mask

Tower = Any  # a text tower of open_clip, which has no types


def text_tower(clip: nn.Module) -> Tower:
    """The module that has the text tower's layers: ``clip``, or its ``text`` where that is a module of its own."""
    return getattr(clip, "text", clip)


def is_packable(tower: Tower) -> bool:
    """Whether a caption's features depend on its own tokens alone."""
    pool_type = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    return tower.attn_mask is not None and pool_type == "argmax" and getattr(tower, "cls_emb", None) is None


def allow_masks_by_row(tower: Tower) -> None:
    """Packed captions need attention whose mask differs by row; open_clip's other blocks have one that does."""
    for block in tower.transformer.resblocks:
        if type(block.attn) is nn.MultiheadAttention:
            block.attn.__class__ = RowAttention


def text_features(tower: Tower, tokens: Tensor) -> Tensor:
    """Unit features [B, D] of token rows [B, L] of a packable tower, L up to its context."""
    count, length = tokens.shape
    # The end token has the highest id.
    ends = torch.arange(count, device=tokens.device) * length + tokens.argmax(dim=-1)
    return _pooled(tower, tokens, tower.positional_embedding[:length], tower.attn_mask[:length, :length], ends)


def packed_text_features(tower: Tower, tokens: Tensor, positions: Tensor, captions: Tensor, ends: Tensor) -> Tensor:
    """``text_features`` of the captions in a PackedCaptions' tensors."""
    embedding = tower.positional_embedding
    return _pooled(tower, tokens, F.embedding(positions, embedding), row_mask(captions, embedding.dtype), ends)


def whole_text_features(clip: Any, tokens: Tensor) -> Tensor:
    """Unit features [B, D] of token rows [B, context] of any tower, by open_clip's own forward."""
    return F.normalize(clip.encode_text(tokens).float(), dim=-1)


def _pooled(tower: Tower, tokens: Tensor, positions: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """Unit features [B,D] at ``ends``, indices into the flattened token rows; ``positions`` are embeddings."""
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + positions.to(dtype)
    x = tower.ln_final(tower.transformer(x, attn_mask=mask)).flatten(0, 1).index_select(0, ends)
    projection = tower.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return F.normalize(x.float(), dim=-1)
